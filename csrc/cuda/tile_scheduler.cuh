// SPDX-License-Identifier: Apache-2.0
// Which tile of a grouped product a block computes, found on the device: the host knows only how many rows there are at
// most and starts a block for every tile there may be; blocks without one end at once. Where blocks stay (sm_90), each
// goes round the tiles in order instead.
//
// Order: expert by expert, and inside an expert groups of kGroupRows m-tiles times all n-tiles, m first. Neighbouring
// blocks thus share a weight tile, and the rows of a group stay in the L2 cache while the weight passes once. Heavy
// experts first would only matter where a block owns several tiles: here every block is one tile, of equal length, and
// the hardware gives a free processor the next one.
#pragma once
#include "warp.cuh"

namespace moe::cuda {

constexpr int kGroupRows = 8;     // m-tiles
constexpr int kExpertsALane = 4;  // read at once in the search

/// m-tiles there may be: every expert but the fullest ones may end within a tile.
MOE_BOTH int64_t most_row_tiles(int64_t E, int64_t S, int64_t tile_rows) {
  const int64_t used = E < S ? E : S;
  return (S + used * (tile_rows - 1)) / tile_rows;
}

struct OutputTile {
  int32_t expert;       // -1: no tile for this block
  int32_t column_tile;  //
  int64_t row, end;     // first row of the tile, end of the expert's rows
  int64_t expert_row;   // first row of the expert
};

/// What a lane knows of kExpertsALane experts, from `first` on.
struct LaneExperts {
  int32_t begin[kExpertsALane + 1];  // rows; the last one is the end
  int32_t tiles[kExpertsALane];
  int32_t tiles_in_all;
};

/// Reads the ends of the lane's experts: within [0, S] and ascending, whatever stands there. end_before: of the experts
/// before the lanes'; becomes the end behind them.
template <int kTileRows> MOE_DEVICE LaneExperts read_experts(const int32_t* ends, int64_t E, int64_t S, int64_t first,
                                                             int32_t& end_before) {
  const int lane = threadIdx.x % kWarp;
  LaneExperts x;
  int32_t highest = 0;
#pragma unroll
  for (int i = 0; i < kExpertsALane; ++i) {
    const int64_t e = first + i;
    const int64_t end = e >= E ? 0 : ends ? int64_t(ends[e]) : (e + 1) * (S / E);
    highest = max(highest, int32_t(min(max(end, int64_t(0)), S)));
    x.begin[i + 1] = highest;
  }
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int32_t other = __shfl_up_sync(kFullWarp, highest, delta);
    if (lane >= delta) highest = max(highest, other);
  }
  const int32_t lanes_before = __shfl_up_sync(kFullWarp, highest, 1);
  x.begin[0] = max(lane ? lanes_before : 0, end_before);
  x.tiles_in_all = 0;
#pragma unroll
  for (int i = 0; i < kExpertsALane; ++i) {
    x.begin[i + 1] = max(x.begin[i + 1], x.begin[0]);
    x.tiles[i] = (x.begin[i + 1] - x.begin[i] + kTileRows - 1) / kTileRows;
    x.tiles_in_all += x.tiles[i];
  }
  end_before = max(end_before, __shfl_sync(kFullWarp, highest, kWarp - 1));
  return x;
}

/// Where a search for a tile has come to: searches for higher indices go on from there.
struct TileSearch {
  int64_t base = 0;  // experts before this one have ..
  int32_t tiles_before = 0, end_before = 0;
};

/// The tile `index` of most_row_tiles times `column_tiles`. Every warp calls it and gets the same.
template <int kTileRows> MOE_DEVICE OutputTile find_tile(const int32_t* ends, int64_t E, int64_t S,
                                                         uint32_t column_tiles, uint32_t index, TileSearch& search) {
  const int lane = threadIdx.x % kWarp;
  const int32_t wanted = int32_t(index / column_tiles);  // of the m-tiles, in order
  for (; search.base < E; search.base += kWarp * kExpertsALane) {
    int32_t end_before = search.end_before;
    const LaneExperts x = read_experts<kTileRows>(ends, E, S, search.base + lane * kExpertsALane, end_before);
    const int32_t mine = search.tiles_before + warp_prefix(x.tiles_in_all, lane);
    const uint32_t owner = __ballot_sync(kFullWarp, wanted >= mine && wanted < mine + x.tiles_in_all);
    if (owner == 0) {
      search.tiles_before += warp_sum(x.tiles_in_all), search.end_before = end_before;
      continue;
    }
    int32_t at = mine, e = 0, row = 0, end = 0, before = 0, count = 0;
#pragma unroll
    for (int i = 0; i < kExpertsALane; ++i) {
      if (wanted >= at && wanted < at + x.tiles[i])
        e = lane * kExpertsALane + i, row = x.begin[i], end = x.begin[i + 1], before = at, count = x.tiles[i];
      at += x.tiles[i];
    }
    const int from = __ffs(int(owner)) - 1;
    e = __shfl_sync(kFullWarp, e, from), row = __shfl_sync(kFullWarp, row, from);
    end = __shfl_sync(kFullWarp, end, from), before = __shfl_sync(kFullWarp, before, from);
    const uint32_t tiles = uint32_t(__shfl_sync(kFullWarp, count, from));
    const uint32_t inside = index - uint32_t(before) * column_tiles, group = inside / (kGroupRows * column_tiles);
    const uint32_t in_group = min(uint32_t(kGroupRows), tiles - group * kGroupRows);
    const uint32_t turn = inside - group * kGroupRows * column_tiles;
    const int64_t row_tile = group * kGroupRows + turn % in_group;
    return {int32_t(search.base) + e, int32_t(turn / in_group), row + row_tile * kTileRows, end, row};
  }
  return {-1, 0, 0, 0, 0};
}
template <int kTileRows> MOE_DEVICE OutputTile find_tile(const int32_t* ends, int64_t E, int64_t S,
                                                         uint32_t column_tiles, uint32_t index) {
  TileSearch search;
  return find_tile<kTileRows>(ends, E, S, column_tiles, index, search);
}

}  // namespace moe::cuda

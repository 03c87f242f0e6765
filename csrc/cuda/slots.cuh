// SPDX-License-Identifier: Apache-2.0
// Slots counted by expert and ranked in order, without a sort: what permute and limit_capacity share. Positions are cut
// into tiles, a tile into one stretch a warp (permute_tile.h); ranks come from __match_any_sync, so integers only and
// no order that could change. An id outside [0, E) is absent.
#pragma once
#include "../moe.h"
#include "permute_tile.h"
#include "ptx.cuh"
#include "warp.cuh"

namespace moe::cuda {

/// Calls f(position, expert, peers): 32 consecutive ones of `count` positions at a time, this warp's stretch of the
/// tile, in order. id_at(position) is any id. `peers` are the lanes that have the same expert; 0 and expert -1 where
/// the slot is absent, position -1 where there is none. All lanes take part.
template <class Id, class F>
MOE_DEVICE void for_slots(int64_t count, int64_t E, const IndexTile& tile, int block, Id&& id_at, F&& f) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile_slots = tile.tiles == 1 ? count : kTileSlots;
  const int64_t stretch = (tile_slots + tile.warps * kWarp - 1) / (tile.warps * kWarp) * kWarp;
  const int64_t first = block * tile_slots + warp * stretch;
  const int64_t end = min(min(first + stretch, (block + 1) * tile_slots), count);
  for (int64_t base = first; base < end; base += kWarp) {
    const int64_t position = base + lane;
    const int32_t id = position < end ? id_at(position) : -1;
    const int32_t expert = id >= 0 && id < E ? id : -1;
    const uint32_t same = __match_any_sync(kFullWarp, expert);
    f(position < end ? position : int64_t(-1), expert, expert < 0 ? 0u : same);
    __syncwarp();
  }
}
MOE_DEVICE bool first_of(uint32_t peers) { return peers != 0 && __ffs(int(peers)) - 1 == int(threadIdx.x % kWarp); }

/// counters[warp][e] = slots of e in the warp's stretch.
template <class Id>
MOE_DEVICE void count_tile(int64_t count, int E, const IndexTile& tile, int block, Id&& id_at, int32_t* counters) {
  for (int i = threadIdx.x; i < tile.warps * E; i += blockDim.x) counters[i] = 0;
  __syncthreads();
  int32_t* mine = counters + int64_t(threadIdx.x / kWarp) * E;
  for_slots(count, E, tile, block, id_at, [&](int64_t, int32_t expert, uint32_t peers) {
    if (first_of(peers)) mine[expert] += __popc(peers);
  });
  __syncthreads();
}

/// total[e] = slots of e in the tile that count_tile has counted.
MOE_DEVICE void add_counters(int E, const IndexTile& tile, const int32_t* counters, int32_t* total) {
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    int32_t sum = 0;
    for (int w = 0; w < tile.warps; ++w) sum += counters[w * E + e];
    total[e] = sum;
  }
}

/// counters[warp][e]: from a count to the rank of the warp's first slot of e; first(e) is that of the tile's.
template <class F> MOE_DEVICE void start_ranks(int E, const IndexTile& tile, int32_t* counters, F&& first) {
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    int32_t rank = first(e);
    for (int w = 0; w < tile.warps; ++w) {
      const int32_t count = counters[w * E + e];
      counters[w * E + e] = rank;
      rank += count;
    }
  }
  __syncthreads();
}

/// Calls f(position, rank) for the tile's positions, rank -1 where the slot is absent; uses up what start_ranks made.
template <class Id, class F> MOE_DEVICE void rank_slots(int64_t count, int E, const IndexTile& tile, int block,
                                                        Id&& id_at, int32_t* counters, F&& f) {
  int32_t* mine = counters + int64_t(threadIdx.x / kWarp) * E;
  const uint32_t before = (1u << (threadIdx.x % kWarp)) - 1;
  for_slots(count, E, tile, block, id_at, [&](int64_t position, int32_t expert, uint32_t peers) {
    const int32_t rank = expert < 0 ? -1 : mine[expert] + __popc(peers & before);
    __syncwarp();
    if (first_of(peers)) mine[expert] += __popc(peers);
    if (position >= 0) f(position, rank);
  });
}

/// tile_counts [tiles, E] -> slots of the expert in the tiles before, totals [E] behind them. A block does 32 experts;
/// each of its warps adds up a stretch of the tiles, lane by lane an expert. sums: [warps][32] of shared memory.
MOE_DEVICE void scan_tiles(int E, int tiles, int block, int32_t* tile_counts, int32_t* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int e = block * kWarp + lane, stretch = (tiles + warps - 1) / warps;
  const int first = min(warp * stretch, tiles), end = min(first + stretch, tiles);
  int32_t sum = 0;
  for (int t = first; t < end && e < E; ++t) sum += tile_counts[int64_t(t) * E + e];
  sums[warp * kWarp + lane] = sum;
  __syncthreads();
  int32_t before = 0;
  for (int w = 0; w < warp; ++w) before += sums[w * kWarp + lane];
  for (int t = first; t < end && e < E; ++t) {
    const int32_t count = tile_counts[int64_t(t) * E + e];
    tile_counts[int64_t(t) * E + e] = before;
    before += count;
  }
  if (warp == warps - 1 && e < E) tile_counts[int64_t(tiles) * E + e] = before;
}

}  // namespace moe::cuda

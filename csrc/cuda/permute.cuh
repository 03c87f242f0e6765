// SPDX-License-Identifier: Apache-2.0
// permute on a GPU: a stable counting sort without a sort. Slots are cut into tiles, a tile into one stretch a warp.
//   count   of each tile, the slots of each expert; and row_to_slot = -1 everywhere
//   scan    of each expert, how many slots came in the tiles before
//   place   offsets of the experts; then each slot goes behind those of its expert that came before it
// A few slots are sorted by one block in one launch. How slots are counted and ranked: slots.cuh.
#pragma once
#include "slots.cuh"

namespace moe::cuda {

/// The id of a slot, for slots.cuh.
MOE_DEVICE auto ids_of(const PermuteIndexArgs& args) {
  return [ids = args.topk_ids](int64_t slot) { return ids[slot]; };
}

/// out[e] = sum of size(e') over e' < e, for e = 0 .. E; every size rounded up to align. `scratch` holds 33 numbers.
template <class F>
MOE_DEVICE void scan_experts(int E, int64_t align, int32_t* out, int32_t* scratch, F&& size) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int32_t carry = 0;
  for (int base = 0; base < E; base += blockDim.x) {
    const int e = base + threadIdx.x;
    const int32_t rows = e < E ? int32_t((size(e) + align - 1) / align * align) : 0;
    const int32_t before = warp_prefix(rows, lane);
    if (lane == kWarp - 1) scratch[warp] = before + rows;
    __syncthreads();
    if (warp == 0) {
      const int32_t sum = lane < warps ? scratch[lane] : 0, start = warp_prefix(sum, lane);
      scratch[lane] = start;
      if (lane == kWarp - 1) scratch[kWarp] = start + sum;
    }
    __syncthreads();
    if (e < E) out[e] = carry + scratch[warp] + before;
    carry += scratch[kWarp];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[E] = carry;
}

/// counters: the row of each warp's first slot of each expert.
MOE_DEVICE void place_slots(const PermuteIndexArgs& args, const IndexTile& tile, int block, int32_t* counters) {
  rank_slots(args.S, int(args.E), tile, block, ids_of(args), counters, [&](int64_t slot, int32_t row) {
    if (row >= 0) args.row_to_slot[row] = int32_t(slot);
    if (args.slot_to_row) args.slot_to_row[slot] = row;
  });
}

MOE_DEVICE void clear_rows(const PermuteIndexArgs& args) {
  for (int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; r < args.P; r += int64_t(gridDim.x) * blockDim.x)
    args.row_to_slot[r] = -1;
}

/// All of it, by one block.
MOE_KERNEL __launch_bounds__(1024) permute_index_kernel(PermuteIndexArgs args, IndexTile tile) {
  MOE_SHARED(unsigned char, shared);
  auto* counters = reinterpret_cast<int32_t*>(shared);
  auto* offsets = reinterpret_cast<int32_t*>(shared + tile.offsets);
  auto* scratch = reinterpret_cast<int32_t*>(shared + tile.scratch);
  const int E = int(args.E);
  clear_rows(args);
  count_tile(args.S, E, tile, 0, ids_of(args), counters);
  scan_experts(E, args.align, offsets, scratch, [&](int e) {
    int32_t sum = 0;
    for (int w = 0; w < tile.warps; ++w) sum += counters[w * E + e];
    return sum;
  });
  __syncthreads();  // orders clear_rows before place_slots too
  for (int e = threadIdx.x; e <= E; e += blockDim.x) args.expert_offsets[e] = offsets[e];
  start_ranks(E, tile, counters, [&](int e) { return offsets[e]; });
  place_slots(args, tile, 0, counters);
}

/// tile_counts [tiles, E] <- slots of each expert in each tile.
MOE_KERNEL __launch_bounds__(256) permute_count_kernel(PermuteIndexArgs args, IndexTile tile, int32_t* tile_counts) {
  MOE_SHARED(unsigned char, shared);
  auto* counters = reinterpret_cast<int32_t*>(shared);
  const int E = int(args.E);
  clear_rows(args);
  count_tile(args.S, E, tile, int(blockIdx.x), ids_of(args), counters);
  add_counters(E, tile, counters, tile_counts + int64_t(blockIdx.x) * E);
}

MOE_KERNEL __launch_bounds__(1024) permute_scan_kernel(int E, int tiles, int32_t* tile_counts) {
  MOE_SHARED(int32_t, sums);
  scan_tiles(E, tiles, int(blockIdx.x), tile_counts, sums);
}

MOE_KERNEL __launch_bounds__(256)
    permute_place_kernel(PermuteIndexArgs args, IndexTile tile, const int32_t* tile_counts) {
  MOE_SHARED(unsigned char, shared);
  auto* counters = reinterpret_cast<int32_t*>(shared);
  auto* offsets = reinterpret_cast<int32_t*>(shared + tile.offsets);
  const int E = int(args.E);
  const int32_t* totals = tile_counts + int64_t(tile.tiles) * E;
  scan_experts(E, args.align, offsets, reinterpret_cast<int32_t*>(shared + tile.scratch),
               [&](int e) { return totals[e]; });
  count_tile(args.S, E, tile, int(blockIdx.x), ids_of(args), counters);
  if (blockIdx.x == 0)
    for (int e = threadIdx.x; e <= E; e += blockDim.x) args.expert_offsets[e] = offsets[e];
  start_ranks(E, tile, counters, [&](int e) { return offsets[e] + tile_counts[int64_t(blockIdx.x) * E + e]; });
  place_slots(args, tile, int(blockIdx.x), counters);
}

/// ids of any width and any map to int32 ids in [0, E), or -1.
MOE_KERNEL __launch_bounds__(256) narrow_ids_kernel(NarrowIdsArgs args) {
  const auto read = [](const void* ids, bool wide, int64_t i) {
    return wide ? static_cast<const int64_t*>(ids)[i] : int64_t(static_cast<const int32_t*>(ids)[i]);
  };
  for (int64_t s = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; s < args.S; s += int64_t(gridDim.x) * blockDim.x) {
    int64_t id = read(args.topk_ids, args.ids64, s);
    if (args.expert_map) id = id >= 0 && id < args.map_size ? read(args.expert_map, args.map64, id) : -1;
    args.narrow[s] = id >= 0 && id < args.E ? int32_t(id) : -1;
  }
}

constexpr int kRowVectors = 4;  // of a lane, all in flight before the first is written

/// x_rows[r] = x[row_to_slot[r] / K], or 0. Rows are `vectors` of V; a warp copies 128 of them.
template <class V> MOE_KERNEL __launch_bounds__(256)
    permute_rows_kernel(PermuteArgs args, int64_t vectors, int64_t x_stride) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t r = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp;
  if (r >= args.P) return;
  const int32_t slot = args.row_to_slot[r];
  const V* from = static_cast<const V*>(args.x) + (slot < 0 ? 0 : slot / args.K * x_stride);
  V* to = static_cast<V*>(args.x_rows) + r * vectors;
  for (int64_t base = int64_t(blockIdx.y) * kWarp * kRowVectors; base < vectors;
       base += int64_t(gridDim.y) * kWarp * kRowVectors) {
    V v[kRowVectors];
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i) {
      const int64_t at = base + i * kWarp + lane;
      v[i] = V{};
      if (slot >= 0 && at < vectors) v[i] = __ldg(from + at);
    }
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i) {
      const int64_t at = base + i * kWarp + lane;
      if (at < vectors) __stcg(to + at, v[i]);
    }
  }
}

}  // namespace moe::cuda

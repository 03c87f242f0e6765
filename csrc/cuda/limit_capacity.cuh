// SPDX-License-Identifier: Apache-2.0
// limit_capacity on a GPU. The slots of a group are walked as the rule has it, first choices in token order, then
// second ones; a slot is late if as many of its expert as fit came before it. Ranks as in permute (slots.cuh): a group
// of few slots is one block and one launch, a larger one is cut into tiles: count, scan, rank.
#pragma once
#include "slots.cuh"

namespace moe::cuda {

/// The walk over one group: position p is choice p / tokens of token p % tokens.
struct GroupWalk {
  const int32_t* ids;  // [tokens, K]
  uint8_t* dropped;    // [tokens, K]
  uint32_t tokens, K;

  MOE_DEVICE int64_t slots() const { return int64_t(tokens) * K; }
  MOE_DEVICE int64_t slot(int64_t position) const {
    const uint32_t k = uint32_t(position) / tokens;
    return int64_t(uint32_t(position) - k * tokens) * K + k;
  }
  MOE_DEVICE int32_t operator()(int64_t position) const { return ids[slot(position)]; }
};

MOE_DEVICE GroupWalk walk_of(const LimitCapacityArgs& args, int64_t group) {
  const int64_t begin = group * args.group_size, tokens = min(args.group_size, args.T - begin);
  return {args.topk_ids + begin * args.K, args.dropped + begin * args.K, uint32_t(tokens), uint32_t(args.K)};
}

MOE_DEVICE void drop_late(const LimitCapacityArgs& args, const IndexTile& tile, const GroupWalk& walk, int block,
                          int32_t* counters) {
  rank_slots(walk.slots(), int(args.E), tile, block, walk, counters,
             [&](int64_t position, int32_t rank) { walk.dropped[walk.slot(position)] = rank >= args.capacity; });
}

/// A group a block.
MOE_KERNEL __launch_bounds__(1024) limit_capacity_kernel(LimitCapacityArgs args, IndexTile tile) {
  MOE_SHARED(int32_t, counters);
  const GroupWalk walk = walk_of(args, blockIdx.x);
  const int E = int(args.E);
  count_tile(walk.slots(), E, tile, 0, walk, counters);
  start_ranks(E, tile, counters, [](int) { return 0; });
  drop_late(args, tile, walk, 0, counters);
}

// Of larger groups each has tiles + 1 rows of counters [E]; a block is a tile of one of them.

MOE_KERNEL __launch_bounds__(256) limit_count_kernel(LimitCapacityArgs args, IndexTile tile, int32_t* tile_counts) {
  MOE_SHARED(int32_t, counters);
  const int64_t group = blockIdx.x / tile.tiles;
  const int block = int(blockIdx.x - group * tile.tiles), E = int(args.E);
  const GroupWalk walk = walk_of(args, group);
  count_tile(walk.slots(), E, tile, block, walk, counters);
  add_counters(E, tile, counters, tile_counts + (group + blockIdx.x) * E);
}

MOE_KERNEL __launch_bounds__(1024) limit_scan_kernel(int E, int tiles, int32_t* tile_counts) {
  MOE_SHARED(int32_t, sums);
  const int stretches = (E + kWarp - 1) / kWarp;
  const int64_t group = blockIdx.x / stretches;
  scan_tiles(E, tiles, int(blockIdx.x - group * stretches), tile_counts + group * (tiles + 1) * E, sums);
}

MOE_KERNEL __launch_bounds__(256)
    limit_drop_kernel(LimitCapacityArgs args, IndexTile tile, const int32_t* tile_counts) {
  MOE_SHARED(int32_t, counters);
  const int64_t group = blockIdx.x / tile.tiles;
  const int block = int(blockIdx.x - group * tile.tiles), E = int(args.E);
  const GroupWalk walk = walk_of(args, group);
  count_tile(walk.slots(), E, tile, block, walk, counters);
  start_ranks(E, tile, counters, [&](int e) { return tile_counts[(group + blockIdx.x) * E + e]; });
  drop_late(args, tile, walk, block, counters);
}

}  // namespace moe::cuda

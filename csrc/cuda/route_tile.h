// SPDX-License-Identifier: Apache-2.0
// How a block of route or sum_scores (K = 0) lays its tile out in shared memory: one answer for launchers and kernels.
#pragma once
#include "../dtype.h"

namespace moe::cuda {

/// Offsets in bytes; the logits stand at 0. Every part that copy_in fills has 16 bytes to spare.
struct RouteTile {
  int32_t tokens, warps;
  uint32_t keys_stride;  // elements from a warp's keys to the next warp's: E, and G group keys behind them
  uint32_t keys, weights, ids, lse, counts, pulls, sums, bytes;
};

constexpr int64_t kFewBlocks = 64;  // from here on a block takes more, so that what it does once is spread over many

/// Up to four tokens a warp; fewer where tokens are few or a row is long, and fewer warps where it is very long, so
/// that several blocks fit a processor. `sums`: with a row of sums, or of their gradients.
inline RouteTile route_tile(int64_t T, int64_t E, int64_t G, int64_t K, int64_t element, bool backward, bool sums) {
  constexpr int64_t kEnough = 64 * 1024, kStretch = 16 * 1024;  // bytes of a block, and of its logits
  const int64_t acc = element == 8 ? 8 : 4;
  RouteTile tile{};
  for (tile.warps = 8;; tile.warps /= 2) {
    int64_t rounds = 4;
    while (rounds > 1 && (rounds * tile.warps * E * element > kStretch || rounds * tile.warps * kFewBlocks > T))
      rounds /= 2;
    tile.tokens = int32_t(rounds * tile.warps);
    int64_t end = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t at = end;
      end += (bytes + 16 + 15) / 16 * 16;
      return uint32_t(at);
    };
    take(tile.tokens * E * element);
    tile.keys_stride = uint32_t(G > 1 ? E + G : E);
    tile.keys = backward ? 0 : take(tile.warps * int64_t(tile.keys_stride) * acc);
    tile.weights = take(tile.tokens * K * acc), tile.ids = take(tile.tokens * K * 4);
    tile.lse = take(tile.tokens * acc);
    tile.counts = backward ? 0 : take(E * 4);
    tile.pulls = backward ? take(tile.tokens * K * acc) : 0;
    tile.sums = sums ? take(E * acc) : 0;
    tile.bytes = uint32_t(end);
    if (end <= kEnough || tile.warps == 1) return tile;
  }
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// How the counting sort of permute cuts the slots: one answer for the launchers, the kernels and the workspace.
#pragma once
#include "../dtype.h"

namespace moe::cuda {

constexpr int64_t kTileSlots = 2048;       // of a block, where there are several
constexpr int64_t kOneBlockSlots = 16384;  // up to here one block does it all
constexpr int64_t kIndexBytes = 48 * 1024;

/// A warp counts the slots of its own stretch: warps x E counters in shared memory, then E + 1 offsets, then scratch.
struct IndexTile {
  int32_t tiles, warps;
  uint32_t offsets, scratch, bytes;  // in bytes; the counters stand at 0
};
inline IndexTile index_tile(int64_t S, int64_t E) {
  IndexTile tile{};
  tile.tiles = int32_t(S <= kOneBlockSlots ? 1 : (S + kTileSlots - 1) / kTileSlots);
  const int64_t most = tile.tiles == 1 ? 32 : 8;
  for (tile.warps = int32_t(most); tile.warps > 1 && tile.warps * E * 4 > kIndexBytes;) tile.warps /= 2;
  tile.offsets = uint32_t(tile.warps * E * 4);
  tile.scratch = uint32_t(tile.offsets + (E + 1) * 4);
  tile.bytes = tile.scratch + 34 * 4;
  return tile;
}

}  // namespace moe::cuda

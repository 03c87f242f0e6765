// SPDX-License-Identifier: Apache-2.0
// How the tokens of expert_choice are cut into blocks: one answer for the launchers and the kernels.
#pragma once
#include "../dtype.h"

namespace moe::cuda {

constexpr int kChoiceWarps = 8;
constexpr int kCutBins = 256;

/// Rows of E numbers in shared memory, one element apart from one another's banks.
struct ChoiceTile {
  int32_t tokens, stride;  // elements from a row to the next
  uint32_t bytes;
};
/// As many of `most` tokens, a power of two, as fit 48 KiB; one at least.
inline ChoiceTile choice_tile(int64_t E, int64_t acc_bytes, int32_t most) {
  ChoiceTile tile{most, int32_t(E | 1), 0};
  while (tile.tokens > 1 && tile.tokens * tile.stride * acc_bytes > 48 * 1024) tile.tokens /= 2;
  tile.bytes = uint32_t(tile.tokens * tile.stride * acc_bytes);
  return tile;
}

}  // namespace moe::cuda

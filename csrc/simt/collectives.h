// SPDX-License-Identifier: Apache-2.0
// How the lanes of a warp meet; for the collectives, and for the tile and tensor-core instructions.
#pragma once
#include <cstdint>

namespace moe::simt {

/// Waits until all lanes of `mask` have called with the same name and mask; the last runs work(arguments by lane,
/// mask). `name` is compared by address: one literal an instruction.
void meet(const char* name, uint32_t mask, void* argument, void (*work)(void** arguments, uint32_t mask),
          const void* site);

template <class F> void for_lanes(uint32_t mask, F f) {
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) f(lane);
  }
}

}  // namespace moe::simt

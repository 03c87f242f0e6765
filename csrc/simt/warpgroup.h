// SPDX-License-Identifier: Apache-2.0
// How the 128 threads of a warpgroup meet.
#pragma once
#include "machine.h"

namespace moe::simt {

/// Waits until all threads of the warpgroup have called with the same name; the last runs work(warpgroup's number,
/// arguments by thread). `name` is compared by address.
void meet_warpgroup(const char* name, void* argument, void (*work)(uint32_t warpgroup, void** arguments),
                    const void* site);

}  // namespace moe::simt

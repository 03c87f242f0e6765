// SPDX-License-Identifier: Apache-2.0
// Who a thread is, and what it says to the grid as a whole.
#include "report.h"

namespace moe::simt {

uint3 thread_index() { return running->index; }
uint3 block_index() { return running->block->index; }
dim3 block_size() { return machine.config.block; }
dim3 grid_size() { return machine.config.grid; }

void griddepcontrol_wait() {
  running->grid_waited = true;
  machine.anyone_grid_waited = true;
}

// Only the time of the next kernel's start depends on it, and that is taken to be as early as can be.
void griddepcontrol_launch_dependents() {}

void nanosleep() { yield(); }

void trap(const char* what) { fault("trap", what, MOE_SIMT_SITE); }

}  // namespace moe::simt

// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

namespace moe::faults {

static int chosen = -1;

int on(int number) { return number == chosen; }
void plant(int number) { chosen = number; }
int planted() { return chosen; }

}  // namespace moe::faults

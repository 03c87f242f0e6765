// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

namespace moe::faults {

static int planted = -1;

int on(int number) { return number == planted; }
void plant(int number) { planted = number; }

}  // namespace moe::faults

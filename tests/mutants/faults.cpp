// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

namespace moe::faults {

static int chosen = -1;
static std::string current_case;
static int comparisons = 0;

int on(int number) { return number == chosen; }
void plant(int number) { chosen = number; }
int planted() { return chosen; }

void begin_case(const char* name) {
  current_case = name;
  comparisons = 0;
}
std::string next_comparison() { return current_case + " " + std::to_string(comparisons++); }

}  // namespace moe::faults

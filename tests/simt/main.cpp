// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

int main(int count, char** names) { return moe::test::run_cases(count, names) != 0; }

// SPDX-License-Identifier: Apache-2.0
// What this processor can do at best, measured by loops that do nothing else: the lines of a roofline.
#pragma once
#include <cstdint>

namespace moe::cpu {

/// Multiply-adds on registers alone at the level in use, float32 or float64: floating-point operations a second,
/// two for each, all threads together.
double multiply_add_rate(int threads, bool float64, int64_t steps);

/// Reading `bytes` from memory, each thread its own part through 16 streams: bytes a second.
double read_rate(int threads, const void* data, int64_t bytes);

}  // namespace moe::cpu

// SPDX-License-Identifier: Apache-2.0
// The instruction set levels that the CPU kernels are compiled for, and the one that this process uses.
#pragma once

namespace moe::cpu {

/// Each level includes those before it. avx2: AVX2, FMA, F16C. avx512: F, BW, VL, DQ.
enum class Isa : int { portable, avx2, avx512 };

/// The highest level that this processor and its operating system have.
Isa best_isa();

/// best_isa(), lowered (never raised) by the variable MOE_KERNELS_ISA, which is read once.
/// Errors: std::runtime_error for a word that names no level, at every call.
Isa active_isa();

/// "portable", "avx2" or "avx512".
const char* isa_name(Isa isa);

}  // namespace moe::cpu

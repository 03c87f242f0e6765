// SPDX-License-Identifier: Apache-2.0
// What tensor-core kernels share: tiles of 16-byte chunks in shared memory, and the product of a warp by type.
#pragma once
#include "../dtype.h"
#include "ptx.cuh"

namespace moe::cuda {

constexpr int kChunk = 16;  // bytes of one cp.async, and of a row of ldmatrix

/// Offset in bytes of a chunk of a tile whose rows are Chunks long, a multiple of 8. The chunk is XORed with its row:
/// eight rows of one column, as ldmatrix reads them, and eight chunks of one row, as cp.async writes them, lie in
/// different banks. By XOR, the chunks c, c ^ 2, c ^ 4, c ^ 6 of a row are the bits 5 and 6 of an address away.
template <int Chunks> MOE_DEVICE uint32_t swizzled(int row, int chunk) {
  static_assert(Chunks % 8 == 0, "rows of 128 bytes or more");
  return uint32_t(row * Chunks + (chunk ^ (row & 7))) * kChunk;
}

/// d += a b, 16x8x16, of bf16 or f16.
template <class T> MOE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (T::kBrain) mma_m16n8k16_bf16(d, a, b);
  else mma_m16n8k16_f16(d, a, b);
}

/// To the nearest tf32, ties away from zero, as cvt.rna.tf32 but in two instructions: half a unit of the tenth bit is
/// added, the tensor core cuts off what is behind that bit. NaN and infinity stay what they are.
MOE_DEVICE uint32_t tf32_of(uint32_t bits) {
  const float power = __uint_as_float(bits & 0xff800000u);  // of two, the largest in the number; or infinity
  return __float_as_uint(__fmaf_rn(power, 0x1p-11f, __uint_as_float(bits)));
}

}  // namespace moe::cuda

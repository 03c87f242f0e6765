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

/// Sixteen rows of sums to shared memory, `stride` bytes apart, as the products hold them: product n has columns 8n ..
template <int kProducts>
MOE_DEVICE void stage_pairs(uint32_t to, uint32_t stride, int lane, const float (&sum)[kProducts][4]) {
  to += lane / 4 * stride + lane % 4 * 8;
#pragma unroll
  for (int n = 0; n < kProducts; ++n) {
    st_shared_v2(to + n * 32, make_uint2(__float_as_uint(sum[n][0]), __float_as_uint(sum[n][1])));
    st_shared_v2(to + 8 * stride + n * 32, make_uint2(__float_as_uint(sum[n][2]), __float_as_uint(sum[n][3])));
  }
}

/// The same where a lane read four neighbouring columns of f32 at once and handed them to four products: product
/// 4g + j has every fourth of 32 columns, from 32g + j on. Rows are 8 banks apart, with any multiple of 32.
template <int kProducts>
MOE_DEVICE void stage_fours(uint32_t to, uint32_t stride, int lane, const float (&sum)[kProducts][4]) {
  static_assert(kProducts % 4 == 0);
  const bool turned = lane / 4 % 2;  // the second of its columns first: so eight lanes meet 32 banks
#pragma unroll
  for (int v = 0; v < kProducts; ++v) {
    const int first = v / 4 * 4, half = v / 2 % 2, one = 2 * half + v % 2, other = 2 * half + 1 - v % 2;
    uint32_t four[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) four[j] = __float_as_uint(turned ? sum[first + j][other] : sum[first + j][one]);
    const int column = first * 8 + (lane % 4 * 2 + (turned ? 1 - v % 2 : v % 2)) * 4;
    st_shared_v4(to + (lane / 4 + 8 * half) * stride + column * 4, make_uint4(four[0], four[1], four[2], four[3]));
  }
}

/// To tf32 in one instruction. The tensor core cuts off what is behind the tenth bit of a mantissa m in [1, 2), a loss
/// of up to u = 2^-10 / m of the number, of u / 2 on average. So the number is first made larger by the mean of that,
/// 0.72 * 2^-11 where mantissas are spread as their logarithms are: no bias on average, at most 0.64 * 2^-10 off (to
/// the nearest: 0.5 * 2^-10), and a number that tf32 holds stays what it is, for 0.72 * 2^-11 m is less than the tenth
/// bit. NaN and infinity stay, too.
MOE_DEVICE uint32_t tf32_of(uint32_t bits) {
  return __float_as_uint(__fmul_rn(__uint_as_float(bits), 1.f + 0.72f * 0x1p-11f));
}

}  // namespace moe::cuda

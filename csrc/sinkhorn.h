// SPDX-License-Identifier: Apache-2.0
// The arithmetic of sinkhorn, the same to the last bit in every kernel, whatever the threads: which sums there are, in
// which order they run, and what becomes of them. Products are fused into sums by hand (score.h).
//   row     kRowSums sums, the j-th of the products j, j + kRowSums, ..; added up by halves
//   column  over the kTileTokens tokens of a tile one after another; then kTileSums sums over the tiles, the j-th of
//   the
//           tiles j, j + kTileSums, ..; added up by halves
//   move    of the column factors: as a row, of the differences
#pragma once
#include "score.h"

namespace moe::sinkhorn {

constexpr int kRowSums = 32, kTileTokens = 64, kTileSums = 8;

MOE_BOTH float fused(float a, float b, float c) { return moe::detail::fused(a, b, c); }
MOE_BOTH double fused(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

/// Adds up sums[0 .. count) by halves, count a power of two; used up.
template <class A> MOE_BOTH A by_halves(A* sums, int count) {
  for (int half = count / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

/// What is taken off every logit before exp: the largest of all in half precision, or where exp might overflow.
template <class A> MOE_BOTH A shift_of(A top, bool half_precision) {
  return (half_precision && top > A(-INFINITY)) || top > A(sizeof(A) == 8 ? 600 : 60) ? top : A(0);
}

/// 1 / count / (sum + 1e-8), the factor of a row of count, or of a column of count.
template <class A> MOE_BOTH A factor_of(A sum, int64_t count) { return A(1. / double(count)) / (sum + A(1e-8)); }

}  // namespace moe::sinkhorn

// SPDX-License-Identifier: Apache-2.0
// The arithmetic that decides between experts, the same to the last bit in every kernel, so that ids are equal too.
// No compiler can fuse a product and a sum here: they are fused by hand, or a division stands between them.
// In float64 exp is the library's, whose last bit may differ between libraries.
#pragma once
#include "dtype.h"

#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

namespace moe {

namespace detail {
MOE_BOTH float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
}  // namespace detail

/// exp of the vectors in cpu/math_impl.h, one number at a time: 2^n * p(r), Taylor to r^7; 0 below -87.3.
MOE_BOTH float exp_of(float x) {
  if (x < -87.33654f) return 0;
  if (x > 88.72283f) return INFINITY;
  const float shifted = detail::fused(x, 1.44269504f, 12582912.f), n = shifted - 12582912.f;
  const float r = detail::fused(-n, -2.12194440e-4f, detail::fused(-n, 0.693359375f, x));
  float p = 1.f / 5040;
  p = detail::fused(p, r, 1.f / 720);
  p = detail::fused(p, r, 1.f / 120);
  p = detail::fused(p, r, 1.f / 24);
  p = detail::fused(p, r, 1.f / 6);
  p = detail::fused(p, r, .5f);
  p = detail::fused(p, r, 1.f);
  p = detail::fused(p, r, 1.f);
  const int32_t e = int32_t(detail::bits_of(shifted)) - 0x4b400000, half = e >> 1;
  return p * detail::float_of(uint32_t(half + 127) << 23) * detail::float_of(uint32_t(e - half + 127) << 23);
}
MOE_BOTH double exp_of(double x) { return ::exp(x); }

template <class A> MOE_BOTH A sigmoid_of(A l) { return 1 / (1 + exp_of(-l)); }

/// log(1 + y) for y in [0, 1] = 2 atanh(y / (2 + y)), by its continued fraction.
template <class A> MOE_BOTH A log1p_of(A y) {
  const A s = y / (2 + y), s2 = s * s;
  constexpr int terms = sizeof(A) == 8 ? 18 : 8;
  A d = 2 * terms + 1;
  for (int k = terms; k > 0; --k) d = (2 * k - 1) - k * k * s2 / d;
  return 2 * s / d;
}

/// What sqrtsoftplus_of wants as `e` is the exp of this.
template <class A> MOE_BOTH A sqrtsoftplus_exponent(A l) { return l < -40 ? l / 2 : l < 0 ? l : -l; }
/// sqrt(log(1 + exp(l))); below -40 that is exp(l / 2) to the last bit.
template <class A> MOE_BOTH A sqrtsoftplus_of(A l, A e) {
  if (l < -40) return e;
  const A tail = log1p_of(e);
  return sqrt(l > 0 ? l + tail : tail);
}

/// cap * tanh(l / cap), where `e` is the exp of softcap_exponent(l, cap).
template <class A> MOE_BOTH A softcap_exponent(A l, A cap) {
  const A z = l / cap;
  return z < 0 ? 2 * z : -2 * z;
}
template <class A> MOE_BOTH A softcap_of(A l, A cap, A e) {
  const A z = l / cap, size = z < 0 ? -z : z;
  A tanh;
  if (size < A(.6)) {  // continued fraction: the quotient below would cancel
    constexpr int terms = sizeof(A) == 8 ? 10 : 6;
    A d = 2 * terms + 1;
    for (int k = terms; k > 0; --k) d = (2 * k - 1) + z * z / d;
    return cap * (z / d);
  }
  tanh = (1 - e) / (1 + e);
  return cap * (z < 0 ? -tanh : tanh);
}

/// A sum of exponentials e in [0, 1] that no order of summation changes: whole multiples of 2^-40, in integers.
MOE_BOTH int64_t exact_part(float e) { return int64_t(e * 0x1p40f); }
MOE_BOTH float exact_sum(int64_t sum) { return float(sum) * 0x1p-40f; }

}  // namespace moe

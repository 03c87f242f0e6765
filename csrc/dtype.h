// SPDX-License-Identifier: Apache-2.0
// Element types of tensors, their accumulation type, and the one visitor that turns a run-time dtype into a C++ type.
#pragma once
#if defined(__CUDACC_RTC__)
#include "cuda/device.h"
#else
#include <cstdint>
#include <cstring>
#endif

#if defined(__CUDACC__)
#define MOE_BOTH __host__ __device__ inline  // for host and device
#else
#define MOE_BOTH inline
#endif

namespace moe {

enum class DType : int32_t { f64, f32, bf16, f16 };

inline int64_t dtype_bytes(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

namespace detail {
MOE_BOTH uint32_t bits_of(float v) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(v);
#else
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
#endif
}
MOE_BOTH float float_of(uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float v;
  std::memcpy(&v, &u, 4);
  return v;
#endif
}
}  // namespace detail

/// bfloat16: the upper half of a float; rounds to nearest, ties to even.
struct bf16 {
  static constexpr bool kBrain = true;
  uint16_t bits;
  bf16() = default;
  bf16(float v) {
    const uint32_t u = detail::bits_of(v);
    bits = v != v ? uint16_t(0x7fc0) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  operator float() const { return detail::float_of(uint32_t(bits) << 16); }
};

/// IEEE half precision, in integer arithmetic so that any compiler and processor has it; ties to even.
struct f16 {
  static constexpr bool kBrain = false;
  uint16_t bits;
  f16() = default;
  f16(float v) {
    const uint32_t u = detail::bits_of(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      bits = uint16_t(sign | 0x7e00);  // NaN
    } else if (magnitude >= 0x477ff000) {
      bits = uint16_t(sign | 0x7c00);  // rounds to infinity
    } else if (magnitude < 0x38800000) {
      // Subnormal: adding 0.5 puts the last half-precision bit at the last bit of the float, which rounds it.
      const float shifted = detail::float_of(magnitude) + 0.5f;
      bits = uint16_t(sign | (detail::bits_of(shifted) - 0x3f000000));
    } else {
      const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
      bits = uint16_t(sign | ((rounded - 0x38000000) >> 13));
    }
  }
  operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return detail::float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) return detail::float_of(sign | detail::bits_of(float(magnitude) * 0x1p-24f));
    return detail::float_of(sign | ((magnitude << 13) + 0x38000000));
  }
};

/// The type of sums: float64 for float64, else float32.
template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using acc_t = typename AccOf<T>::type;

/// Calls f with a value of the element type of `t`.
template <class F> void visit_dtype(DType t, F&& f) {
  switch (t) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16(0.f));
    case DType::f16: return f(f16(0.f));
  }
}

}  // namespace moe

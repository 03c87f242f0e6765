// SPDX-License-Identifier: Apache-2.0
// Elements in a kernel: read and widened to acc, narrowed and written; alone, or 16 bytes of them at once.
#pragma once
#include "../dtype.h"
#include "ptx.cuh"

namespace moe::cuda {

MOE_DEVICE double widen(double v) { return v; }
MOE_DEVICE float widen(float v) { return v; }
MOE_DEVICE float widen(bf16 v) { return cvt_f32_bf16(v.bits); }
MOE_DEVICE float widen(f16 v) { return cvt_f32_f16(v.bits); }

template <class T> MOE_DEVICE T narrow(acc_t<T> v) {
  if constexpr (sizeof(T) >= 4) {
    return v;
  } else {
    T narrowed;
    narrowed.bits = uint16_t(T::kBrain ? cvt_rn_bf16x2_f32(0.f, v) : cvt_rn_f16x2_f32(0.f, v));
    return narrowed;
  }
}

template <class T> constexpr int kVector = 16 / int(sizeof(T));  // elements in 16 bytes

/// N elements in acc: one, or the 16 bytes that one request moves.
template <class T, int N> struct Elements { acc_t<T> v[N]; };

template <class T, int N> MOE_DEVICE Elements<T, N> unpack(uint4 raw) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
  Elements<T, N> out;
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(T) == 8) {
      out.v[i] = __longlong_as_double((long long)(uint64_t(word[2 * i + 1]) << 32 | word[2 * i]));
    } else if constexpr (sizeof(T) == 4) {
      out.v[i] = __uint_as_float(word[i]);
    } else {
      T half;
      half.bits = uint16_t(word[i / 2] >> (i % 2 * 16));
      out.v[i] = widen(half);
    }
  }
  return out;
}
template <class T, int N> MOE_DEVICE uint4 pack(const Elements<T, N>& in) {
  uint32_t word[4];
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < 2; ++i) {
      const uint64_t bits = uint64_t(__double_as_longlong(in.v[i]));
      word[2 * i] = uint32_t(bits), word[2 * i + 1] = uint32_t(bits >> 32);
    }
  } else if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; ++i) word[i] = __float_as_uint(in.v[i]);
  } else {
    for (int i = 0; i < 4; ++i)
      word[i] =
          T::kBrain ? cvt_rn_bf16x2_f32(in.v[2 * i + 1], in.v[2 * i]) : cvt_rn_f16x2_f32(in.v[2 * i + 1], in.v[2 * i]);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

/// Elements at p, which this kernel does not write.
template <int N, class T> MOE_DEVICE Elements<T, N> load(const T* p) {
  if constexpr (N == 1) {
    return {{widen(*p)}};
  } else {
    return unpack<T, N>(__ldg(reinterpret_cast<const uint4*>(p)));
  }
}
/// Elements at p, which this thread may have written.
template <int N, class T> MOE_DEVICE Elements<T, N> load_again(const T* p) {
  if constexpr (N == 1) return {{widen(*p)}};
  else return unpack<T, N>(__ldcg(reinterpret_cast<const uint4*>(p)));
}
template <class T, int N> MOE_DEVICE void store(T* p, const Elements<T, N>& e) {
  if constexpr (N == 1) *p = narrow<T>(e.v[0]);
  else __stcg(reinterpret_cast<uint4*>(p), pack(e));
}

}  // namespace moe::cuda

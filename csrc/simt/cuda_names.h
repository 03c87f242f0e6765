// SPDX-License-Identifier: Apache-2.0
// The CUDA language for g++: vector types, built-in variables and device functions under their CUDA names. Only what
// a kernel here uses; a missing name is added in one line.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt.h"

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) alignas(n)

#define threadIdx (::moe::simt::thread_index())
#define blockIdx (::moe::simt::block_index())
#define blockDim (::moe::simt::block_size())
#define gridDim (::moe::simt::grid_size())
constexpr int warpSize = 32;

// ---------------------------------------------------------------- vector types
#define MOE_SIMT_VECTORS(T, name)                                                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
MOE_SIMT_VECTORS(int8_t, char)
MOE_SIMT_VECTORS(uint8_t, uchar)
MOE_SIMT_VECTORS(int16_t, short)
MOE_SIMT_VECTORS(uint16_t, ushort)
MOE_SIMT_VECTORS(int32_t, int)
MOE_SIMT_VECTORS(uint32_t, uint)
MOE_SIMT_VECTORS(float, float)
#undef MOE_SIMT_VECTORS
struct alignas(16) double2 { double x, y; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
inline double2 make_double2(double x, double y) { return {x, y}; }
inline longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

// ---------------------------------------------------------------- loads and stores of one request
#define MOE_SIMT_INLINE inline __attribute__((always_inline))
#define MOE_SIMT_LOAD(name, read_only)                    \
  template <class T> MOE_SIMT_INLINE T name(const T* p) { \
    T v;                                                  \
    ::moe::simt::ld_global(&v, p, sizeof(T), read_only);  \
    return v;                                             \
  }
MOE_SIMT_LOAD(__ldg, true)  // ld.global.nc: the kernel must not write what it reads so
MOE_SIMT_LOAD(__ldca, false)
MOE_SIMT_LOAD(__ldcg, false)
MOE_SIMT_LOAD(__ldcs, false)
MOE_SIMT_LOAD(__ldlu, false)
#undef MOE_SIMT_LOAD
#define MOE_SIMT_STORE(name)                                             \
  template <class T, class V> MOE_SIMT_INLINE void name(T* p, V value) { \
    const T v = value;                                                   \
    ::moe::simt::st_global(p, &v, sizeof(T));                            \
  }
MOE_SIMT_STORE(__stwb)
MOE_SIMT_STORE(__stcg)
MOE_SIMT_STORE(__stcs)
MOE_SIMT_STORE(__stwt)
#undef MOE_SIMT_STORE

// ---------------------------------------------------------------- barriers and fences
MOE_SIMT_INLINE void __syncthreads() { ::moe::simt::block_barrier(); }
MOE_SIMT_INLINE int __syncthreads_count(int p) {
  return ::moe::simt::block_barrier_reduce(p, ::moe::simt::Reduce::popc);
}
MOE_SIMT_INLINE int __syncthreads_and(int p) { return ::moe::simt::block_barrier_reduce(p, ::moe::simt::Reduce::all); }
MOE_SIMT_INLINE int __syncthreads_or(int p) { return ::moe::simt::block_barrier_reduce(p, ::moe::simt::Reduce::any); }
MOE_SIMT_INLINE void __syncwarp(uint32_t mask = 0xffffffffu) { ::moe::simt::warp_barrier(mask); }
MOE_SIMT_INLINE void __threadfence_block() { ::moe::simt::fence(::moe::simt::Scope::block); }
MOE_SIMT_INLINE void __threadfence() { ::moe::simt::fence(::moe::simt::Scope::device); }
MOE_SIMT_INLINE void __nanosleep(uint32_t) { ::moe::simt::nanosleep(); }
MOE_SIMT_INLINE void __trap() { ::moe::simt::trap("__trap"); }

// ---------------------------------------------------------------- warp collectives
namespace moe::simt {
template <class T> MOE_SIMT_INLINE T shuffle_as(uint32_t mask, T v, Shuffle kind, uint32_t operand, uint32_t width) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "shuffles move 4 or 8 byte numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  bits = shuffle(mask, bits, kind, operand, width);
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
template <class T> MOE_SIMT_INLINE uint64_t bits_of(T v) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}
}  // namespace moe::simt
template <class T> MOE_SIMT_INLINE T __shfl_sync(uint32_t mask, T v, int lane, int width = 32) {
  return ::moe::simt::shuffle_as(mask, v, ::moe::simt::Shuffle::index, uint32_t(lane), uint32_t(width));
}
template <class T> MOE_SIMT_INLINE T __shfl_up_sync(uint32_t mask, T v, unsigned delta, int width = 32) {
  return ::moe::simt::shuffle_as(mask, v, ::moe::simt::Shuffle::up, delta, uint32_t(width));
}
template <class T> MOE_SIMT_INLINE T __shfl_down_sync(uint32_t mask, T v, unsigned delta, int width = 32) {
  return ::moe::simt::shuffle_as(mask, v, ::moe::simt::Shuffle::down, delta, uint32_t(width));
}
template <class T> MOE_SIMT_INLINE T __shfl_xor_sync(uint32_t mask, T v, int lanes, int width = 32) {
  return ::moe::simt::shuffle_as(mask, v, ::moe::simt::Shuffle::exclusive_or, uint32_t(lanes), uint32_t(width));
}
MOE_SIMT_INLINE uint32_t __ballot_sync(uint32_t mask, int p) {
  return ::moe::simt::vote(mask, p, ::moe::simt::Vote::ballot);
}
MOE_SIMT_INLINE int __all_sync(uint32_t mask, int p) { return int(::moe::simt::vote(mask, p, ::moe::simt::Vote::all)); }
MOE_SIMT_INLINE int __any_sync(uint32_t mask, int p) { return int(::moe::simt::vote(mask, p, ::moe::simt::Vote::any)); }
template <class T> MOE_SIMT_INLINE uint32_t __match_any_sync(uint32_t mask, T v) {
  return ::moe::simt::match_any(mask, ::moe::simt::bits_of(v));
}
template <class T> MOE_SIMT_INLINE uint32_t __match_all_sync(uint32_t mask, T v, int* all_equal) {
  return ::moe::simt::match_all(mask, ::moe::simt::bits_of(v), all_equal);
}
#define MOE_SIMT_REDUX(name, T, kind)                                          \
  MOE_SIMT_INLINE T name(uint32_t mask, T v) {                                 \
    return T(::moe::simt::redux(mask, uint32_t(v), ::moe::simt::Redux::kind)); \
  }
MOE_SIMT_REDUX(__reduce_add_sync, uint32_t, add)
MOE_SIMT_REDUX(__reduce_add_sync, int, add)
MOE_SIMT_REDUX(__reduce_min_sync, uint32_t, min_unsigned)
MOE_SIMT_REDUX(__reduce_max_sync, uint32_t, max_unsigned)
MOE_SIMT_REDUX(__reduce_min_sync, int, min_signed)
MOE_SIMT_REDUX(__reduce_max_sync, int, max_signed)
MOE_SIMT_REDUX(__reduce_and_sync, uint32_t, bit_and)
MOE_SIMT_REDUX(__reduce_or_sync, uint32_t, bit_or)
MOE_SIMT_REDUX(__reduce_xor_sync, uint32_t, bit_xor)
#undef MOE_SIMT_REDUX

// ---------------------------------------------------------------- atomics: relaxed, at device scope or at block scope
#define MOE_SIMT_ATOMIC(name, T, op)                                                                               \
  MOE_SIMT_INLINE T name(T* p, T v) {                                                                              \
    return ::moe::simt::atomic<T>(p, v, static_cast<T>(0), ::moe::simt::AtomicOp::op, ::moe::simt::Scope::device); \
  }                                                                                                                \
  MOE_SIMT_INLINE T name##_block(T* p, T v) {                                                                      \
    return ::moe::simt::atomic<T>(p, v, static_cast<T>(0), ::moe::simt::AtomicOp::op, ::moe::simt::Scope::block);  \
  }
#define MOE_SIMT_ATOMIC_CAS(T)                                                                            \
  MOE_SIMT_INLINE T atomicCAS(T* p, T compare, T v) {                                                     \
    return ::moe::simt::atomic<T>(p, v, compare, ::moe::simt::AtomicOp::cas, ::moe::simt::Scope::device); \
  }
#define MOE_SIMT_ATOMICS_INTEGER(T)      \
  MOE_SIMT_ATOMIC(atomicAdd, T, add)     \
  MOE_SIMT_ATOMIC(atomicExch, T, exch)   \
  MOE_SIMT_ATOMIC(atomicMin, T, min)     \
  MOE_SIMT_ATOMIC(atomicMax, T, max)     \
  MOE_SIMT_ATOMIC(atomicAnd, T, bit_and) \
  MOE_SIMT_ATOMIC(atomicOr, T, bit_or)   \
  MOE_SIMT_ATOMIC(atomicXor, T, bit_xor) \
  MOE_SIMT_ATOMIC_CAS(T)
MOE_SIMT_ATOMICS_INTEGER(int)
MOE_SIMT_ATOMICS_INTEGER(unsigned)
MOE_SIMT_ATOMICS_INTEGER(unsigned long long)
MOE_SIMT_ATOMIC(atomicAdd, float, add)
MOE_SIMT_ATOMIC(atomicAdd, double, add)
MOE_SIMT_ATOMIC(atomicExch, float, exch)
#undef MOE_SIMT_ATOMICS_INTEGER
#undef MOE_SIMT_ATOMIC_CAS
#undef MOE_SIMT_ATOMIC

// ---------------------------------------------------------------- arithmetic
template <class To, class From> MOE_SIMT_INLINE To moe_simt_bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof to);
  return to;
}
MOE_SIMT_INLINE uint32_t __float_as_uint(float v) { return moe_simt_bit_cast<uint32_t>(v); }
MOE_SIMT_INLINE int __float_as_int(float v) { return moe_simt_bit_cast<int>(v); }
MOE_SIMT_INLINE float __uint_as_float(uint32_t v) { return moe_simt_bit_cast<float>(v); }
MOE_SIMT_INLINE float __int_as_float(int v) { return moe_simt_bit_cast<float>(v); }
MOE_SIMT_INLINE long long __double_as_longlong(double v) { return moe_simt_bit_cast<long long>(v); }
MOE_SIMT_INLINE double __longlong_as_double(long long v) { return moe_simt_bit_cast<double>(v); }
MOE_SIMT_INLINE int __popc(uint32_t v) { return __builtin_popcount(v); }
MOE_SIMT_INLINE int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
MOE_SIMT_INLINE int __ffs(int v) { return __builtin_ffs(v); }
MOE_SIMT_INLINE int __ffsll(long long v) { return __builtin_ffsll(v); }
MOE_SIMT_INLINE int __clz(int v) { return v == 0 ? 32 : __builtin_clz(uint32_t(v)); }
MOE_SIMT_INLINE int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(uint64_t(v)); }
MOE_SIMT_INLINE uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
MOE_SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
MOE_SIMT_INLINE float __fsub_rn(float a, float b) { return a - b; }
MOE_SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
MOE_SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
MOE_SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
MOE_SIMT_INLINE float __fsqrt_rn(float a) { return std::sqrt(a); }
MOE_SIMT_INLINE double __dadd_rn(double a, double b) { return a + b; }
MOE_SIMT_INLINE double __dmul_rn(double a, double b) { return a * b; }
MOE_SIMT_INLINE double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
MOE_SIMT_INLINE float rsqrtf(float a) { return 1.f / std::sqrt(a); }
MOE_SIMT_INLINE float __expf(float a) { return std::exp(a); }
MOE_SIMT_INLINE float __logf(float a) { return std::log(a); }
MOE_SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
#define MOE_SIMT_MIN_MAX(T)                                 \
  MOE_SIMT_INLINE T min(T a, T b) { return b < a ? b : a; } \
  MOE_SIMT_INLINE T max(T a, T b) { return a < b ? b : a; }
MOE_SIMT_MIN_MAX(int)
MOE_SIMT_MIN_MAX(unsigned)
MOE_SIMT_MIN_MAX(long)
MOE_SIMT_MIN_MAX(long long)
MOE_SIMT_MIN_MAX(unsigned long)
MOE_SIMT_MIN_MAX(unsigned long long)
#undef MOE_SIMT_MIN_MAX
MOE_SIMT_INLINE float min(float a, float b) { return std::fmin(a, b); }
MOE_SIMT_INLINE float max(float a, float b) { return std::fmax(a, b); }
MOE_SIMT_INLINE double min(double a, double b) { return std::fmin(a, b); }
MOE_SIMT_INLINE double max(double a, double b) { return std::fmax(a, b); }
#undef MOE_SIMT_INLINE

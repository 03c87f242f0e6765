// SPDX-License-Identifier: Apache-2.0
// Which rows an expert has, read on the device and never trusted, and which token a row is of.
#pragma once
#include "../dtype.h"
#include "warp.cuh"

namespace moe::cuda {

/// n / d of numbers below 2^31, by a multiplication.
struct Quotient {
  uint32_t multiplier, shift;
  MOE_DEVICE uint32_t operator()(int32_t n) const { return __umulhi(uint32_t(n) * 2, multiplier) >> shift; }
};

MOE_BOTH Quotient quotient_by(uint64_t d) {
  uint32_t log = 0;
  while (uint64_t(1) << log < d) ++log;
  return {uint32_t((uint64_t(1) << (31 + log)) / d + 1), log};
}

/// The rows of expert e, clamped to [0, S].
struct RowRange { int32_t begin, end; };
MOE_DEVICE RowRange rows_of(const int32_t* ends, int64_t e, int64_t S) {
  const int32_t begin = e > 0 ? min(max(ends[e - 1], 0), int32_t(S)) : 0;
  return {begin, max(begin, min(ends[e], int32_t(S)))};
}

/// An expert that has rows.
struct ActiveExpert {
  int32_t expert;  // -1: none
  int32_t begin, end;
};
/// The wanted-th of them, counted from 0. All lanes of a warp take part and get the same.
MOE_DEVICE ActiveExpert active_expert(const int32_t* ends, int64_t E, int64_t S, int wanted) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t base = 0; base < E; base += kWarp) {
    const RowRange rows = base + lane < E ? rows_of(ends, base + lane, S) : RowRange{0, 0};
    uint32_t active = __ballot_sync(kFullWarp, rows.begin < rows.end);
    if (wanted >= __popc(active)) {
      wanted -= __popc(active);
      continue;
    }
    for (; wanted > 0; --wanted) active &= active - 1;
    const int owner = __ffs(int(active)) - 1;
    return {int32_t(base) + owner, __shfl_sync(kFullWarp, rows.begin, owner), __shfl_sync(kFullWarp, rows.end, owner)};
  }
  return {-1, 0, 0};
}
/// All of them in ascending order, into list. The lanes of one warp take part; returns how many there are.
MOE_DEVICE int active_experts(const int32_t* ends, int64_t E, int64_t S, ActiveExpert* list) {
  const int lane = threadIdx.x % kWarp;
  int count = 0;
  for (int64_t base = 0; base < E; base += kWarp) {
    const RowRange rows = base + lane < E ? rows_of(ends, base + lane, S) : RowRange{0, 0};
    const uint32_t active = __ballot_sync(kFullWarp, rows.begin < rows.end);
    if (rows.begin < rows.end)
      list[count + __popc(active & ((1u << lane) - 1))] = {int32_t(base) + lane, rows.begin, rows.end};
    count += __popc(active);
  }
  return count;
}

/// A block clears rows until none is left; 16 bytes a thread where the rows begin and end so.
template <class V> MOE_KERNEL __launch_bounds__(256)
    zero_rows_kernel(const int32_t* ends, int64_t E, int64_t S, V* out, int64_t vectors) {
  const int64_t used = E ? max(ends[E - 1], 0) : 0;
  for (int64_t r = used + int64_t(blockIdx.x); r < S; r += gridDim.x)
    for (int64_t i = threadIdx.x; i < vectors; i += blockDim.x) out[r * vectors + i] = V{};
}

}  // namespace moe::cuda

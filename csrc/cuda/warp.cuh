// SPDX-License-Identifier: Apache-2.0
// Reductions over the 32 lanes of a warp, in one fixed order: every lane gets the result. All lanes take part.
#pragma once
#include "device.h"

namespace moe::cuda {

template <class V, class F> MOE_DEVICE V warp_reduce(V v, F combine) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) v = combine(v, __shfl_xor_sync(kFullWarp, v, lanes));
  return v;
}
template <class V> MOE_DEVICE V warp_sum(V v) {
  return warp_reduce(v, [](V a, V b) { return a + b; });
}
template <class V> MOE_DEVICE V warp_max(V v) {
  return warp_reduce(v, [](V a, V b) { return a < b ? b : a; });
}
MOE_DEVICE uint32_t warp_max(uint32_t v) { return __reduce_max_sync(kFullWarp, v); }
MOE_DEVICE uint64_t warp_max(uint64_t v) {
  const uint32_t high = __reduce_max_sync(kFullWarp, uint32_t(v >> 32));
  const uint32_t low = __reduce_max_sync(kFullWarp, uint32_t(v >> 32) == high ? uint32_t(v) : 0u);
  return uint64_t(high) << 32 | low;
}

/// Sum of `v` over the lanes before this one.
MOE_DEVICE int32_t warp_prefix(int32_t v, int lane) {
  int32_t sum = v;
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, sum, delta);
    if (lane >= delta) sum += before;
  }
  return sum - v;
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// unpermute on a GPU: a gather. A lane owns 16 bytes (or one element) of a token's columns and adds the token's rows in
// slot order, four of them in flight. No atomics on values, so the same bits in every run.
#pragma once
#include "../moe.h"
#include "element.cuh"
#include "warp.cuh"

namespace moe::cuda {

constexpr int kRowsInFlight = 4;

/// y[t] = sum of w * rows[slot_to_row[slot]] over the slots of t. N elements a lane; blockIdx.y counts parts of a row.
template <class T, int N> MOE_KERNEL __launch_bounds__(256) unpermute_kernel(UnpermuteArgs args) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t t = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp;
  if (t >= args.T) return;
  const A* weights = static_cast<const A*>(args.topk_weights);
  for (int64_t base = int64_t(blockIdx.y) * kWarp * N; base < args.H; base += int64_t(gridDim.y) * kWarp * N) {
    const int64_t h = base + lane * N;
    const bool inside = h < args.H;
    Elements<T, N> sum{};
    for (int64_t k = 0; k < args.K; k += kRowsInFlight) {
      Elements<T, N> row[kRowsInFlight];
      A weight[kRowsInFlight];
      bool there[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int64_t slot = t * args.K + k + i;
        const int64_t r = k + i < args.K ? args.slot_to_row[slot] : -1;
        there[i] = r >= 0 && r < args.P && inside;
        weight[i] = there[i] && weights ? weights[slot] : A(1);
        if (there[i]) row[i] = load<N>(static_cast<const T*>(args.rows) + r * args.rows_stride + h);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (!there[i]) continue;
#pragma unroll
        for (int n = 0; n < N; ++n) sum.v[n] += weight[i] * row[i].v[n];
      }
    }
    if (inside) store(static_cast<T*>(args.y) + t * args.H + h, sum);
  }
}

/// owners [2][P]: the first and the last slot that name a row. The gradients of the weights of absent slots are 0.
MOE_KERNEL __launch_bounds__(256) unpermute_clear_kernel(int64_t P, int32_t* owners) {
  const int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r < P) owners[r] = 0x7fffffff, owners[P + r] = -1;
}
template <class A>
MOE_KERNEL __launch_bounds__(256) unpermute_owners_kernel(UnpermuteBackwardArgs args, int32_t* owners) {
  const int64_t slot = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= args.T * args.K) return;
  const int64_t r = args.slot_to_row[slot];
  if (r >= 0 && r < args.P) {
    atomicMin(&owners[r], int32_t(slot));
    atomicMax(&owners[args.P + r], int32_t(slot));
  } else {
    static_cast<A*>(args.grad_weights)[slot] = 0;
  }
}

/// A warp a row: grad_rows[r] = sum of w * grad_y[t], grad_weights[slot] = <rows[r], grad_y[t]> over the slots that
/// name r, in slot order. From permute that is one slot or none; any other map is walked from the first owner to the
/// last.
template <class T, int N>
MOE_KERNEL __launch_bounds__(256) unpermute_backward_kernel(UnpermuteBackwardArgs args, const int32_t* owners) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t r = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp;
  if (r >= args.P) return;
  const T* row = static_cast<const T*>(args.rows) + r * args.rows_stride;
  T* grad_row = static_cast<T*>(args.grad_rows) + r * args.H;
  const int64_t first = owners[r], last = owners[args.P + r];
  if (last < 0)
    for (int64_t h = lane * N; h < args.H; h += kWarp * N) store(grad_row + h, Elements<T, N>{});
  for (int64_t slot = first; slot <= last; ++slot) {
    if (args.slot_to_row[slot] != r) continue;
    const T* grad_y = static_cast<const T*>(args.grad_y) + slot / args.K * args.grad_y_stride;
    const A weight = static_cast<const A*>(args.topk_weights)[slot];
    A dot = 0;
    for (int64_t h = lane * N; h < args.H; h += kWarp * N) {
      const Elements<T, N> value = load<N>(row + h), pull = load<N>(grad_y + h);
      Elements<T, N> sum{};
      if (slot != first) sum = load_again<N>(grad_row + h);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sum.v[n] += weight * pull.v[n];
        dot += value.v[n] * pull.v[n];
      }
      store(grad_row + h, sum);
    }
    dot = warp_sum(dot);
    if (lane == 0) static_cast<A*>(args.grad_weights)[slot] = dot;
  }
}

}  // namespace moe::cuda

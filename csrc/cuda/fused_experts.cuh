// SPDX-License-Identifier: Apache-2.0
// What the backward of fused_experts does beside products: sums over the rows of an expert for the gradients of the
// biases, and the gradient of the routing weights. One order of every sum, no atomics.
#pragma once
#include "element.cuh"
#include "warp.cuh"

namespace moe::cuda {

constexpr int kSumLanes = 8;  // rows that a block adds side by side

/// out[e, n] = sum over the rows r of expert e of weight(r) * rows[r or its token, n].
struct ExpertSums {
  int64_t E, N, stride, K;
  const void* rows;            // [S, N], or [T, N] with per-token rows
  const int32_t* row_to_slot;  // of per-token rows: row r reads row_to_slot[r] / K; else null
  const void* topk_weights;    // [S] acc, with row_to_slot; or null
  const int32_t* expert_offsets;
  void* out;  // [E, N]
};

/// A block owns 32 columns of an expert. Its eight warps take rows in turn, then their sums are added in order.
template <class T> MOE_KERNEL __launch_bounds__(kSumLanes* kWarp) expert_sums_kernel(ExpertSums args) {
  using A = acc_t<T>;
  MOE_SHARED(A, sums);  // [kSumLanes][32]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t n = int64_t(blockIdx.x) * kWarp + lane;
  for (int64_t e = blockIdx.y; e < args.E; e += gridDim.y) {
    const int64_t begin = args.expert_offsets[e], end = args.expert_offsets[e + 1];
    A sum = 0;
#pragma unroll 4
    for (int64_t r = begin + warp; r < end; r += kSumLanes) {
      const int64_t slot = args.row_to_slot ? args.row_to_slot[r] : r, row = args.row_to_slot ? slot / args.K : r;
      const A weight = args.topk_weights ? static_cast<const A*>(args.topk_weights)[slot] : A(1);
      if (n < args.N) sum += weight * widen(static_cast<const T*>(args.rows)[row * args.stride + n]);
    }
    sums[warp * kWarp + lane] = sum;
    __syncthreads();
    if (warp == 0 && n < args.N) {
      for (int w = 1; w < kSumLanes; ++w) sum += sums[w * kWarp + lane];
      static_cast<T*>(args.out)[e * args.N + n] = narrow<T>(sum);
    }
    __syncthreads();
  }
}

/// grad[slot of r] = sum over p of parts[p, r], in order, + <grad_y of its token, bias of its expert>.
struct WeightGradient {
  int64_t E, S, H, K, parts_count;
  const void* parts;  // [parts_count, S] acc
  const int32_t* row_to_slot;
  const int32_t* expert_offsets;
  const void* grad_y;  // [T, H]
  int64_t grad_y_stride;
  const void* bias;  // [E, H], or null: no scalar product
  void* grad;        // [S] acc; absent slots are not written
};

/// A warp a row.
template <class T> MOE_KERNEL __launch_bounds__(256) weight_gradient_kernel(WeightGradient args) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t r = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp;
  if (r >= args.expert_offsets[args.E]) return;
  const int64_t slot = args.row_to_slot[r];
  A dot = 0;
  if (args.bias) {
    int64_t e = 0, last = args.E - 1;  // the last expert that begins at or before r and is not empty holds it
    while (e < last) {
      const int64_t middle = (e + last) / 2;
      if (args.expert_offsets[middle + 1] <= r) e = middle + 1;
      else last = middle;
    }
    const T* grad_y = static_cast<const T*>(args.grad_y) + slot / args.K * args.grad_y_stride;
    const T* bias = static_cast<const T*>(args.bias) + e * args.H;
    for (int64_t h = lane; h < args.H; h += kWarp) dot += widen(grad_y[h]) * widen(bias[h]);
    dot = warp_sum(dot);
  }
  if (lane != 0) return;
  A sum = 0;
  for (int64_t p = 0; p < args.parts_count; ++p) sum += static_cast<const A*>(args.parts)[p * args.S + r];
  static_cast<A*>(args.grad)[slot] = sum + dot;
}

}  // namespace moe::cuda

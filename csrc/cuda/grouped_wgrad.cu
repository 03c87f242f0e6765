// SPDX-License-Identifier: Apache-2.0
// Launchers of grouped_wgrad: the tensor cores where addresses allow, those of sm_90a if they can, else multiply-adds.
#include "grouped_wgrad.cuh"

#include <algorithm>
#include <utility>

#include "launch.h"

namespace moe::cuda {
namespace {

/// Slots of a row of a side's data.
Quotient slots_of(const WgradSide& side) { return quotient_by(side.gather ? uint64_t(side.per_token) : 1); }

/// Where the rows of a 16-byte access begin.
uintptr_t addresses(const void* data, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) | uintptr_t(stride * bytes);
}

dim3 grid_of(const GroupedWgradArgs& args, int64_t width) {
  return dim3(unsigned(args.E * ((args.N + width - 1) / width) * ((args.K + width - 1) / width)));
}

/// The same product, or the transposed one where the other index of out is contiguous.
GroupedWgradArgs with_rows(GroupedWgradArgs args) {
  if (args.out_col != 1)
    std::swap(args.n_side, args.k_side), std::swap(args.N, args.K), std::swap(args.out_row, args.out_col);
  return args;
}

template <class T> cudaError_t with_mma(const GroupedWgradArgs& args, cudaStream_t stream) {
  const LaunchShape shape{grid_of(args, WgradTile<T>::kWidth), dim3(WgradTile<T>::kThreads), WgradTile<T>::kBytes};
  const Quotient n_token = slots_of(args.n_side), k_token = slots_of(args.k_side);
  return args.topk_weights ? launch<grouped_wgrad_kernel<T, true>>(shape, stream, args, n_token, k_token)
                           : launch<grouped_wgrad_kernel<T, false>>(shape, stream, args, n_token, k_token);
}

template <class T> cudaError_t with_fma(const GroupedWgradArgs& args, cudaStream_t stream) {
  constexpr uint32_t bytes = 2 * kWgradFmaDepth * kWgradFmaWidth * sizeof(acc_t<T>);
  return launch<grouped_wgrad_fma_kernel<T>>({grid_of(args, kWgradFmaWidth), dim3(kWgradFmaThreads), bytes}, stream,
                                             args);
}

}  // namespace

bool grouped_wgrad_uses_mma(const GroupedWgradArgs& args) {
  if (args.dtype == DType::f64 || (args.dtype == DType::f32 && !args.allow_tf32)) return false;
  if (args.out_dtype != args.dtype && args.out_dtype != DType::f32) return false;
  if (args.n_side.col_stride != 1 || args.k_side.col_stride != 1 || (args.out_col != 1 && args.out_row != 1))
    return false;
  const int64_t bytes = dtype_bytes(args.dtype), out_bytes = dtype_bytes(args.out_dtype);
  if (std::max(args.n_side.row_stride, args.k_side.row_stride) * bytes > UINT32_MAX) return false;
  const int64_t out_row = args.out_col == 1 ? args.out_row : args.out_col;
  const uintptr_t all = addresses(args.n_side.data, args.n_side.row_stride, bytes) |
                        addresses(args.k_side.data, args.k_side.row_stride, bytes) |
                        addresses(args.out, out_row | args.out_expert, out_bytes) |
                        uintptr_t((args.N | args.K) * bytes);
  return all % 16 == 0;
}

cudaError_t grouped_wgrad(const GroupedWgradArgs& args, cudaStream_t stream) {
  if (args.E == 0 || args.N == 0 || args.K == 0) return cudaSuccess;
  if (grouped_wgrad_uses_mma(args)) {
    const GroupedWgradArgs rows = with_rows(args);
    if (grouped_wgrad_uses_wgmma(rows)) return grouped_wgrad_sm90(rows, stream);
    if (args.dtype == DType::bf16) return with_mma<bf16>(rows, stream);
    if (args.dtype == DType::f16) return with_mma<f16>(rows, stream);
    return with_mma<float>(rows, stream);
  }
  cudaError_t result = cudaErrorInvalidValue;
  visit_dtype(args.dtype, [&](auto tag) { result = with_fma<decltype(tag)>(args, stream); });
  return result;
}

}  // namespace moe::cuda

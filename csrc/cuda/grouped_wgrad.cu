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

int64_t tiles_of(const GroupedWgradArgs& args, int64_t width) {
  return args.E * ((args.N + width - 1) / width) * ((args.K + width - 1) / width);
}
dim3 grid_of(const GroupedWgradArgs& args, int64_t width) {
  return dim3(unsigned(tiles_of(args, width) * std::max<int64_t>(args.parts, 1)));
}

/// The same product, or the transposed one where the other index of out is contiguous.
GroupedWgradArgs with_rows(GroupedWgradArgs args) {
  if (args.out_col != 1 && args.out_row == 1)
    std::swap(args.n_side, args.k_side), std::swap(args.N, args.K), std::swap(args.out_row, args.out_col);
  return args;
}

template <class T> cudaError_t with_mma(const GroupedWgradArgs& args, cudaStream_t stream) {
  const LaunchShape shape{grid_of(args, WgradTile<T>::kWidth), dim3(WgradTile<T>::kThreads), WgradTile<T>::kBytes};
  return launch<grouped_wgrad_kernel<T>>(shape, stream, args, slots_of(args.n_side), slots_of(args.k_side));
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

int64_t grouped_wgrad_parts(const GroupedWgradArgs& args) {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  Processor on{};
  on.count = count;
  return wgrad_parts({args.E, args.S, args.N, args.K, args.dtype, args.allow_tf32, grouped_wgrad_uses_mma(args)}, on);
}

int64_t grouped_wgrad_partial_bytes(const GroupedWgradArgs& args) {
  return args.parts > 1 ? args.parts * args.E * args.N * args.K * (args.dtype == DType::f64 ? 8 : 4) : 0;
}

cudaError_t grouped_wgrad(const GroupedWgradArgs& given, cudaStream_t stream) {
  const GroupedWgradArgs args = with_rows(given);
  if (args.E == 0 || args.N == 0 || args.K == 0) return cudaSuccess;
  if (args.parts > 1 && (!args.partial || args.N * args.K >= int64_t(1) << 31)) return cudaErrorInvalidValue;
  cudaError_t error = cudaErrorInvalidValue;
  const bool mma = grouped_wgrad_uses_mma(args);
  if (mma && args.parts <= 1 && grouped_wgrad_uses_wgmma(args)) return grouped_wgrad_sm90(args, stream);
  if (!mma) visit_dtype(args.dtype, [&](auto tag) { error = with_fma<decltype(tag)>(args, stream); });
  else if (args.dtype == DType::bf16) error = with_mma<bf16>(args, stream);
  else if (args.dtype == DType::f16) error = with_mma<f16>(args, stream);
  else error = with_mma<float>(args, stream);
  if (error != cudaSuccess || args.parts <= 1) return error;
  const int64_t blocks = std::min((args.N * args.K + kAddThreads - 1) / kAddThreads, kMostBlocks);
  const LaunchShape shape{dim3(unsigned(blocks), unsigned(std::min<int64_t>(args.E, 65535))), dim3(kAddThreads)};
  return args.dtype == DType::f64 ? launch<grouped_wgrad_add_kernel<double>>(shape, stream, args)
                                  : launch<grouped_wgrad_add_kernel<float>>(shape, stream, args);
}

}  // namespace moe::cuda

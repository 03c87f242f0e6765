// SPDX-License-Identifier: Apache-2.0
// Launcher of grouped_wgrad by wgmma: tensor maps of the sides that lie row by row, and the width of a tile.
#include "grouped_wgrad_sm90.cuh"

#include "grouped_gemm_config.h"
#include "grouped_gemm_sm90.h"
#include "launch.h"

namespace moe::cuda {
namespace {

BoxedTensor boxed(const WgradSide& side, int64_t S, int64_t width, DType dtype) {
  return {side.data, dtype, 2, {width, S}, {0, side.row_stride * 2}, {64, kSliceElements}, kSliceBytes};
}
bool taken(const WgradSide& side, int64_t S, int64_t width, DType dtype) {
  return side.gather || tensor_map_refusal(boxed(side, S, width, dtype)) == nullptr;
}
Quotient slots_of(const WgradSide& side) { return quotient_by(side.gather ? uint64_t(side.per_token) : 1); }

int64_t tiles_of(const GroupedWgradArgs& args, int columns) {
  return args.E * ceil_of(args.N, WgradWgmma<128>::kRows) * ceil_of(args.K, columns);
}

template <class T, int kColumns>
cudaError_t start(const GroupedWgradArgs& args, int processors, cudaStream_t stream) {
  using W = WgradWgmma<kColumns>;
  WgradMaps maps{};
  cudaError_t error = cudaSuccess;
  if (!args.n_side.gather) error = encode_tensor_map(boxed(args.n_side, args.S, args.N, args.dtype), &maps.n);
  if (error == cudaSuccess && !args.k_side.gather)
    error = encode_tensor_map(boxed(args.k_side, args.S, args.K, args.dtype), &maps.k);
  const int64_t tiles = tiles_of(args, kColumns);
  if (error == cudaSuccess && tiles > 0x3fffffff) error = cudaErrorInvalidConfiguration;
  if (error != cudaSuccess) return error;
  const WgradPlan plan{slots_of(args.n_side), slots_of(args.k_side), uint32_t(ceil_of(args.N, W::kRows)),
                       uint32_t(ceil_of(args.K, kColumns)), uint32_t(tiles)};
  const LaunchShape shape{dim3(unsigned(tiles < processors ? tiles : processors)), dim3(W::kThreads), W::kBytes};
  return launch<grouped_wgrad_sm90_kernel<T, kColumns>>(shape, stream, maps, args, plan);
}

template <class T> cudaError_t start_tile(const GroupedWgradArgs& args, cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  // Rounds of tiles times what a slice of one takes: the products, and reading 128 more columns.
  const auto time = [&](int columns) { return ceil_of(tiles_of(args, columns), processors) * (columns + 64); };
  return time(256) <= time(128) ? start<T, 256>(args, processors, stream) : start<T, 128>(args, processors, stream);
}

}  // namespace

bool grouped_wgrad_uses_wgmma(const GroupedWgradArgs& args) {
  if ((args.dtype != DType::bf16 && args.dtype != DType::f16)) return false;
  if (args.S < 1 || args.S >= int64_t(1) << 31 || args.N >= int64_t(1) << 30 || args.K >= int64_t(1) << 30)
    return false;
  return has_wgmma() && taken(args.n_side, args.S, args.N, args.dtype) &&
         taken(args.k_side, args.S, args.K, args.dtype);
}

cudaError_t grouped_wgrad_sm90(const GroupedWgradArgs& args, cudaStream_t stream) {
  return args.dtype == DType::bf16 ? start_tile<bf16>(args, stream) : start_tile<f16>(args, stream);
}

}  // namespace moe::cuda

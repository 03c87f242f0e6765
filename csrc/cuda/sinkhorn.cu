// SPDX-License-Identifier: Apache-2.0
// Launcher of sinkhorn: one cooperative kernel.
#include "sinkhorn.cuh"

#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

/// Blocks that surely run at the same time: one a processor, and no more than there are tiles.
cudaError_t most_blocks(int64_t T, unsigned* blocks) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t tiles = (T + sinkhorn::kTileTokens - 1) / sinkhorn::kTileTokens;
  *blocks = unsigned(tiles < processors ? tiles : processors);
  return error;
}

}  // namespace

int64_t sinkhorn_workspace_bytes(int64_t T, int64_t E, DType dtype) {
  return sinkhorn_space(T, E, dtype == DType::f64 ? 8 : 4).bytes;
}

cudaError_t sinkhorn(const SinkhornArgs& args, cudaStream_t stream) {
  const int64_t acc = args.dtype == DType::f64 ? 8 : 4;
  unsigned blocks = 0;
  cudaError_t result = most_blocks(args.T, &blocks);
  if (result != cudaSuccess) return result;
  result = cudaMemsetAsync(args.tokens_per_expert, 0, size_t(args.E) * 4, stream);
  if (result != cudaSuccess) return result;
  result = cudaMemsetAsync(args.iterations, 0, 4, stream);
  if (result != cudaSuccess) return result;
  const SinkhornSpace space = sinkhorn_space(args.T, args.E, acc);
  result = cudaMemsetAsync(static_cast<char*>(args.workspace) + space.arrived, 0, 4, stream);
  if (result != cudaSuccess) return result;
  LaunchShape shape{dim3(blocks), dim3(kSinkhornWarps * kWarp)};
  shape.shared_bytes = uint32_t((args.E + kSinkhornWarps * kWarp) * acc);
  shape.cooperative = true;
  visit_dtype(args.dtype, [&](auto tag) { result = launch<sinkhorn_kernel<decltype(tag)>>(shape, stream, args); });
  return result;
}

}  // namespace moe::cuda

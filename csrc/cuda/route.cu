// SPDX-License-Identifier: Apache-2.0
// Launchers of route and its backward.
#include "route.cuh"

#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

constexpr int64_t kMostBlocks = 132 * 8;  // eight on each processor of an H100; each takes tile after tile

template <class Args> LaunchShape shape_of(const Args& args, const RouteTile& tile) {
  const int64_t tiles = (args.T + tile.tokens - 1) / tile.tokens;
  return {dim3(unsigned(tiles < kMostBlocks ? tiles : kMostBlocks)), dim3(unsigned(tile.warps * kWarp)), tile.bytes};
}

}  // namespace

cudaError_t route(const RouteArgs& args, cudaStream_t stream) {
  const cudaError_t zeroed = cudaMemsetAsync(args.tokens_per_expert, 0, size_t(args.E) * 4, stream);
  if (zeroed != cudaSuccess) return zeroed;
  const RouteTile tile = route_tile(args.T, args.E, args.G, args.K, dtype_bytes(args.dtype), false);
  cudaError_t result = cudaSuccess;
  visit_dtype(args.dtype, [&](auto tag) {
    result = launch(shape_of(args, tile), stream, route_kernel<decltype(tag)>, args, tile);
  });
  return result;
}

cudaError_t route_backward(const RouteBackwardArgs& args, cudaStream_t stream) {
  const RouteTile tile = route_tile(args.T, args.E, 1, args.K, dtype_bytes(args.dtype), true);
  cudaError_t result = cudaSuccess;
  visit_dtype(args.dtype, [&](auto tag) {
    result = launch(shape_of(args, tile), stream, route_backward_kernel<decltype(tag)>, args, tile);
  });
  return result;
}

}  // namespace moe::cuda

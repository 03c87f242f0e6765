// SPDX-License-Identifier: Apache-2.0
// Launchers of route and its backward.
#include "route.cuh"

#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

LaunchShape shape_of(const RouteTile& tile, const TokenRuns& runs) {
  return {dim3(unsigned(runs.count < kMostBlocks ? runs.count : kMostBlocks)), dim3(unsigned(tile.warps * kWarp)),
          tile.bytes};
}

}  // namespace

int64_t route_workspace_bytes(const RouteArgs& args) {
  return args.score_sums ? sum_rows_bytes(args.T, args.B, args.E, args.dtype) : 0;
}

cudaError_t route(const RouteArgs& args, cudaStream_t stream) {
  const cudaError_t zeroed = cudaMemsetAsync(args.tokens_per_expert, 0, size_t(args.E) * 4, stream);
  if (zeroed != cudaSuccess) return zeroed;
  const int64_t B = args.score_sums ? args.B : 0;
  const RouteTile tile = route_tile(args.T, args.E, args.G, args.K, dtype_bytes(args.dtype), false, B > 0);
  const TokenRuns runs = token_runs(args.T, B, tile);
  cudaError_t result = cudaSuccess;
  visit_dtype(args.dtype, [&](auto tag) {
    result = launch<route_kernel<decltype(tag)>>(shape_of(tile, runs), stream, args, tile, runs);
  });
  if (result != cudaSuccess || B == 0) return result;
  return add_rows(args.E, B, runs.per_group, args.dtype, args.workspace, args.score_sums, stream);
}

cudaError_t route_backward(const RouteBackwardArgs& args, cudaStream_t stream) {
  const int64_t B = args.grad_score_sums ? args.B : 0;
  const RouteTile tile = route_tile(args.T, args.E, 1, args.K, dtype_bytes(args.dtype), true, B > 0);
  const TokenRuns runs = token_runs(args.T, B, tile);
  cudaError_t result = cudaSuccess;
  visit_dtype(args.dtype, [&](auto tag) {
    result = launch<route_backward_kernel<decltype(tag)>>(shape_of(tile, runs), stream, args, tile, runs);
  });
  return result;
}

}  // namespace moe::cuda

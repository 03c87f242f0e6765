// SPDX-License-Identifier: Apache-2.0
// Launchers of sum_scores and its backward, and of the sum over rows that route shares.
#include "sum_scores.cuh"

#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

LaunchShape shape_of(const RouteTile& tile, const TokenRuns& runs) {
  return {dim3(unsigned(runs.count < kMostBlocks ? runs.count : kMostBlocks)), dim3(unsigned(tile.warps * kWarp)),
          tile.bytes};
}

}  // namespace

int64_t sum_rows_bytes(int64_t T, int64_t B, int64_t E, DType dtype) {
  const TokenRuns runs = token_runs(T, B, {});
  return runs.per_group > 1 ? runs.count * E * (dtype == DType::f64 ? 8 : 4) : 0;
}

cudaError_t add_rows(int64_t E, int64_t groups, int64_t rows, DType dtype, const void* parts, void* sums,
                     cudaStream_t stream) {
  if (rows == 1) return cudaSuccess;  // they are the sums
  constexpr unsigned warps = 32, most_groups = 65535;
  const dim3 grid(unsigned((E + kWarp - 1) / kWarp), groups < most_groups ? unsigned(groups) : most_groups);
  const auto start = [&](auto zero) {
    using A = decltype(zero);
    return launch<add_rows_kernel<A>>({grid, dim3(warps * kWarp), warps * kWarp * uint32_t(sizeof(A))}, stream, int(E),
                                      groups, rows, static_cast<const A*>(parts), static_cast<A*>(sums));
  };
  return dtype == DType::f64 ? start(0.) : start(0.f);
}

int64_t sum_scores_workspace_bytes(const SumScoresArgs& args) {
  return sum_rows_bytes(args.T, args.B, args.E, args.dtype);
}

cudaError_t sum_scores(const SumScoresArgs& args, cudaStream_t stream) {
  const RouteTile tile = route_tile(args.T, args.E, 1, 0, dtype_bytes(args.dtype), false, true);
  const TokenRuns runs = token_runs(args.T, args.B, tile);
  cudaError_t result = cudaSuccess;
  visit_dtype(args.dtype, [&](auto tag) {
    result = launch<sum_scores_kernel<decltype(tag)>>(shape_of(tile, runs), stream, args, tile, runs);
  });
  if (result != cudaSuccess) return result;
  return add_rows(args.E, args.B, runs.per_group, args.dtype, args.workspace, args.sums, stream);
}

cudaError_t sum_scores_backward(const SumScoresBackwardArgs& args, cudaStream_t stream) {
  const RouteTile tile = route_tile(args.T, args.E, 1, 0, dtype_bytes(args.dtype), true, true);
  const TokenRuns runs = token_runs(args.T, args.B, tile);
  cudaError_t result = cudaSuccess;
  visit_dtype(args.dtype, [&](auto tag) {
    result = launch<sum_scores_backward_kernel<decltype(tag)>>(shape_of(tile, runs), stream, args, tile, runs);
  });
  return result;
}

}  // namespace moe::cuda

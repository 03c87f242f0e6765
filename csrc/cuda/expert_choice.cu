// SPDX-License-Identifier: Apache-2.0
// Launchers of expert_choice: scores and cuts, then slots.
#include "expert_choice.cuh"

#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

LaunchShape shape_of(int64_t T, const ChoiceTile& tile) {
  const int64_t tiles = (T + tile.tokens - 1) / tile.tokens, most = 132 * 8;  // eight on each processor of an H100
  return {dim3(unsigned(tiles < most ? tiles : most)), dim3(kChoiceWarps * kWarp), tile.bytes};
}

template <class T> cudaError_t cut(const ExpertCutsArgs& args, cudaStream_t stream) {
  const ChoiceTile tile = choice_tile(args.E, sizeof(acc_t<T>), 32);
  const cudaError_t error = launch<expert_scores_kernel<T>>(shape_of(args.T, tile), stream, args, tile);
  if (error != cudaSuccess) return error;
  const LaunchShape columns{dim3(unsigned(args.T / args.n * args.E)), dim3(kCutBins), (kCutBins + 2) * 4};
  return launch<expert_cuts_kernel<acc_t<T>>>(columns, stream, args);
}

}  // namespace

cudaError_t expert_cuts(const ExpertCutsArgs& args, cudaStream_t stream) {
  cudaError_t result = cudaMemsetAsync(args.tokens_per_expert, 0, size_t(args.E) * 4, stream);
  if (result != cudaSuccess || args.T == 0) return result;
  result = cudaMemsetAsync(args.experts_per_token, 0, size_t(args.T) * 4, stream);
  if (result != cudaSuccess) return result;
  visit_dtype(args.dtype, [&](auto tag) { result = cut<decltype(tag)>(args, stream); });
  return result;
}

cudaError_t expert_choice(const ExpertChoiceArgs& args, cudaStream_t stream) {
  const ChoiceTile tile = choice_tile(args.E, dtype_bytes(args.dtype), kChoiceWarps);
  if (args.dtype == DType::f64) return launch<expert_slots_kernel<double>>(shape_of(args.T, tile), stream, args, tile);
  return launch<expert_slots_kernel<float>>(shape_of(args.T, tile), stream, args, tile);
}

}  // namespace moe::cuda

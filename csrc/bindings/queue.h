// SPDX-License-Identifier: Apache-2.0
// From a stage's struct to its CUDA launcher and its workspace, on a GPU or on the emulator.
#pragma once
#include "../cuda/launchers.h"
#include "tensors.h"

namespace moe::binding {
namespace {

constexpr bool kChecksIds = true, kOnDevice = true;

template <class Args, class = void> constexpr bool has_workspace = false;
template <class Args> constexpr bool has_workspace<Args, std::void_t<decltype(std::declval<Args&>().workspace)>> = true;

/// Bytes of args.workspace; 0 where the stage wants none.
template <class Args> int64_t device_bytes(const Args&) { return 0; }
inline int64_t device_bytes(const RouteArgs& args) { return cuda::route_workspace_bytes(args); }
inline int64_t device_bytes(const SumScoresArgs& args) { return cuda::sum_scores_workspace_bytes(args); }
inline int64_t device_bytes(const LimitCapacityArgs& args) { return cuda::limit_capacity_workspace_bytes(args); }
inline int64_t device_bytes(const SinkhornArgs& args) {
  return cuda::sinkhorn_workspace_bytes(args.T, args.E, args.dtype);
}
inline int64_t device_bytes(const PermuteIndexArgs& args) {
  return cuda::permute_index_workspace_bytes(args.S, args.E);
}
inline int64_t device_bytes(const UnpermuteBackwardArgs& args) {
  return cuda::unpermute_backward_workspace_bytes(args.P);
}
inline int64_t device_bytes(const GroupedGemmArgs& args) { return cuda::grouped_gemm_workspace_bytes(args); }
inline int64_t device_bytes(const FusedExpertsArgs& args) { return cuda::fused_experts_workspace_bytes(args); }
inline int64_t device_bytes(const FusedExpertsBackwardArgs& args) {
  return cuda::fused_experts_backward_workspace_bytes(args);
}

/// Sets args.workspace where the stage wants one.
template <class Args> Tensor device_workspace(const Tensor& like, Args& args) {
  const int64_t bytes = device_bytes(args);
  if (bytes == 0) return like;
  Tensor space = empty(like, {bytes}, ScalarType::Byte);
  if constexpr (!std::is_const_v<Args> && has_workspace<Args>) args.workspace = space.mutable_data_ptr();
  return space;
}

inline void succeed(const char* stage, cudaError_t error) {
  require(error == cudaSuccess, stage, ": ", cudaGetErrorString(error));
}
inline void queue(const RouteArgs& args, cudaStream_t stream) { succeed("route", cuda::route(args, stream)); }
inline void queue(const RouteBackwardArgs& args, cudaStream_t stream) {
  succeed("route_backward", cuda::route_backward(args, stream));
}
inline void queue(const SumScoresArgs& args, cudaStream_t stream) {
  succeed("sum_scores", cuda::sum_scores(args, stream));
}
inline void queue(const SumScoresBackwardArgs& args, cudaStream_t stream) {
  succeed("sum_scores_backward", cuda::sum_scores_backward(args, stream));
}
inline void queue(const LimitCapacityArgs& args, cudaStream_t stream) {
  succeed("limit_capacity", cuda::limit_capacity(args, stream));
}
inline void queue(const NarrowIdsArgs& args, cudaStream_t stream) {
  succeed("narrow_ids", cuda::narrow_ids(args, stream));
}
inline void queue(const PermuteIndexArgs& args, cudaStream_t stream) {
  succeed("permute_index", cuda::permute_index(args, stream));
}
inline void queue(const PermuteArgs& args, cudaStream_t stream) { succeed("permute", cuda::permute(args, stream)); }
inline void queue(const UnpermuteArgs& args, cudaStream_t stream) {
  succeed("unpermute", cuda::unpermute(args, stream));
}
inline void queue(const UnpermuteBackwardArgs& args, cudaStream_t stream) {
  succeed("unpermute_backward", cuda::unpermute_backward(args, stream));
}
inline void queue(const ExpertCutsArgs& args, cudaStream_t stream) {
  succeed("expert_cuts", cuda::expert_cuts(args, stream));
}
inline void queue(const ExpertChoiceArgs& args, cudaStream_t stream) {
  succeed("expert_choice", cuda::expert_choice(args, stream));
}
inline void queue(const SinkhornArgs& args, cudaStream_t stream) { succeed("sinkhorn", cuda::sinkhorn(args, stream)); }
inline void queue(const GroupedGemmArgs& args, cudaStream_t stream) {
  succeed("grouped_gemm", cuda::grouped_gemm(args, stream));
}
inline void queue(const FusedExpertsArgs& args, cudaStream_t stream) {
  succeed("fused_experts", cuda::fused_experts(args, stream));
}
inline void queue(const FusedExpertsBackwardArgs& args, cudaStream_t stream) {
  succeed("fused_experts_backward", cuda::fused_experts_backward(args, stream));
}

}  // namespace
}  // namespace moe::binding

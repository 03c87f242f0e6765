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
inline int64_t device_bytes(const PermuteIndexArgs& args) {
  return cuda::permute_index_workspace_bytes(args.S, args.E);
}
inline int64_t device_bytes(const UnpermuteBackwardArgs& args) {
  return cuda::unpermute_backward_workspace_bytes(args.P);
}
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
inline void queue(const NarrowIdsArgs& args, cudaStream_t stream) { succeed("narrow_ids", cuda::narrow_ids(args, stream)); }
inline void queue(const PermuteIndexArgs& args, cudaStream_t stream) {
  succeed("permute_index", cuda::permute_index(args, stream));
}
inline void queue(const PermuteArgs& args, cudaStream_t stream) { succeed("permute", cuda::permute(args, stream)); }
inline void queue(const UnpermuteArgs& args, cudaStream_t stream) { succeed("unpermute", cuda::unpermute(args, stream)); }
inline void queue(const UnpermuteBackwardArgs& args, cudaStream_t stream) {
  succeed("unpermute_backward", cuda::unpermute_backward(args, stream));
}
inline void queue(const FusedExpertsArgs& args, cudaStream_t stream) {
  succeed("fused_experts", cuda::fused_experts(args, stream));
}
inline void queue(const FusedExpertsBackwardArgs& args, cudaStream_t stream) {
  succeed("fused_experts_backward", cuda::fused_experts_backward(args, stream));
}

}  // namespace
}  // namespace moe::binding

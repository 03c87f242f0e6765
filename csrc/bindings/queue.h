// SPDX-License-Identifier: Apache-2.0
// From a stage's struct to its CUDA launcher and its workspace, on a GPU or on the emulator.
#pragma once
#include "../cuda/launchers.h"
#include "tensors.h"

namespace moe::binding {
namespace {

constexpr bool kChecksIds = true;

int64_t device_bytes(const RouteArgs& args) { return cuda::route_workspace_bytes(args); }
int64_t device_bytes(const SumScoresArgs& args) { return cuda::sum_scores_workspace_bytes(args); }
int64_t device_bytes(const LimitCapacityArgs& args) { return cuda::limit_capacity_workspace_bytes(args); }
int64_t device_bytes(const PermuteIndexArgs& args) { return cuda::permute_index_workspace_bytes(args.S, args.E); }
int64_t device_bytes(const UnpermuteBackwardArgs& args) { return cuda::unpermute_backward_workspace_bytes(args.P); }

/// Sets args.workspace where the stage wants one: where device_bytes knows it.
template <class Args> auto device_workspace_of(const Tensor& like, Args& args, int)
    -> decltype(device_bytes(args), Tensor()) {
  const int64_t bytes = device_bytes(args);
  if (bytes == 0) return like;
  Tensor space = empty(like, {bytes}, ScalarType::Byte);
  args.workspace = space.mutable_data_ptr();
  return space;
}
template <class Args> Tensor device_workspace_of(const Tensor& like, Args&, long) { return like; }
template <class Args> Tensor device_workspace(const Tensor& like, Args& args) {
  return device_workspace_of(like, args, 0);
}

void succeed(const char* stage, cudaError_t error) {
  require(error == cudaSuccess, stage, ": ", cudaGetErrorString(error));
}
void queue(const RouteArgs& args, cudaStream_t stream) { succeed("route", cuda::route(args, stream)); }
void queue(const RouteBackwardArgs& args, cudaStream_t stream) {
  succeed("route_backward", cuda::route_backward(args, stream));
}
void queue(const SumScoresArgs& args, cudaStream_t stream) { succeed("sum_scores", cuda::sum_scores(args, stream)); }
void queue(const SumScoresBackwardArgs& args, cudaStream_t stream) {
  succeed("sum_scores_backward", cuda::sum_scores_backward(args, stream));
}
void queue(const LimitCapacityArgs& args, cudaStream_t stream) {
  succeed("limit_capacity", cuda::limit_capacity(args, stream));
}
void queue(const NarrowIdsArgs& args, cudaStream_t stream) { succeed("narrow_ids", cuda::narrow_ids(args, stream)); }
void queue(const PermuteIndexArgs& args, cudaStream_t stream) {
  succeed("permute_index", cuda::permute_index(args, stream));
}
void queue(const PermuteArgs& args, cudaStream_t stream) { succeed("permute", cuda::permute(args, stream)); }
void queue(const UnpermuteArgs& args, cudaStream_t stream) { succeed("unpermute", cuda::unpermute(args, stream)); }
void queue(const UnpermuteBackwardArgs& args, cudaStream_t stream) {
  succeed("unpermute_backward", cuda::unpermute_backward(args, stream));
}

}  // namespace
}  // namespace moe::binding

// SPDX-License-Identifier: Apache-2.0
// From a stage's struct to its CUDA launcher and its workspace, on a GPU or on the emulator.
#pragma once
#include "../cuda/launchers.h"
#include "tensors.h"

namespace moe::binding {
namespace {

constexpr bool kChecksIds = true;

int64_t device_bytes(const PermuteIndexArgs& args) { return cuda::permute_index_workspace_bytes(args.S, args.E); }
int64_t device_bytes(const UnpermuteBackwardArgs& args) { return cuda::unpermute_backward_workspace_bytes(args.P); }
int64_t device_bytes(const SinkhornArgs& args) { return cuda::sinkhorn_workspace_bytes(args.T, args.E, args.dtype); }
template <class Args> constexpr bool kWantsSpace = std::is_same_v<Args, PermuteIndexArgs> ||
                                                   std::is_same_v<Args, UnpermuteBackwardArgs> ||
                                                   std::is_same_v<Args, SinkhornArgs>;

/// Sets args.workspace where the stage wants one.
template <class Args> Tensor device_workspace(const Tensor& like, Args& args) {
  if constexpr (kWantsSpace<Args>) {
    Tensor space = empty(like, {device_bytes(args)}, ScalarType::Byte);
    args.workspace = space.mutable_data_ptr();
    return space;
  } else {
    return like;
  }
}

void succeed(const char* stage, cudaError_t error) {
  require(error == cudaSuccess, stage, ": ", cudaGetErrorString(error));
}
void queue(const RouteArgs& args, cudaStream_t stream) { succeed("route", cuda::route(args, stream)); }
void queue(const RouteBackwardArgs& args, cudaStream_t stream) {
  succeed("route_backward", cuda::route_backward(args, stream));
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
void queue(const ExpertCutsArgs& args, cudaStream_t stream) { succeed("expert_cuts", cuda::expert_cuts(args, stream)); }
void queue(const ExpertChoiceArgs& args, cudaStream_t stream) {
  succeed("expert_choice", cuda::expert_choice(args, stream));
}
void queue(const SinkhornArgs& args, cudaStream_t stream) { succeed("sinkhorn", cuda::sinkhorn(args, stream)); }

}  // namespace
}  // namespace moe::binding

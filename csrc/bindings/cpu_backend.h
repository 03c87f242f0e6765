// SPDX-License-Identifier: Apache-2.0
// The stages on CPU tensors. For ops.cpp and expert_ops.cpp.
#pragma once
#include "tensors.h"

#define MOE_LIBRARY moe_kernels
#define MOE_KEY CPU

namespace moe::binding {
namespace {

constexpr bool kChecksIds = false, kOnDevice = false;

template <class Args> Tensor route_workspace(const Tensor& like, Args& args, const Workers& workers) {
  Tensor space = empty(like, {cpu::route_workspace_bytes(args.E, workers)}, ScalarType::Byte);
  args.workspace = space.mutable_data_ptr();
  return space;
}
inline void run(const Tensor& like, RouteArgs& args) {
  const Workers workers = torch_workers();
  const Tensor space = route_workspace(like, args, workers);
  cpu::route(args, workers);
}
inline void run(const Tensor& like, RouteBackwardArgs& args) {
  const Workers workers = torch_workers();
  const Tensor space = route_workspace(like, args, workers);
  cpu::route_backward(args, workers);
}
inline void run(const Tensor&, const NarrowIdsArgs& args) { cpu::narrow_ids(args); }
inline void run(const Tensor&, const PermuteIndexArgs& args) { cpu::permute_index(args); }
inline void run(const Tensor&, const PermuteArgs& args) { cpu::permute(args, torch_workers()); }
inline void run(const Tensor&, const UnpermuteArgs& args) { cpu::unpermute(args, torch_workers()); }
inline void run(const Tensor&, const UnpermuteBackwardArgs& args) { cpu::unpermute_backward(args, torch_workers()); }
inline void run(const Tensor& x, FusedExpertsArgs& args) {
  const Workers workers = torch_workers();
  const Tensor space = workspace(x, cpu::fused_experts_workspace_bytes, args, workers);
  cpu::fused_experts(args, workers);
}
inline void run(const Tensor& x, FusedExpertsBackwardArgs& args) {
  const Workers workers = torch_workers();
  const Tensor space = workspace(x, cpu::fused_experts_backward_workspace_bytes, args, workers);
  cpu::fused_experts_backward(args, workers);
}

}  // namespace
}  // namespace moe::binding

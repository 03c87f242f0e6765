// SPDX-License-Identifier: Apache-2.0
// The stages on CPU tensors. For ops.cpp alone.
#pragma once
#include "tensors.h"

#define MOE_LIBRARY moe_kernels
#define MOE_KEY CPU

namespace moe::binding {
namespace {

constexpr bool kChecksIds = false;

template <class Args> Tensor route_workspace(const Tensor& like, Args& args, const Workers& workers) {
  Tensor space = empty(like, {cpu::route_workspace_bytes(args.E, workers)}, ScalarType::Byte);
  args.workspace = space.mutable_data_ptr();
  return space;
}
void run(const Tensor& like, RouteArgs& args) {
  const Workers workers = torch_workers();
  const Tensor space = route_workspace(like, args, workers);
  cpu::route(args, workers);
}
void run(const Tensor& like, RouteBackwardArgs& args) {
  const Workers workers = torch_workers();
  const Tensor space = route_workspace(like, args, workers);
  cpu::route_backward(args, workers);
}
void run(const Tensor& like, ExpertCutsArgs& args) {
  const Workers workers = torch_workers();
  const Tensor space = workspace(like, cpu::expert_cuts_workspace_bytes, args, workers);
  cpu::expert_cuts(args, workers);
}
void run(const Tensor&, const ExpertChoiceArgs& args) { cpu::expert_choice(args, torch_workers()); }
void run(const Tensor& like, SinkhornArgs& args) {
  const Workers workers = torch_workers();
  const Tensor space = workspace(like, cpu::sinkhorn_workspace_bytes, args, workers);
  cpu::sinkhorn(args, workers);
}
void run(const Tensor&, const NarrowIdsArgs& args) { cpu::narrow_ids(args); }
void run(const Tensor&, const PermuteIndexArgs& args) { cpu::permute_index(args); }
void run(const Tensor&, const PermuteArgs& args) { cpu::permute(args, torch_workers()); }
void run(const Tensor&, const UnpermuteArgs& args) { cpu::unpermute(args, torch_workers()); }
void run(const Tensor&, const UnpermuteBackwardArgs& args) { cpu::unpermute_backward(args, torch_workers()); }

}  // namespace
}  // namespace moe::binding

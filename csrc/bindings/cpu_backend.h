// SPDX-License-Identifier: Apache-2.0
// The stages on CPU tensors. For ops.cpp, gemm_ops.cpp and expert_ops.cpp.
#pragma once
#include "tensors.h"

#define MOE_LIBRARY moe_kernels
#define MOE_KEY CPU

namespace moe::binding {
namespace {

constexpr bool kChecksIds = false, kOnDevice = false;

/// Runs a stage that wants a workspace.
template <class Args> void run_in(int64_t (*bytes)(const Args&, const Workers&),
                                  void (*stage)(const Args&, const Workers&), const Tensor& like, Args& args) {
  const Workers workers = torch_workers();
  const Tensor space = workspace(like, bytes, args, workers);
  stage(args, workers);
}
inline void run(const Tensor& like, RouteArgs& args) { run_in(cpu::route_workspace_bytes, cpu::route, like, args); }
inline void run(const Tensor& like, RouteBackwardArgs& args) {
  run_in(cpu::route_backward_workspace_bytes, cpu::route_backward, like, args);
}
inline void run(const Tensor& like, SumScoresArgs& args) {
  run_in(cpu::sum_scores_workspace_bytes, cpu::sum_scores, like, args);
}
inline void run(const Tensor& like, SumScoresBackwardArgs& args) {
  run_in(cpu::sum_scores_backward_workspace_bytes, cpu::sum_scores_backward, like, args);
}
inline void run(const Tensor& like, LimitCapacityArgs& args) {
  run_in(cpu::limit_capacity_workspace_bytes, cpu::limit_capacity, like, args);
}
inline void run(const Tensor& like, ExpertCutsArgs& args) {
  run_in(cpu::expert_cuts_workspace_bytes, cpu::expert_cuts, like, args);
}
inline void run(const Tensor&, const ExpertChoiceArgs& args) { cpu::expert_choice(args, torch_workers()); }
inline void run(const Tensor& like, SinkhornArgs& args) {
  run_in(cpu::sinkhorn_workspace_bytes, cpu::sinkhorn, like, args);
}
inline void run(const Tensor&, const NarrowIdsArgs& args) { cpu::narrow_ids(args); }
inline void run(const Tensor&, const PermuteIndexArgs& args) { cpu::permute_index(args); }
inline void run(const Tensor&, const PermuteArgs& args) { cpu::permute(args, torch_workers()); }
inline void run(const Tensor&, const UnpermuteArgs& args) { cpu::unpermute(args, torch_workers()); }
inline void run(const Tensor&, const UnpermuteBackwardArgs& args) { cpu::unpermute_backward(args, torch_workers()); }
inline void run(const Tensor& like, GroupedGemmArgs& args) {
  run_in(cpu::grouped_gemm_workspace_bytes, cpu::grouped_gemm, like, args);
}
inline void run(const Tensor& like, FusedExpertsArgs& args) {
  run_in(cpu::fused_experts_workspace_bytes, cpu::fused_experts, like, args);
}
inline void run(const Tensor& like, FusedExpertsBackwardArgs& args) {
  run_in(cpu::fused_experts_backward_workspace_bytes, cpu::fused_experts_backward, like, args);
}

}  // namespace
}  // namespace moe::binding

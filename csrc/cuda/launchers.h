// SPDX-License-Identifier: Apache-2.0
// The CUDA stages: the structs of moe.h with every pointer on the device, and a stream. They queue work and return
// what the launch said; they never wait, never allocate and never read a device value.
#pragma once
#include "../moe.h"
#include "device.h"
#include "runtime.h"

namespace moe::cuda {

int64_t route_workspace_bytes(const RouteArgs&);
cudaError_t route(const RouteArgs&, cudaStream_t);
cudaError_t route_backward(const RouteBackwardArgs&, cudaStream_t);
cudaError_t expert_cuts(const ExpertCutsArgs&, cudaStream_t);
cudaError_t expert_choice(const ExpertChoiceArgs&, cudaStream_t);
int64_t sinkhorn_workspace_bytes(int64_t T, int64_t E, DType);
cudaError_t sinkhorn(const SinkhornArgs&, cudaStream_t);
int64_t sum_scores_workspace_bytes(const SumScoresArgs&);
cudaError_t sum_scores(const SumScoresArgs&, cudaStream_t);
cudaError_t sum_scores_backward(const SumScoresBackwardArgs&, cudaStream_t);
int64_t limit_capacity_workspace_bytes(const LimitCapacityArgs&);
cudaError_t limit_capacity(const LimitCapacityArgs&, cudaStream_t);
cudaError_t narrow_ids(const NarrowIdsArgs&, cudaStream_t);
int64_t permute_index_workspace_bytes(int64_t S, int64_t E);
cudaError_t permute_index(const PermuteIndexArgs&, cudaStream_t);
cudaError_t permute(const PermuteArgs&, cudaStream_t);
cudaError_t unpermute(const UnpermuteArgs&, cudaStream_t);
int64_t unpermute_backward_workspace_bytes(int64_t P);
cudaError_t unpermute_backward(const UnpermuteBackwardArgs&, cudaStream_t);
int64_t grouped_gemm_workspace_bytes(const GroupedGemmArgs&);
cudaError_t grouped_gemm(const GroupedGemmArgs&, cudaStream_t);
int64_t fused_experts_workspace_bytes(const FusedExpertsArgs&);
cudaError_t fused_experts(const FusedExpertsArgs&, cudaStream_t);
int64_t fused_experts_backward_workspace_bytes(const FusedExpertsBackwardArgs&);
cudaError_t fused_experts_backward(const FusedExpertsBackwardArgs&, cudaStream_t);

// Of route and sum_scores, in sum_scores.cu: the rows of sums that a grid leaves, and the sum of those of each group.
int64_t sum_rows_bytes(int64_t T, int64_t B, int64_t E, DType);
cudaError_t add_rows(int64_t E, int64_t groups, int64_t rows, DType, const void* parts, void* sums, cudaStream_t);

}  // namespace moe::cuda

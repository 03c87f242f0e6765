// SPDX-License-Identifier: Apache-2.0
// The CUDA stages: the structs of moe.h with every pointer on the device, and a stream. They queue work and return
// what the launch said; they never wait, never allocate and never read a device value.
#pragma once
#include "../moe.h"
#include "device.h"
#ifdef MOE_SIMT
#include "../simt/host_api.h"
#endif

namespace moe::cuda {

cudaError_t route(const RouteArgs&, cudaStream_t);
cudaError_t route_backward(const RouteBackwardArgs&, cudaStream_t);
cudaError_t narrow_ids(const NarrowIdsArgs&, cudaStream_t);
int64_t permute_index_workspace_bytes(int64_t S, int64_t E);
cudaError_t permute_index(const PermuteIndexArgs&, cudaStream_t);
cudaError_t permute(const PermuteArgs&, cudaStream_t);
cudaError_t unpermute(const UnpermuteArgs&, cudaStream_t);
int64_t unpermute_backward_workspace_bytes(int64_t P);
cudaError_t unpermute_backward(const UnpermuteBackwardArgs&, cudaStream_t);
int64_t fused_experts_workspace_bytes(const FusedExpertsArgs&);
cudaError_t fused_experts(const FusedExpertsArgs&, cudaStream_t);
int64_t fused_experts_backward_workspace_bytes(const FusedExpertsBackwardArgs&);
cudaError_t fused_experts_backward(const FusedExpertsBackwardArgs&, cudaStream_t);

}  // namespace moe::cuda

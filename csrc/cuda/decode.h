// SPDX-License-Identifier: Apache-2.0
// decode: the expert MLP of a few tokens, where time is what reading the weights takes. Two launches behind those of
// the index, each weight row read once:
//   decode_w13   act[r] = act(s * x W13^T + b13)            the whole of H is summed before the activation
//   decode_w2    y[t] = sum over the slots of t, ascending, of weight * (act W2^T + b2)
// A whole layer is route, permute_index, decode_w13, decode_w2: four kernels (and route's memset).
// The last two are programmatic dependents: they start while the kernel before them ends.
#pragma once
#include "../moe.h"
#include "device.h"
#include "grouped_gemm.h"
#include "runtime.h"

namespace moe::cuda {

constexpr int64_t kDecodeSlots = 512;  // the most slots: a block of decode_w2 keeps one sum a slot

struct DecodeArgs {
  ExpertMlp mlp;  // weights not packed; row_to_slot and expert_offsets as permute_index left them, without padding
  void* y;        // [T, H]
  void* act;      // [S, I] workspace, decode_workspace_bytes
};

#if !defined(__CUDACC_RTC__)
/// Whether decode takes the call: kDecodeSlots at most, one type of x and weights, weights not packed.
bool decode_takes(const ExpertMlp&);
/// Whether the tensor cores take it: bf16 or f16, rows of 16 bytes, H and I contiguous in the weights. Otherwise a warp
/// a dot product in acc, for any width, stride and type.
bool decode_uses_mma(const ExpertMlp&);
/// Whether, of those, wgmma does: sm_90a, weights that a tensor map holds.
bool decode_uses_wgmma(const ExpertMlp&);
int64_t decode_workspace_bytes(const ExpertMlp&);
cudaError_t decode(const DecodeArgs&, cudaStream_t);
cudaError_t decode_sm90(const DecodeArgs&, const RowsEpilogue&, cudaStream_t);
#endif

}  // namespace moe::cuda

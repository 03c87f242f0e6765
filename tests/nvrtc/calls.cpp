// SPDX-License-Identifier: Apache-2.0
// Calls launchers as the binding does, with addresses that nothing reads: the driver beneath is fake_driver.cpp.
#include "../../csrc/cuda/decode.h"
#include "../../csrc/cuda/launchers.h"

using namespace moe;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
void* at(uintptr_t address) { return reinterpret_cast<void*>(address << 20); }
void* const kStream = reinterpret_cast<void*>(uintptr_t(77));
}  // namespace

EXPORT int use(int device) { return nvrtc::use_device(device); }
EXPORT const char* words(int error) { return cudaGetErrorString(cudaError_t(error)); }

EXPORT int route(int64_t tokens) {
  RouteArgs a{};
  a.T = tokens, a.E = 64, a.K = 4, a.G = a.topk_group = a.group_top = 1, a.dtype = DType::bf16;
  a.logits = at(1), a.logits_stride = 64, a.topk_weights = at(2), a.topk_ids = static_cast<int32_t*>(at(3));
  a.tokens_per_expert = static_cast<int32_t*>(at(4)), a.lse = at(5);
  return cuda::route(a, kStream);
}

EXPORT int sinkhorn() {
  SinkhornArgs a{};
  a.T = 64, a.E = 8, a.K = 1, a.dtype = DType::f32, a.logits = at(1), a.logits_stride = 8, a.plan = at(2);
  a.iterations = static_cast<int32_t*>(at(3)), a.topk_weights = at(4), a.topk_ids = static_cast<int32_t*>(at(5));
  a.tokens_per_expert = static_cast<int32_t*>(at(6)), a.workspace = at(7);
  return cuda::sinkhorn(a, kStream);
}

EXPORT int decode() {
  ExpertMlp p{};
  p.T = 4, p.H = 256, p.I = 128, p.E = 8, p.K = 2, p.dtype = p.weight_dtype = DType::bf16, p.gated = true;
  p.x = at(1), p.x_stride = 256;
  p.w13 = {at(2), 256 * 256, 256, 1, 0, false}, p.w2 = {at(3), 256 * 128, 128, 1, 0, false};
  p.topk_weights = at(4), p.row_to_slot = static_cast<int32_t*>(at(5)), p.slot_to_row = static_cast<int32_t*>(at(6));
  p.expert_offsets = static_cast<int32_t*>(at(7));
  return cuda::decode({p, at(8), at(9)}, kStream);
}

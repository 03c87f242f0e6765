// SPDX-License-Identifier: Apache-2.0
// Launchers by their structs, for tests that fill in what no op can: rows that nobody may read, any stride, any gather.
// tests/simt_direct.py reads the structs from the headers and compares their sizes with these.
#include <cstring>

#include "../../csrc/cuda/decode.h"
#include "../../csrc/cuda/grouped_gemm.h"
#include "../../csrc/cuda/grouped_wgrad.h"
#include "../../csrc/cuda/tensor_map.h"

namespace {

template <class Args> const char* run(cudaError_t (*launcher)(const Args&, cudaStream_t), const void* args) {
  Args copy;
  std::memcpy(&copy, args, sizeof copy);
  const cudaError_t error = launcher(copy, nullptr);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

using namespace moe::cuda;

/// A grouped product by the kernel of one row of the table; -1: by the chosen one.
struct RowsBy {
  GroupedRows rows;
  int32_t by;
};
cudaError_t rows_by(const RowsBy& args, cudaStream_t stream) {
  return args.by < 0 ? grouped_rows(args.rows, stream) : grouped_rows_by(args.by, args.rows, stream);
}

}  // namespace

extern "C" {
MOE_SIMT_EXPORT void moe_test_register(const void* p, size_t bytes, const char* name, bool written) {
  moe::simt::register_buffer(p, bytes, name, written);
}
MOE_SIMT_EXPORT void moe_test_unregister(const void* p) { moe::simt::unregister_buffer(p); }

MOE_SIMT_EXPORT size_t moe_test_size_grouped_wgrad() { return sizeof(GroupedWgradArgs); }
MOE_SIMT_EXPORT const char* moe_test_grouped_wgrad(const void* args) { return run(grouped_wgrad, args); }
MOE_SIMT_EXPORT bool moe_test_grouped_wgrad_uses_mma(const GroupedWgradArgs* args) {
  return grouped_wgrad_uses_mma(*args);
}
MOE_SIMT_EXPORT int64_t moe_test_grouped_wgrad_parts(const GroupedWgradArgs* args) {
  return grouped_wgrad_parts(*args);
}
MOE_SIMT_EXPORT int64_t moe_test_grouped_wgrad_partial_bytes(const GroupedWgradArgs* args) {
  return grouped_wgrad_partial_bytes(*args);
}

MOE_SIMT_EXPORT size_t moe_test_size_grouped_rows() { return sizeof(RowsBy); }
MOE_SIMT_EXPORT const char* moe_test_grouped_rows(const void* args) { return run(rows_by, args); }
MOE_SIMT_EXPORT int moe_test_choose_row(const GroupedRows* rows) { return choose_row(*rows); }

MOE_SIMT_EXPORT bool moe_test_grouped_wgrad_uses_wgmma(const GroupedWgradArgs* args) {
  return grouped_wgrad_uses_mma(*args) && grouped_wgrad_uses_wgmma(*args);
}

MOE_SIMT_EXPORT const char* moe_test_tensor_map_refusal(const void* base, int dtype, int rank, const int64_t* size,
                                                        const int64_t* stride, const int64_t* box, int swizzle) {
  BoxedTensor t{base, moe::DType(dtype), rank, {}, {}, {}, swizzle};
  for (int i = 0; i < kMapRank; ++i) t.size[i] = size[i], t.stride[i] = stride[i], t.box[i] = box[i];
  return tensor_map_refusal(t);
}

MOE_SIMT_EXPORT size_t moe_test_size_decode() { return sizeof(DecodeArgs); }
MOE_SIMT_EXPORT const char* moe_test_decode(const void* args) { return run(decode, args); }
MOE_SIMT_EXPORT bool moe_test_decode_uses_wgmma(const DecodeArgs* args) {
  return decode_uses_mma(args->mlp) && decode_uses_wgmma(args->mlp);
}
MOE_SIMT_EXPORT bool moe_test_decode_uses_mma(const DecodeArgs* args) { return decode_uses_mma(args->mlp); }
}

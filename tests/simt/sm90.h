// SPDX-License-Identifier: Apache-2.0
// What the programs for Hopper share: descriptors, tensor maps, small matrices of integers.
#pragma once
#include "../../csrc/cuda/ptx_sm90.cuh"
#include "../../csrc/cuda/tensor_map.h"
#include "harness.h"

namespace moe::test {

using cuda::TensorMap;

/// A descriptor of wgmma: bytes; layout 0 none, 1 128B, 2 64B, 3 32B.
MOE_DEVICE uint64_t descriptor(uint32_t start, uint32_t lbo, uint32_t sbo, uint32_t layout) {
  return uint64_t((start & 0x3ffff) >> 4) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 |
         uint64_t(layout) << 62;
}

/// The next multiple of 1024 in shared memory: tiles that are swizzled by 128 bytes start there.
MOE_DEVICE uint32_t aligned_shared() {
  MOE_SHARED(uint8_t, shared);
  return (cuda::cvta_to_shared(shared) + 1023) / 1024 * 1024;
}

inline uint16_t bf16_of(int v) { return bf16(float(v)).bits; }
inline float float_of(uint16_t bits) {
  bf16 v;
  v.bits = bits;
  return v;
}

/// A map of a dense tensor of bf16 or f32; sizes and boxes innermost first.
inline TensorMap map_of(const void* base, DType type, const std::vector<int64_t>& size, const std::vector<int64_t>& box,
                        int swizzle) {
  cuda::BoxedTensor tensor{base, type, int(size.size()), {}, {}, {}, swizzle};
  int64_t stride = dtype_bytes(type);
  for (size_t i = 0; i < size.size(); ++i) {
    tensor.size[i] = size[i], tensor.stride[i] = stride, tensor.box[i] = box[i];
    stride *= size[i];
  }
  TensorMap map{};
  if (cuda::encode_tensor_map(tensor, &map) != cudaSuccess) {
    std::printf("the tensor map is refused: %s\n", cuda::tensor_map_refusal(tensor));
    std::abort();
  }
  return map;
}

}  // namespace moe::test

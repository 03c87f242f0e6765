// SPDX-License-Identifier: Apache-2.0
// Tensor maps: how TMA, the copy engine of sm_90, is told where the boxes of a tensor lie. The driver encodes them on
// the host; a kernel takes them as __grid_constant__ parameters and names a box by its coordinates.
#pragma once
#include "../moe.h"
#include "device.h"
#include "runtime.h"

namespace moe::cuda {

/// What the driver encodes; opaque.
struct TensorMap { alignas(64) uint64_t words[16]; };

#if !defined(__CUDACC_RTC__)
constexpr int kMapRank = 5;

/// A tensor in global memory and the boxes in which it is copied. Dimension 0 is the contiguous one. What of a box lies
/// outside of the tensor is read as zeros and not written.
struct BoxedTensor {
  const void* base;
  DType dtype;               // 16 bits or f32
  int rank;                  // 1 .. kMapRank
  int64_t size[kMapRank];    // elements
  int64_t stride[kMapRank];  // bytes between two neighbours; of dimension 0 it is not read, of a size of 1 any
  int64_t box[kMapRank];     // elements
  int swizzle;               // bytes of a row of the box in shared memory whose chunks are permuted: 128, 64, 32 or 0
};

/// Why TMA cannot read this tensor so, or null. Plain C++: no driver is asked.
const char* tensor_map_refusal(const BoxedTensor&);

/// cudaErrorInvalidValue: refused as above, or by the driver. cudaErrorNotSupported: a driver that has no tensor maps.
cudaError_t encode_tensor_map(const BoxedTensor&, TensorMap*);
#endif

}  // namespace moe::cuda

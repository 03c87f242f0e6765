// SPDX-License-Identifier: Apache-2.0
// Tensor maps on the host: what TMA can read, checked here, and the driver's encoding. The driver is found at run time
// and never linked, so that the library loads where there is none.
#include "tensor_map.h"

#if !defined(MOE_SIMT)
#include <cuda.h>
#endif

namespace moe::cuda {
namespace {

constexpr int64_t kMostSize = int64_t(1) << 32, kMostStride = int64_t(1) << 40, kMostBox = 256;

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, or null.
Encode find_encode() {
#if defined(MOE_SIMT)
  return cuTensorMapEncodeTiled;
#else
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
#endif
}

CUtensorMapDataType type_of(DType t) {
  return t == DType::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : t == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}
CUtensorMapSwizzle swizzle_of(int bytes) {
  return bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                       : CU_TENSOR_MAP_SWIZZLE_NONE;
}

/// Of dimension i, a legal one where the size is 1 and nobody goes that far.
int64_t stride_of(const BoxedTensor& t, int i) { return t.size[i] == 1 ? 16 : t.stride[i]; }

/// Drivers up to 13.1 encode a bit that is wrong for tensors of less than 128 KiB (as CUTLASS 4.7 has it).
void repair_small(const BoxedTensor& t, TensorMap* map) {
#if defined(MOE_SIMT) && !defined(MOE_NVRTC)
  (void)t, (void)map;
#else
  int64_t bytes = t.size[0] * dtype_bytes(t.dtype);
  for (int i = 1; i < t.rank; ++i) bytes += (t.size[i] - 1) * stride_of(t, i);
  int driver = 0;
  if (bytes < 131072 && cudaDriverGetVersion(&driver) == cudaSuccess && driver <= 13010)
    map->words[1] &= ~(uint64_t(1) << 21);
#endif
}

}  // namespace

const char* tensor_map_refusal(const BoxedTensor& t) {
  if (t.rank < 1 || t.rank > kMapRank) return "a tensor map has 1 to 5 dimensions";
  if (t.dtype == DType::f64) return "no tensor map of float64 here";
  if (reinterpret_cast<uintptr_t>(t.base) % 16 != 0) return "the tensor does not start at a multiple of 16 bytes";
  if (t.swizzle != 0 && t.swizzle != 32 && t.swizzle != 64 && t.swizzle != 128)
    return "swizzled by 32, 64 or 128 bytes";
  const int64_t inner = t.box[0] * dtype_bytes(t.dtype);
  if (inner % 16 != 0) return "a row of the box is no multiple of 16 bytes";
  if (t.swizzle != 0 && inner > t.swizzle) return "a row of the box is longer than the swizzle";
  for (int i = 0; i < t.rank; ++i) {
    if (t.size[i] < 1) return "the tensor is empty";
    if (t.size[i] > kMostSize) return "more than 2^32 elements along a dimension";
    if (t.box[i] < 1 || t.box[i] > kMostBox) return "a box is 1 to 256 elements along a dimension";
    if (i == 0) continue;
    if (stride_of(t, i) % 16 != 0) return "rows do not start at multiples of 16 bytes";
    if (stride_of(t, i) < 1 || stride_of(t, i) >= kMostStride)
      return "a stride of less than 1 or of 2^40 bytes or more";
  }
  return nullptr;
}

cudaError_t encode_tensor_map(const BoxedTensor& t, TensorMap* map) {
  if (tensor_map_refusal(t) != nullptr) return cudaErrorInvalidValue;
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t size[kMapRank], stride[kMapRank] = {};
  cuuint32_t box[kMapRank], step[kMapRank];
  for (int i = 0; i < t.rank; ++i) {
    size[i] = cuuint64_t(t.size[i]), box[i] = cuuint32_t(t.box[i]), step[i] = 1;
    if (i > 0) stride[i - 1] = cuuint64_t(stride_of(t, i));
  }
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), type_of(t.dtype), cuuint32_t(t.rank), const_cast<void*>(t.base), size,
             stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(t.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  repair_small(t, map);
  return cudaSuccess;
}

}  // namespace moe::cuda

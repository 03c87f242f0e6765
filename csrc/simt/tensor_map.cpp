// SPDX-License-Identifier: Apache-2.0
// The stand-in for the driver's cuTensorMapEncodeTiled: the same limits (tests/golden/hw/limits.json), another
// encoding.
#include "tensor_map.h"

#include <cstring>

#include "host_api.h"

namespace moe::simt {

uint32_t element_bytes(int type) {
  static const uint8_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return bytes[type];
}

}  // namespace moe::simt

using namespace moe::simt;

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static const uint8_t spans[] = {0, 32, 64, 128};
  const bool known = type >= CU_TENSOR_MAP_DATA_TYPE_UINT8 && type <= CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ &&
                     interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle >= CU_TENSOR_MAP_SWIZZLE_NONE &&
                     swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  const auto address = reinterpret_cast<uintptr_t>(base);
  if (!known || map == nullptr || reinterpret_cast<uintptr_t>(map) % 64 != 0 || rank < 1 || rank > kMapRank ||
      base == nullptr || address % 16 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  EncodedMap encoded{};
  encoded.magic = kMapMagic, encoded.base = address, encoded.type = uint8_t(type), encoded.rank = uint8_t(rank);
  encoded.swizzle = spans[swizzle];
  for (uint32_t i = 0; i < rank; ++i) {
    if (size[i] < 1 || size[i] > uint64_t(1) << 32 || box[i] < 1 || box[i] > 256 || step[i] < 1 || step[i] > 8) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    encoded.last[i] = size[i] - 1, encoded.box[i] = uint16_t(box[i]), encoded.step[i] = uint8_t(step[i]);
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t(1) << 40) return CUDA_ERROR_INVALID_VALUE;
    encoded.strides[i - 1] = strides[i - 1];
  }
  const uint32_t inner = box[0] * element_bytes(type);
  if (inner % 16 != 0 || (encoded.swizzle != 0 && inner > encoded.swizzle)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &encoded, sizeof encoded);
  return CUDA_SUCCESS;
}

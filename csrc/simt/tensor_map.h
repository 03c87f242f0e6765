// SPDX-License-Identifier: Apache-2.0
// The emulator's own encoding of a tensor map, in the 128 bytes that the driver's takes.
#pragma once
#include <cstdint>

namespace moe::simt {

constexpr int kMapRank = 5;

struct EncodedMap {
  uint64_t magic;
  uint64_t base;
  uint64_t strides[kMapRank - 1];  // bytes, of dimensions 1 ...
  uint64_t last[kMapRank];         // index of each dimension
  uint16_t box[kMapRank];
  uint8_t type, rank, swizzle;  // CUtensorMapDataType; bytes of the swizzle's span
  uint8_t step[kMapRank];
};
static_assert(sizeof(EncodedMap) <= 128);

constexpr uint64_t kMapMagic = 0x6d6f652d746d6170;

uint32_t element_bytes(int type);

}  // namespace moe::simt

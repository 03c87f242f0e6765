// SPDX-License-Identifier: Apache-2.0
// What the kernels of sm_90a share: tiles in shared memory as TMA writes and wgmma reads them, and the ring of stages
// between a producer and its consumers.
//
// Rows are 128 bytes, 64 elements of 16 bits; their 16-byte chunks are permuted by the row (128-byte swizzle), and
// eight rows, 1024 bytes, are an atom. Along the sum ("K-major") a row is one column of D and 64 of the sum. Across it
// ("MN-major") a row is one of the sum and 64 columns of D; a tile of more columns is several boxes side by side, each
// of all its 64 rows.
#pragma once
#include "ptx_sm90.cuh"

namespace moe::cuda {

constexpr int kSliceBytes = 128, kSliceElements = 64, kAtomBytes = 1024, kBoxBytes = kSliceElements * kSliceBytes;
constexpr int kWarpgroup = 128, kStepElements = 16;  // threads; of the sum that one wgmma takes

/// An operand in shared memory as wgmma is told of it: where it starts, how far the next 64 columns are (lead) and how
/// far the next eight rows (stride), all in 16 bytes. Addresses take 14 bits of the low word: moving adds to it alone.
struct Operand {
  uint32_t low, high;
  MOE_DEVICE Operand moved(uint32_t bytes) const { return {low + bytes / 16, high}; }
  MOE_DEVICE uint64_t word() const { return uint64_t(high) << 32 | low; }
};
/// kAcross: across the sum.
template <bool kAcross> MOE_DEVICE Operand operand_at(uint32_t shared) {
  constexpr uint32_t lead = kAcross ? kBoxBytes : 16, stride = kAtomBytes, swizzle_128 = 1u << 30;
  return {shared / 16 | lead / 16 << 16, stride / 16 | swizzle_128};
}
/// From a step of kStepElements of the sum to the next.
template <bool kAcross> constexpr uint32_t kStepBytes = kStepElements * (kAcross ? kSliceBytes : 2);

/// Where chunk `chunk` of row `row` lies in a swizzled tile.
MOE_DEVICE uint32_t swizzled_chunk(int row, int chunk) { return uint32_t(row * kSliceBytes + (chunk ^ row % 8) * 16); }

/// A place in a ring of stages: which one, and the parity of the round.
template <int kStages> struct Turn {
  uint32_t stage = 0, round = 0;
  MOE_DEVICE void next() {
    if (++stage == kStages) stage = 0, round ^= 1;
  }
  /// The place `count` turns after the first one.
  static MOE_DEVICE Turn after(uint32_t count) { return {count % kStages, count / kStages % 2}; }
};

/// Stages of `kStageBytes` at a multiple of 1024 bytes, then their barriers: full and empty ones.
template <int kStages, int kStageBytes> struct Ring {
  static_assert(kStageBytes % kAtomBytes == 0);
  using Place = Turn<kStages>;
  uint32_t at;

  explicit MOE_DEVICE Ring(uint32_t shared) : at((shared + kAtomBytes - 1) / kAtomBytes * kAtomBytes) {}
  MOE_DEVICE uint32_t stage(const Place& p) const { return at + p.stage * kStageBytes; }
  /// An operand of the first stage in this one.
  MOE_DEVICE Operand in_stage(const Place& p, const Operand& o) const {
    return {o.low + p.stage * (kStageBytes / 16), o.high};
  }
  MOE_DEVICE uint32_t full(const Place& p) const { return at + kStages * kStageBytes + p.stage * 8; }
  MOE_DEVICE uint32_t empty(const Place& p) const { return full(p) + kStages * 8; }
  MOE_DEVICE uint32_t end() const { return at + kStages * (kStageBytes + 16); }
  /// By one thread, before fence_mbarrier_init and before all meet.
  MOE_DEVICE void start(uint32_t full_arrivals, uint32_t empty_arrivals) const {
    Place p;
    for (int i = 0; i < kStages; ++i, p.next()) {
      mbarrier_init(full(p), full_arrivals);
      mbarrier_init(empty(p), empty_arrivals);
    }
  }
  /// Waits until nobody reads the stage any more; at once in the first round.
  MOE_DEVICE void wait_empty(const Place& p) const { mbarrier_wait_parity(empty(p), p.round ^ 1); }
  MOE_DEVICE void wait_full(const Place& p) const { mbarrier_wait_parity(full(p), p.round); }
};

/// Four lanes have two neighbours each of four chunks of eight; then each has a chunk: lane % 4 says which.
MOE_DEVICE void exchange(float (&v)[8], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool odd = lane & bit;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i / 2 & bit) continue;
      const int other = i + 2 * bit;
      const float received = __shfl_xor_sync(kFullWarp, odd ? v[i] : v[other], bit);
      if (odd) v[i] = received;
      else v[other] = received;
    }
  }
}

}  // namespace moe::cuda

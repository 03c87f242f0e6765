// SPDX-License-Identifier: Apache-2.0
// What the hardware of Hopper does, dumped: accumulators and operands of wgmma, and where TMA puts every element of a
// box. tests/simt/probe_sm90.cu runs these on a GPU or on the emulator, against tests/golden/hw.
#pragma once
#include "ptx_sm90.cuh"
#include "tensor_map.h"

namespace moe::cuda {

/// Shared-memory address of the next multiple of 1024.
MOE_DEVICE uint32_t probe_base() {
  MOE_SHARED(uint8_t, shared);
  return (cvta_to_shared(shared) + 1023) / 1024 * 1024;
}
MOE_DEVICE uint16_t* probe_pointer(uint32_t address) {
  MOE_SHARED(uint8_t, shared);
  return reinterpret_cast<uint16_t*>(shared + (address - cvta_to_shared(shared)));
}

constexpr uint16_t kOne = 0x3f80;  // bf16
constexpr uint32_t kCores = 2048;  // bytes of 64x16 elements, K-major, not swizzled: cores of 8x8, 2 along k

MOE_DEVICE uint64_t probe_cores(uint32_t start) {
  return uint64_t((start & 0x3ffff) >> 4) | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32;
}
/// rows x 16 at `start`: element (row, k) is value(row, k).
template <class F> MOE_DEVICE void probe_fill(uint32_t start, int rows, F value) {
  for (int i = int(threadIdx.x); i < rows * 16; i += int(blockDim.x)) {
    const int row = i / 16, k = i % 16;
    probe_pointer(start)[row / 8 * 128 + k / 8 * 64 + row % 8 * 8 + k % 8] = value(row, k);
  }
}
MOE_DEVICE uint16_t probe_bf16(int v) { return uint16_t(cvt_rn_bf16x2_f32(0.f, float(v))); }

/// rows and columns [128][N / 2]: of each register of each thread.
template <int N> MOE_KERNEL probe_accumulator(float* rows, float* columns) {
#if MOE_SM90A
  const uint32_t a = probe_base(), b = a + kCores;
  float* const out[2] = {rows, columns};
  for (int turn = 0; turn < 2; ++turn) {
    probe_fill(a, 64, [&](int row, int k) { return k != 0 ? uint16_t(0) : turn == 0 ? probe_bf16(row) : kOne; });
    probe_fill(b, N, [&](int column, int k) { return k != 0 ? uint16_t(0) : turn == 1 ? probe_bf16(column) : kOne; });
    fence_proxy_async();
    __syncthreads();
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) d[i] = 0.f;
    wgmma_fence_operands(d);
    wgmma_fence();
    wgmma<bf16, N>(d, probe_cores(a), probe_cores(b), false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    wgmma_fence_operands(d);
    for (int i = 0; i < N / 2; ++i) out[turn][int(threadIdx.x) * (N / 2) + i] = d[i];
    __syncthreads();
  }
#endif
}

/// d [128][8] = a b with a from `registers` [128][4] and b the 16x16 identity.
MOE_KERNEL probe_a_registers(const uint32_t* registers, float* d_out) {
#if MOE_SM90A
  const uint32_t b = probe_base();
  probe_fill(b, 16, [](int column, int k) { return column == k ? kOne : uint16_t(0); });
  fence_proxy_async();
  __syncthreads();
  float d[8];
  uint32_t a[4];
  for (int i = 0; i < 8; ++i) d[i] = 0.f;
  for (int i = 0; i < 4; ++i) a[i] = registers[int(threadIdx.x) * 4 + i];
  wgmma_fence_operands(d);
  wgmma_fence();
  wgmma_a_registers<bf16, 16>(d, a, probe_cores(b), false);
  wgmma_commit_group();
  wgmma_wait_group<0>();
  wgmma_fence_operands(d);
  for (int i = 0; i < 8; ++i) d_out[int(threadIdx.x) * 8 + i] = d[i];
#endif
}

/// The operand that each of `count` descriptors selects from a tile, multiplied by an identity: d [count][128][N / 2].
/// The descriptors are for a tile at address 0; here it lies elsewhere.
template <int N, bool IsA, int Transposed>
MOE_KERNEL probe_descriptors(const uint16_t* tile, int elements, const uint64_t* descriptors, int count, float* d_out) {
#if MOE_SM90A
  const uint32_t identity = probe_base(), start = identity + kCores;
  probe_fill(identity, 64, [](int row, int k) { return row == k ? kOne : uint16_t(0); });
  for (int i = int(threadIdx.x); i < elements; i += int(blockDim.x)) probe_pointer(start)[i] = tile[i];
  fence_proxy_async();
  __syncthreads();
  for (int i = 0; i < count; ++i) {
    const uint64_t moved = descriptors[i] + (start >> 4);
    float d[N / 2];
    for (int j = 0; j < N / 2; ++j) d[j] = 0.f;
    wgmma_fence_operands(d);
    wgmma_fence();
    if constexpr (IsA) wgmma<bf16, N, Transposed, 0>(d, moved, probe_cores(identity), false);
    else wgmma<bf16, N, 0, Transposed>(d, probe_cores(identity), moved, false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    wgmma_fence_operands(d);
    for (int j = 0; j < N / 2; ++j) d_out[(int64_t(i) * 128 + int(threadIdx.x)) * (N / 2) + j] = d[j];
  }
#endif
}

/// Loads `count` boxes of `bytes` each, `at` [count][D], to byte offsets `to` [count]; then the `all` bytes as they
/// lie.
template <int D>
MOE_KERNEL probe_boxes(const MOE_GRID_CONSTANT TensorMap map, const int32_t* at, const uint32_t* to, int count,
                       uint32_t bytes, uint32_t all, uint16_t* out) {
#if MOE_SM90A
  const uint32_t start = probe_base(), bar = start + all;
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(bar, bytes * uint32_t(count));
    for (int i = 0; i < count; ++i) {
      int32_t corner[D];
      for (int j = 0; j < D; ++j) corner[j] = at[i * D + j];
      tma_load(start + to[i], &map, corner, bar);
    }
  }
  __syncthreads();
  mbarrier_wait_parity(bar, 0);
  for (int i = int(threadIdx.x); i < int(all / 2); i += int(blockDim.x)) out[i] = probe_pointer(start)[i];
#endif
}

}  // namespace moe::cuda

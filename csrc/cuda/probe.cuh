// SPDX-License-Identifier: Apache-2.0
// What the hardware does, dumped: where ldmatrix and stmatrix put every element, and the fragments of mma.sync.
// tests/simt/probe.cu runs these on a GPU or on the emulator; the maps are compared with tests/golden/hw.
#pragma once
#include "ptx.cuh"

namespace moe::cuda {

/// Element (matrix, row, column) holds its own number, matrix * 64 + row * 8 + column. registers [32][Matrices].
template <int Matrices, bool Transposed> MOE_KERNEL probe_ldmatrix(uint32_t* registers) {
  MOE_SHARED(uint16_t, tile);
  for (int i = int(threadIdx.x); i < Matrices * 64; i += kWarp) tile[i] = uint16_t(i);
  __syncthreads();
  const uint32_t row = cvta_to_shared(tile) + threadIdx.x % (8 * Matrices) * 16;
  uint32_t r[Matrices];
  if constexpr (Matrices == 1) Transposed ? ldmatrix_x1_trans(r, row) : ldmatrix_x1(r, row);
  if constexpr (Matrices == 2) Transposed ? ldmatrix_x2_trans(r, row) : ldmatrix_x2(r, row);
  if constexpr (Matrices == 4) Transposed ? ldmatrix_x4_trans(r, row) : ldmatrix_x4(r, row);
  for (int m = 0; m < Matrices; ++m) registers[int(threadIdx.x) * Matrices + m] = r[m];
}

/// Half h of register m of lane l holds its own number, (l * Matrices + m) * 2 + h. elements [Matrices][8][8].
template <int Matrices, bool Transposed> MOE_KERNEL probe_stmatrix(uint16_t* elements) {
  MOE_SHARED(uint16_t, tile);
  uint32_t r[Matrices];
  for (int m = 0; m < Matrices; ++m) {
    const uint32_t number = uint32_t(int(threadIdx.x) * Matrices + m) * 2;
    r[m] = number | (number + 1) << 16;
  }
#if MOE_ARCH >= 900
  const uint32_t row = cvta_to_shared(tile) + threadIdx.x % (8 * Matrices) * 16;
  if constexpr (Matrices == 1) Transposed ? stmatrix_x1_trans(row, r) : stmatrix_x1(row, r);
  if constexpr (Matrices == 2) Transposed ? stmatrix_x2_trans(row, r) : stmatrix_x2(row, r);
  if constexpr (Matrices == 4) Transposed ? stmatrix_x4_trans(row, r) : stmatrix_x4(row, r);
#endif
  __syncthreads();
  for (int i = int(threadIdx.x); i < Matrices * 64; i += kWarp) elements[i] = tile[i];
}

enum class Product { m16n8k16_bf16, m16n8k16_f16, m16n8k8_bf16, m16n8k8_tf32 };

/// d [32][4] = a b, of registers a [32][A] and b [32][B] as the caller has packed them. One block a product.
template <Product kind, int A, int B> MOE_KERNEL probe_mma(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = int(blockIdx.x * kWarp + threadIdx.x);
  uint32_t ra[A], rb[B];
  float sum[4] = {};
  for (int i = 0; i < A; ++i) ra[i] = a[lane * A + i];
  for (int i = 0; i < B; ++i) rb[i] = b[lane * B + i];
  if constexpr (kind == Product::m16n8k16_bf16) mma_m16n8k16_bf16(sum, ra, rb);
  if constexpr (kind == Product::m16n8k16_f16) mma_m16n8k16_f16(sum, ra, rb);
  if constexpr (kind == Product::m16n8k8_bf16) mma_m16n8k8_bf16(sum, ra, rb);
  if constexpr (kind == Product::m16n8k8_tf32) mma_m16n8k8_tf32(sum, ra, rb);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sum[i];
}

/// elected [1] += 1 for every lane that elect.sync elects: exactly one.
MOE_KERNEL probe_elect(uint32_t* elected) {
#if MOE_ARCH >= 900
  if (elect_sync(kFullWarp)) atomicAdd(elected, 1u);
#else
  if (threadIdx.x == 0) atomicAdd(elected, 1u);
#endif
}

}  // namespace moe::cuda

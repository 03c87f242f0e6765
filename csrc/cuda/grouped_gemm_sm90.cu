// SPDX-License-Identifier: Apache-2.0
// The tensor maps of a grouped product, and whether there are kernels that read them.
#include "grouped_gemm_sm90.h"

#include "grouped_gemm_config.h"
#include "launch.h"
#include "wgmma_tile.cuh"

namespace moe::cuda {

/// Runs nowhere: its largest block says for which architecture the code is that the device would run.
MOE_KERNEL __launch_bounds__(MOE_SM90A ? 64 : 32) wgmma_mark_kernel() {}

namespace {

bool in_halves(const RowsEpilogue& p) { return p.kind == Epilogue::activation && p.gated && !p.interleaved; }

}  // namespace

bool has_wgmma() {
#if defined(MOE_SIMT)  // compiled for the device that asks
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#else
  cudaFuncAttributes found{};
  return cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(wgmma_mark_kernel)) == cudaSuccess &&
         found.maxThreadsPerBlock == 64;
#endif
}

BoxedTensor boxed_a(const GroupedRows& g, int rows) {
  const int64_t bytes = dtype_bytes(g.dtype), experts = g.ends ? 1 : g.E;
  return {g.a,
          g.dtype,
          3,
          {g.K, g.S / experts, experts},
          {0, g.a_stride * bytes, g.a_expert * bytes},
          {kSliceElements, rows, 1},
          kSliceBytes};
}

BoxedTensor boxed_b(const GroupedRows& g, int columns) {
  const int64_t bytes = dtype_bytes(g.dtype), halves = in_halves(g.epilogue) ? 2 : 1, width = g.N / halves;
  const int64_t expert = g.b.expert_stride * bytes;
  if (g.b.col_stride == 1) {
    const int64_t row = g.b.row_stride * bytes;
    return {g.b.data,
            g.dtype,
            4,
            {g.K, width, halves, g.E},
            {0, row, width * row, expert},
            {kSliceElements, columns / 2, 1, 1},
            kSliceBytes};
  }
  return {g.b.data,
          g.dtype,
          4,
          {width, halves, g.K, g.E},
          {0, width * bytes, g.b.col_stride * bytes, expert},
          {64, 1, kSliceElements, 1},
          kSliceBytes};
}

bool in_tensor_maps(const GroupedRows& g) {
  if (g.b.col_stride != 1 && g.b.row_stride != 1) return false;
  return tensor_map_refusal(boxed_b(g, 128)) == nullptr && (g.gather || tensor_map_refusal(boxed_a(g, 64)) == nullptr);
}

}  // namespace moe::cuda

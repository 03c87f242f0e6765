// SPDX-License-Identifier: Apache-2.0
// Starts the kernels of sm_90a of one element type, gathered or not; a file each, so that they compile side by side.
#pragma once
#include "grouped_gemm_sm90.cuh"
#include "grouped_gemm_sm90.h"
#include "launch.h"

namespace moe::cuda {

/// As many blocks as processors, or fewer where there are fewer tiles.
template <class T, int kRow, bool kGather, bool kAcross>
cudaError_t launch_wgmma(const GroupedRows& g, cudaStream_t stream) {
  constexpr TileRow row = kTileRows[kRow];
  RowsMaps maps{};
  cudaError_t error = encode_tensor_map(boxed_b(g, row.columns), &maps.b);
  if (error == cudaSuccess && !kGather) error = encode_tensor_map(boxed_a(g, row.rows), &maps.a);
  int device = 0, processors = 0;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const bool halves = in_halves(g.epilogue);
  const int64_t column_tiles = ceil_of(halves ? g.N / 2 : g.N, halves ? row.columns / 2 : row.columns);
  const int64_t tiles = most_row_tiles(g.E, g.S, row.rows * row.cluster) * column_tiles;
  if (tiles > 0x3fffffff) return cudaErrorInvalidConfiguration;
  const int64_t most = processors / row.cluster, clusters = tiles < most ? tiles : most;
  LaunchShape shape{dim3(unsigned(clusters * row.cluster)), dim3(unsigned(row.threads())),
                    uint32_t(row.shared_bytes())};
  shape.cluster = row.cluster;
  return launch<grouped_rows_sm90_kernel<T, kRow, kGather, kAcross>>(shape, stream, maps, g, uint32_t(column_tiles));
}

/// The kernel of a row of kTileRows, which must not refuse the product.
template <class T, bool kGather, int kRow = 0>
cudaError_t launch_wgmma_row(int row, const GroupedRows& g, cudaStream_t stream) {
  if constexpr (!kTileRows[kRow].wgmma()) {
    return cudaErrorInvalidValue;
  } else {
    if (row != kRow) return launch_wgmma_row<T, kGather, kRow + 1>(row, g, stream);
    return g.b.col_stride == 1 ? launch_wgmma<T, kRow, kGather, false>(g, stream)
                               : launch_wgmma<T, kRow, kGather, true>(g, stream);
  }
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// Starts the tensor-core kernels of one element type; a file each, so that they compile side by side.
#pragma once
#include "grouped_gemm.cuh"
#include "launch.h"

namespace moe::cuda {

template <class T, int kRow, bool kAlongColumns> cudaError_t launch_tile(const GroupedRows& g, cudaStream_t stream) {
  constexpr TileRow row = kTileRows[kRow];
  const int64_t column_tiles = ceil_of(g.N, row.columns);
  const int64_t blocks = most_row_tiles(g.E, g.S, row.rows) * column_tiles;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch<grouped_rows_kernel<T, kRow, kAlongColumns>>(
      {dim3(unsigned(blocks)), dim3(unsigned(row.threads())), uint32_t(row.shared_bytes())}, stream, g,
      uint32_t(column_tiles));
}

/// The kernel of a row of kTileRows, which must not refuse the product.
template <class T, int kRow = 0> cudaError_t launch_row(int row, const GroupedRows& g, cudaStream_t stream) {
  if constexpr (kRow == kFma) {
    return cudaErrorInvalidValue;
  } else {
    if constexpr (!kTileRows[kRow].wgmma() && (sizeof(T) == 2 || kTileRows[kRow].has_tf32)) {
      if (row == kRow)
        return g.b.col_stride == 1 ? launch_tile<T, kRow, false>(g, stream) : launch_tile<T, kRow, true>(g, stream);
    }
    return launch_row<T, kRow + 1>(row, g, stream);
  }
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// Grouped products by wgmma: the host's side. Which products its tensor maps hold, and the launchers.
#pragma once
#include "grouped_gemm.h"
#include "tensor_map.h"

namespace moe::cuda {

/// Whether this build has code for sm_90a, and the current device runs it.
bool has_wgmma();

/// a, unless it is gathered, in boxes of `rows` rows, and b in boxes of half of `columns` columns, or of 64 across the
/// sum; each 64 elements of the sum. The coordinates of a: sum, row, expert; of b: sum, column, half (of w13: gate or
/// up), expert, or across the sum: column, half, sum, expert.
BoxedTensor boxed_a(const GroupedRows&, int rows);
BoxedTensor boxed_b(const GroupedRows&, int columns);
bool in_tensor_maps(const GroupedRows&);

// By a row of kTileRows, which must not refuse the product. A file each.
cudaError_t grouped_rows_sm90_bf16(int row, const GroupedRows&, cudaStream_t);
cudaError_t grouped_rows_sm90_f16(int row, const GroupedRows&, cudaStream_t);
cudaError_t gathered_rows_sm90_bf16(int row, const GroupedRows&, cudaStream_t);
cudaError_t gathered_rows_sm90_f16(int row, const GroupedRows&, cudaStream_t);

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// The grouped products of bf16 by wgmma, rows of a by their slots.
#include "grouped_gemm_sm90_launch.cuh"

namespace moe::cuda {

cudaError_t gathered_rows_sm90_bf16(int row, const GroupedRows& g, cudaStream_t stream) {
  return launch_wgmma_row<bf16, true>(row, g, stream);
}

}  // namespace moe::cuda

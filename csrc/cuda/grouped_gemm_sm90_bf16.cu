// SPDX-License-Identifier: Apache-2.0
// The grouped products of bf16 by wgmma.
#include "grouped_gemm_sm90_launch.cuh"

namespace moe::cuda {

cudaError_t grouped_rows_sm90_bf16(int row, const GroupedRows& g, cudaStream_t stream) {
  return launch_wgmma_row<bf16, false>(row, g, stream);
}

}  // namespace moe::cuda

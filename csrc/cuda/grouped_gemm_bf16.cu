// SPDX-License-Identifier: Apache-2.0
// The grouped products of bf16.
#include "grouped_gemm_launch.cuh"

namespace moe::cuda {

cudaError_t grouped_rows_bf16(int row, const GroupedRows& g, cudaStream_t stream) {
  return launch_row<bf16>(row, g, stream);
}

}  // namespace moe::cuda

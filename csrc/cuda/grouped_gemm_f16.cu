// SPDX-License-Identifier: Apache-2.0
// The grouped products of f16.
#include "grouped_gemm_launch.cuh"

namespace moe::cuda {

cudaError_t grouped_rows_f16(int row, const GroupedRows& g, cudaStream_t stream) {
  return launch_row<f16>(row, g, stream);
}

}  // namespace moe::cuda

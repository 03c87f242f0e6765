// SPDX-License-Identifier: Apache-2.0
// The grouped products of float, multiplied as tf32.
#include "grouped_gemm_launch.cuh"

namespace moe::cuda {

cudaError_t grouped_rows_tf32(int row, const GroupedRows& g, cudaStream_t stream) {
  return launch_row<float>(row, g, stream);
}

}  // namespace moe::cuda

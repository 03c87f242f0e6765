// SPDX-License-Identifier: Apache-2.0
// grouped_wgrad: the gradient of one weight matrix an expert, contracted over the expert's rows.
//   out[e][n][k] (+)= sum over the rows r of expert e, ascending, of row_scale[r] * n_side[r][n] * k_side[r][k]
// How many rows an expert has stands on the device only: the host knows bounds. An expert without rows gets exact
// zeros. A row outside its expert is never multiplied, so its NaN stays where it is.
#pragma once
#include "../moe.h"
#include "device.h"
#ifdef MOE_SIMT
#include "../simt/host_api.h"
#endif

namespace moe::cuda {

/// One operand: row r of the experts is row index[r] / divisor of data, or row r itself. An index of -1 is a row of
/// zeros. (index = row_to_slot, divisor = K: the token of a row.)
struct WgradSide {
  const void* data;  // element (row, column)
  int64_t row_stride, col_stride;
  const int32_t* index;  // [S] or null
  int32_t divisor;       // of index; 1 or more
};

struct GroupedWgradArgs {
  int64_t E, S, N, K;      // S bounds the rows of all experts together
  DType dtype, out_dtype;  // of both sides | of out: dtype, or f32
  bool tf32;               // float32 sides may be rounded to tf32 for the tensor cores
  bool accumulate;         // out += instead of out =; then an expert without rows leaves its part as it is
  WgradSide n_side, k_side;
  const void* row_scale;  // [S] acc, or null: 1. The product with n_side is rounded to dtype, as a stored one would be
  const int32_t* offs;    // [E] inclusive ends: expert_offsets + 1
  Weight out;             // data, expert_stride, row_stride (n), col_stride (k); either may be the contiguous one
};

/// Whether the tensor cores take it: bf16, f16 or tf32; 16-byte rows of sides and out, one index of out contiguous.
/// Otherwise a tile of plain multiply-adds in acc does it, for any stride.
bool grouped_wgrad_uses_mma(const GroupedWgradArgs&);
cudaError_t grouped_wgrad(const GroupedWgradArgs&, cudaStream_t);

}  // namespace moe::cuda

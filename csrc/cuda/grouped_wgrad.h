// SPDX-License-Identifier: Apache-2.0
// grouped_wgrad: the gradient of one weight matrix an expert, contracted over the expert's rows.
//   out[e][n][k] (+)= sum over the rows r of expert e, ascending, of n_side[r][n] * k_side[r][k]
// How many rows an expert has stands on the device only: the host knows bounds. An expert without rows gets exact
// zeros. A row of another expert is never multiplied, so its NaN stays where it is. `ends` is clamped to [0, S].
// Where the gradients have too few tiles to fill the processors, the rows of every expert are cut into `parts`
// stretches of equal length; their sums are kept apart and added in order: the same bits in every run.
#pragma once
#include "../moe.h"
#include "device.h"
#include "runtime.h"

namespace moe::cuda {

/// One operand. Row r of the experts is row gather[r] / per_token of data (gather[r] = -1: zeros), or row r itself,
/// which holds zeros where it is padding.
struct WgradSide {
  const void* data;  // element (row, column)
  int64_t row_stride, col_stride;
  const int32_t* gather;  // [S] row_to_slot, or null
  int64_t per_token;      // slots of a row of data: experts a token
};

struct GroupedWgradArgs {
  int64_t E, S, N, K;      // S bounds the rows of all experts together
  DType dtype, out_dtype;  // of both sides | of out
  bool allow_tf32;         // f32 only: products of 10-bit mantissas, sums in float32; else multiply-adds in float32
  bool accumulate;         // out += instead of out =; then an expert without rows leaves its part as it is
  WgradSide n_side, k_side;
  const int32_t* ends;  // [E] ends of the experts' rows: expert_offsets + 1
  void* out;
  int64_t out_expert, out_row, out_col;  // strides of e, n, k; either of n and k may be the contiguous one
  int64_t parts;                         // 0 and 1: an expert's rows are summed in one go
  void* partial;                         // [parts, E, N, K] acc, or [parts, E, K, N]; null for one part
};

#if !defined(__CUDACC_RTC__)
/// Whether the tensor cores take it: bf16, f16 or tf32, to dtype or f32; 16-byte rows of sides and out, one index of
/// out contiguous. Otherwise a tile of plain multiply-adds in acc does it, for any stride.
bool grouped_wgrad_uses_mma(const GroupedWgradArgs&);
/// How many parts fill the current device, from sizes alone: 1 unless the gradients have fewer tiles than it has room.
int64_t grouped_wgrad_parts(const GroupedWgradArgs&);
int64_t grouped_wgrad_partial_bytes(const GroupedWgradArgs&);  // of partial, for these parts
/// Whether, of those that the tensor cores take with out_col 1, wgmma does: sm_90a, bf16 or f16, sides
/// that a tensor map holds or that are gathered.
bool grouped_wgrad_uses_wgmma(const GroupedWgradArgs&);
cudaError_t grouped_wgrad_sm90(const GroupedWgradArgs&, cudaStream_t);
cudaError_t grouped_wgrad(const GroupedWgradArgs&, cudaStream_t);
#endif

}  // namespace moe::cuda

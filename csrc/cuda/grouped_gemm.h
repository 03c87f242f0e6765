// SPDX-License-Identifier: Apache-2.0
// Grouped products on a GPU: what a caller fills in and what it gets. Torch-free; nvcc, NVRTC and g++ read it alike.
//
//   grouped_rows    rows cut by expert: D[r, n] = sum over k of A[row(r), k] * B_e[n, k]        this file
//   grouped_fma     the same product and epilogues with plain multiply-adds, any dtype and width     grouped_fma.cu
//   grouped_wgrad   the contraction cut by expert: dW_e[n, k] = sum over r of e                 grouped_wgrad.h
//   decode          few rows, weights streamed once                                             decode.h
//
// Letters as in moe.h. Rows of D: a row r belongs to expert e where ends[e-1] <= r < ends[e] (ends[-1] = 0). Every
// column of every such row is written, by one thread each: no atomics, no partial sums, the same bits in every run.
// Rows in [ends[E-1], S) are not touched, in any output: whoever promises zeros there calls zero_rows_from first.
// `ends` is read on the device and never trusted: it is clamped to [0, S] and made to ascend, so that wrong values give
// wrong numbers, not wrong addresses. Everything else is known to the host: the launch needs no wait and fits a graph.
#pragma once
#include "../moe.h"
#include "device.h"
#include "runtime.h"

namespace moe::cuda {

constexpr int64_t kFmaColumns = 32;  // of D in one of the weight_parts of grouped_fma

/// What happens to a finished sum. w(r) = topk_weights[row_to_slot[r]]; 1 where topk_weights is null.
///   plain                D[r, n] -> out:  w * (sum + bias[e, n])
///   activation           forward of w13, N = 2I | I:  h = s * sum + bias with s = w if weight_on_input else 1;
///                        hidden <- sum, gate block then up block; act <- activation(h) * hidden_mask
///   activation_backward  dgrad of w2, N = I, K = H, u = sum * hidden_mask:  h from `hidden` as in the forward, then
///                        g = d activation(h) . (v * u) with v = 1 if weight_on_input else w
///                        grad_hidden <- s * g, as the rows of w13 lie: what w13's dgrad and wgrad read
///                        grad_biased <- g, as the rows of w13 lie: what the gradient of its bias sums
///                        weighted_act <- v * activation(h) * hidden_mask: what wgrad of w2 reads
///                        weight_parts[p, r] <- p-th share of <u, activation(h)>, of <g, hidden> if weight_on_input.
///                        d topk_weights = sum over p in order (+ <dO, b2[e]> unless weight_on_input: the caller's)
enum class Epilogue : int32_t { plain, activation, activation_backward };

/// Pointers that belong to another kind stay null. Tensors are of the product's dtype unless "acc" or noted. No output
/// may overlap an input or another output.
struct RowsEpilogue {
  Epilogue kind;
  const int32_t* row_to_slot;  // [S], -1 = padding: weight 0; null: slot r
  const void* topk_weights;    // [slots] acc, or null: all weights 1
  const void* bias;            // plain: [E, N]; else w13_bias [E, 2I | I], as the rows of w13 lie; or null

  void* out;  // plain: [S, N] out_dtype
  int64_t out_stride;
  DType out_dtype;

  Activation activation;
  bool gated;               // w13 has 2I rows
  bool interleaved;         // rows gate, up, gate, up ..; else all gate rows, then all up rows
  bool weight_on_input;     //
  double limit, alpha;      // of swigluoai
  const void* hidden_mask;  // [slots, I] acc, or null
  void* hidden;             // [S, 2I | I] gate block then up block; written (or null), read by the backward
  void* act;                // activation: [S, I]
  void* grad_hidden;        // backward: [S, 2I | I]
  void* grad_biased;        // backward: [S, 2I | I], or null; equals grad_hidden unless weight_on_input
  void* weighted_act;       // backward: [S, I], or null
  void* weight_parts;       // backward: [weight_part_count, S] acc, or null
};

/// One product, rows cut by expert.
struct GroupedRows {
  int64_t E, S, N, K;     // experts | rows at most | columns of D | length of the sum
  DType dtype;            // of a, b, bias
  bool allow_tf32;        // f32 only: products of 10-bit mantissas, sums in float32; else multiply-adds in float32
  const void* a;          // [rows of a, K]
  int64_t a_stride;       // between rows
  int64_t a_expert;       // where ends is null: between the first rows of two experts; else not read
  const int32_t* gather;  // [S] row_to_slot, and row r is a[gather[r] / per_token] (-1: zeros); null: row r is a[r]
  int64_t per_token;      // slots of a token in a: experts a token
  Weight b;               // element (e, n, k): row_stride of n, col_stride of k; one of them is 1 unless it is copied
  const int32_t* ends;    // [E] ends of the experts' rows: expert_offsets + 1. Null: S / E rows each
  RowsEpilogue epilogue;
};

#if !defined(__CUDACC_RTC__)
/// Queues the product on the kernel that choose_config (grouped_gemm_config.h) names for it.
/// cudaErrorInvalidValue: no kernel takes it.
cudaError_t grouped_rows(const GroupedRows&, cudaStream_t);

/// The same by hand: a row of kTileRows. cudaErrorInvalidValue where that row refuses the product.
int choose_row(const GroupedRows&);
cudaError_t grouped_rows_by(int row, const GroupedRows&, cudaStream_t);

/// Rows of weight_parts that grouped_rows writes for this product, with these pointers, on the current device: at most
/// ceil(N / kFmaColumns).
int64_t weight_part_count(const GroupedRows&);

/// out[r, 0 .. N) = 0 for r in [ends[E-1], S); rows of out are `bytes` long.
cudaError_t zero_rows_from(const int32_t* ends, int64_t E, int64_t S, void* out, int64_t bytes, cudaStream_t);

/// The last row of the table: any dtype, width, stride. Each of its weight_parts is kFmaColumns columns.
cudaError_t grouped_fma(const GroupedRows&, cudaStream_t);
#endif

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// Launcher of grouped_gemm: its cases as products with rows cut by group, or with the sum cut by group.
#include "grouped_gemm.h"
#include "grouped_wgrad.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

/// Rows cut by offs, or as many for each group.
cudaError_t by_rows(const GroupedGemmArgs& args, cudaStream_t stream) {
  const bool cut = args.grouped == Grouped::rows;
  GroupedRows g{};
  g.E = args.G, g.S = cut ? args.M : args.G * args.M, g.N = args.N, g.K = args.K, g.dtype = args.dtype;
  g.allow_tf32 = args.allow_tf32;
  g.a = args.a, g.a_stride = args.a_row, g.a_expert = args.a_group, g.b = args.b, g.ends = args.offs;
  g.epilogue.kind = Epilogue::plain, g.epilogue.bias = args.bias;
  g.epilogue.out = args.out, g.epilogue.out_stride = args.N, g.epilogue.out_dtype = args.out_dtype;
  if (cut) {
    const int64_t bytes = args.N * dtype_bytes(args.out_dtype);
    const cudaError_t error = zero_rows_from(args.offs, args.G, args.M, args.out, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  return grouped_rows(g, stream);
}

/// out_g = a[:, group g] b[group g, :], added to what stands there where there is a bias.
GroupedWgradArgs contraction(const GroupedGemmArgs& args) {
  GroupedWgradArgs w{};
  w.E = args.G, w.S = args.K, w.N = args.M, w.K = args.N, w.dtype = args.dtype, w.out_dtype = args.out_dtype;
  w.accumulate = args.accumulate || args.bias != nullptr, w.allow_tf32 = args.allow_tf32;
  w.n_side = {args.a, args.a_col, args.a_row, nullptr, 1};
  w.k_side = {args.b.data, args.b.col_stride, args.b.row_stride, nullptr, 1};
  w.ends = args.offs, w.out = args.out, w.out_expert = args.M * args.N, w.out_row = args.N, w.out_col = 1;
  if (w.E * w.N * w.K > 0) w.parts = grouped_wgrad_parts(w);
  w.partial = args.workspace;
  return w;
}

}  // namespace

int64_t grouped_gemm_workspace_bytes(const GroupedGemmArgs& args) {
  return args.grouped == Grouped::contraction ? grouped_wgrad_partial_bytes(contraction(args)) : 0;
}

cudaError_t grouped_gemm(const GroupedGemmArgs& args, cudaStream_t stream) {
  switch (args.grouped) {
    case Grouped::rows:
    case Grouped::none: return by_rows(args, stream);
    case Grouped::contraction: return grouped_wgrad(contraction(args), stream);
    case Grouped::cols: break;  // the binding turns the product
  }
  return cudaErrorInvalidValue;
}

}  // namespace moe::cuda

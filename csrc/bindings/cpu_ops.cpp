// SPDX-License-Identifier: Apache-2.0
// The stages that have kernels for CPU tensors only.
#include "tensors.h"

namespace moe::binding {
namespace {

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const MaybeTensor& offs_, const MaybeTensor& bias_,
                    int64_t out_dtype) {
  const DType dtype = dtype_of("grouped_gemm", "a", a);
  require(b.scalar_type() == a.scalar_type(), "grouped_gemm: a and b must have one dtype");
  require((a.dim() == 2 || a.dim() == 3) && (b.dim() == 2 || b.dim() == 3), "grouped_gemm: a and b must be 2-D or 3-D");
  require(out_dtype >= 0 && out_dtype <= 3, "grouped_gemm: no out_dtype ", out_dtype);
  const bool a3 = a.dim() == 3, b3 = b.dim() == 3;
  const MaybeTensor offs = to_type(offs_, ScalarType::Int), bias = to_type(bias_, a.scalar_type());
  require(offs.has_value() == !(a3 && b3), "grouped_gemm: offs belongs to a 2-D operand: give it unless both are 3-D");
  GroupedGemmArgs args{};
  args.M = a.size(a3), args.K = a.size(a3 + 1), args.N = b.size(b3 + 1);
  args.grouped = a3 && b3 ? Grouped::none : b3 ? Grouped::rows : a3 ? Grouped::cols : Grouped::contraction;
  args.G = b3 ? b.size(0) : a3 ? a.size(0) : offs->numel();
  require(b.size(b3) == args.K && (!a3 || a.size(0) == args.G) && (!offs || offs->numel() == args.G),
          "grouped_gemm: sizes of a, b and offs do not fit");
  if (bias) want("grouped_gemm", "bias", *bias, {args.G, args.N});
  if (offs) {
    const int64_t end = args.grouped == Grouped::rows ? args.M : args.grouped == Grouped::cols ? args.N : args.K;
    const int32_t* o = offs->const_data_ptr<int32_t>();
    for (int64_t g = 0; g < args.G; ++g)
      require(o[g] >= (g ? o[g - 1] : 0) && o[g] <= end, "grouped_gemm: offs must ascend within 0..", end, ", got ",
              o[g], " for group ", g);
  }
  args.dtype = dtype, args.out_dtype = DType(out_dtype);
  args.a = a.const_data_ptr(), args.a_group = a3 ? a.stride(0) : 0, args.a_row = a.stride(a3),
  args.a_col = a.stride(a3 + 1);
  const int64_t row = b.stride(b3 + 1), col = b.stride(b3);
  args.b = {b.const_data_ptr(), b3 ? b.stride(0) : 0, row, col, kPanel * row, false};
  args.offs = static_cast<const int32_t*>(data_of(offs)), args.bias = data_of(bias);
  const bool one_output = args.grouped == Grouped::rows || args.grouped == Grouped::cols;
  Tensor out = one_output ? empty(a, {args.M, args.N}, scalar_of(args.out_dtype))
                          : empty(a, {args.G, args.M, args.N}, scalar_of(args.out_dtype));
  args.out = out.mutable_data_ptr();
  const Workers workers = torch_workers();
  const Tensor space = workspace(a, cpu::grouped_gemm_workspace_bytes, args, workers);
  cpu::grouped_gemm(args, workers);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("grouped_gemm", boxed<&grouped_gemm>); }

}  // namespace moe::binding

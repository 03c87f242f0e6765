// SPDX-License-Identifier: Apache-2.0
// grouped_gemm as an op. Compiled once a backend, as ops.cpp.
#include "backend.h"

namespace moe::binding {
namespace {

void check_ends(const Tensor& offs, int64_t G, int64_t end) {
  const int32_t* o = offs.const_data_ptr<int32_t>();
  for (int64_t g = 0; g < G; ++g)
    require(o[g] >= (g ? o[g - 1] : 0) && o[g] <= end, "grouped_gemm: offs must ascend within 0..", end, ", got ", o[g],
            " for group ", g);
}

/// The product of checked operands; `a` and `b` of any strides. Into `main`, where it is given, the groups are added.
Tensor product(const Tensor& a_, const Tensor& b, const MaybeTensor& offs, const MaybeTensor& bias, DType out_dtype,
               bool allow_tf32, const MaybeTensor& main = {}) {
  const bool a3 = a_.dim() == 3, b3 = b.dim() == 3;
  // On a GPU columns are cut as the rows of the transposed product, and the rows of a lie along the sum.
  if (kOnDevice && a3 && !b3) {
    const Tensor turned =
        product(torch::stable::transpose(b, 0, 1), torch::stable::transpose(a_, 1, 2), offs, {}, out_dtype, allow_tf32);
    return dense(torch::stable::transpose(turned, 0, 1));
  }
  const Tensor a = kOnDevice && b3 && a_.stride(a3 + 1) != 1 ? dense(a_) : a_;
  GroupedGemmArgs args{};
  args.M = a.size(a3), args.K = a.size(a3 + 1), args.N = b.size(b3 + 1);
  args.grouped = a3 && b3 ? Grouped::none : b3 ? Grouped::rows : a3 ? Grouped::cols : Grouped::contraction;
  args.G = b3 ? b.size(0) : a3 ? a.size(0) : offs->numel();
  args.dtype = dtype_of("grouped_gemm", "a", a);
  // The CUDA kernels write the dtype of the operands or that of the sums.
  const DType acc = args.dtype == DType::f64 ? DType::f64 : DType::f32;
  args.out_dtype = kOnDevice && out_dtype != args.dtype ? acc : out_dtype;
  args.a = a.const_data_ptr(), args.a_group = a3 ? a.stride(0) : 0, args.a_row = a.stride(a3),
  args.a_col = a.stride(a3 + 1);
  const int64_t row = b.stride(b3 + 1), col = b.stride(b3);
  args.b = {b.const_data_ptr(), b3 ? b.stride(0) : 0, row, col, kPanel * row, false};
  args.offs = static_cast<const int32_t*>(data_of(offs)), args.bias = data_of(bias);
  args.allow_tf32 = allow_tf32, args.accumulate = main.has_value();
  const bool one_output = args.grouped == Grouped::rows || args.grouped == Grouped::cols;
  Tensor out = main         ? *main
               : one_output ? empty(a, {args.M, args.N}, scalar_of(args.out_dtype))
                            : empty(a, {args.G, args.M, args.N}, scalar_of(args.out_dtype));
  args.out = out.mutable_data_ptr();
  if (kOnDevice && bias && args.grouped == Grouped::contraction)  // the sums are added to what is there
    torch::stable::copy_(out, torch::stable::unsqueeze(*bias, 1));
  run(a, args);
  return to_type(out, scalar_of(out_dtype));
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const MaybeTensor& offs_, const MaybeTensor& bias_,
                    int64_t out_dtype, bool allow_tf32, const MaybeTensor& /*main_grad: for the backward*/) {
  dtype_of("grouped_gemm", "a", a);
  require(b.scalar_type() == a.scalar_type(), "grouped_gemm: a and b must have one dtype");
  require((a.dim() == 2 || a.dim() == 3) && (b.dim() == 2 || b.dim() == 3), "grouped_gemm: a and b must be 2-D or 3-D");
  require(out_dtype >= 0 && out_dtype <= 3, "grouped_gemm: no out_dtype ", out_dtype);
  const bool a3 = a.dim() == 3, b3 = b.dim() == 3;
  const MaybeTensor offs = to_type(offs_, ScalarType::Int), bias = to_type(bias_, a.scalar_type());
  require(offs.has_value() == !(a3 && b3), "grouped_gemm: offs belongs to a 2-D operand: give it unless both are 3-D");
  const int64_t M = a.size(a3), K = a.size(a3 + 1), N = b.size(b3 + 1);
  const int64_t G = b3 ? b.size(0) : a3 ? a.size(0) : offs->numel();
  require(b.size(b3) == K && (!a3 || a.size(0) == G) && (!offs || offs->numel() == G),
          "grouped_gemm: sizes of a, b and offs do not fit");
  if (bias) want("grouped_gemm", "bias", *bias, {G, N});
  require(!bias || !a3 || b3, "grouped_gemm: no bias where the columns are grouped");
  if (offs && !kOnDevice) check_ends(*offs, G, b3 ? M : a3 ? N : K);  // a GPU clamps them
  return product(a, b, offs, bias, DType(out_dtype), allow_tf32);
}

void grouped_gemm_backward(const Tensor& a, const Tensor& grad, const Tensor& offs_, Tensor main_grad,
                           bool allow_tf32) {
  constexpr const char* op = "grouped_gemm_backward";
  const DType dtype = dtype_of(op, "a", a);
  require(a.dim() == 2 && grad.dim() == 2 && grad.size(0) == a.size(0), op, ": a must be [M, k] and grad [M, N]");
  require(grad.scalar_type() == a.scalar_type(), op, ": a and grad must have one dtype");
  want(op, "main_grad", main_grad, {offs_.numel(), a.size(1), grad.size(1)});
  require(main_grad.scalar_type() == acc_of(dtype), op, ": main_grad must have the dtype of the sums");
  const Tensor offs = to_type(offs_, ScalarType::Int), turned = torch::stable::transpose(main_grad, 1, 2);
  require(main_grad.is_contiguous() || turned.is_contiguous(), op, ": main_grad must be contiguous, or its mT");
  if (!kOnDevice) check_ends(offs, offs.numel(), a.size(0));
  const DType acc = dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto columns = [](const Tensor& t) { return torch::stable::transpose(t, 0, 1); };
  if (main_grad.numel() == 0) return;
  if (main_grad.is_contiguous()) product(columns(a), grad, offs, {}, acc, allow_tf32, main_grad);
  else product(columns(grad), a, offs, {}, acc, allow_tf32, turned);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MOE_LIBRARY, MOE_KEY, m) {
  m.impl("grouped_gemm", boxed<&grouped_gemm>);
  m.impl("grouped_gemm_backward", boxed<&grouped_gemm_backward>);
}

}  // namespace moe::binding

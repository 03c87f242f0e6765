// SPDX-License-Identifier: Apache-2.0
// The stages as ops: checks, allocation, structs; no kernel code. The schemas stand in moe_kernels/schemas.py.
// Compiled once a backend, which is a set of functions run(tensor, args): cuda_ops.cpp includes this file for CUDA
// tensors, and built with MOE_SIMT it becomes the CUDA kernels on the emulator, in a namespace of their own.
#if defined(MOE_SIMT)
#include "simt_backend.h"
#elif defined(MOE_CUDA_OPS)
#include "cuda_backend.h"
#else
#include "cpu_backend.h"
#endif

namespace moe::binding {
namespace {

/// As narrow_ids of tensors.h; a backend that checks ids itself takes int32 as they are.
Tensor local_ids(const char* op, const Tensor& ids, int64_t E) {
  if (kChecksIds && ids.scalar_type() == ScalarType::Int) return dense(ids);
  return narrow_ids([](const Tensor& like, const NarrowIdsArgs& args) { run(like, args); }, op, ids, E, {});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route(const Tensor& logits_, int64_t top_k, int64_t scoring,
                                                 bool renormalize, double renormalize_eps, double scale,
                                                 double logit_softcap, int64_t num_expert_group, int64_t topk_group,
                                                 int64_t group_top, const MaybeTensor& bias_,
                                                 const MaybeTensor& padding_mask_) {
  const DType dtype = dtype_of("route", "logits", logits_);
  require(logits_.dim() == 2, "route: logits must be [T, E], got ", logits_.dim(), " dimensions");
  const int64_t T = logits_.size(0), E = logits_.size(1), G = num_expert_group;
  require(top_k >= 1 && top_k <= E, "route: top_k must be in 1..E=", E, ", got ", top_k);
  require(scoring >= 0 && scoring <= 2, "route: no scoring function ", scoring);
  require(G >= 1 && E % G == 0 && topk_group >= 1 && topk_group <= G && top_k <= topk_group * (E / G) && group_top >= 1,
          "route: groups do not fit: E=", E, ", num_expert_group=", G, ", topk_group=", topk_group, ", top_k=", top_k);
  if (bias_) want("route", "e_score_correction_bias", *bias_, {E});
  if (padding_mask_) {
    want("route", "padding_mask", *padding_mask_, {T});
    require(padding_mask_->scalar_type() == ScalarType::Bool, "route: padding_mask must be bool");
  }
  const ScalarType acc = acc_of(dtype);
  const Tensor logits = with_contiguous_rows(logits_);
  const MaybeTensor bias = to_type(bias_, acc), mask = to_type(padding_mask_, ScalarType::Bool);
  Tensor weights = empty(logits, {T, top_k}, acc), ids = empty(logits, {T, top_k}, ScalarType::Int);
  Tensor counts = empty(logits, {E}, ScalarType::Int), lse = empty(logits, {scoring == 0 ? T : 0}, acc);
  RouteArgs args{T,
                 E,
                 top_k,
                 G,
                 topk_group,
                 group_top,
                 {Scoring(scoring), renormalize, renormalize_eps, scale, logit_softcap},
                 dtype,
                 logits.const_data_ptr(),
                 logits.stride(0),
                 data_of(bias),
                 static_cast<const uint8_t*>(data_of(mask)),
                 weights.mutable_data_ptr(),
                 ids.mutable_data_ptr<int32_t>(),
                 counts.mutable_data_ptr<int32_t>(),
                 scoring == 0 ? lse.mutable_data_ptr() : nullptr,
                 nullptr};
  run(logits, args);
  return {weights, ids, counts, lse};
}

Tensor route_backward(const MaybeTensor& grad_weights_, const MaybeTensor& grad_lse_, const Tensor& logits_,
                      const Tensor& topk_ids, const Tensor& topk_weights, int64_t scoring, bool renormalize,
                      double renormalize_eps, double scale, double logit_softcap) {
  const DType dtype = dtype_of("route_backward", "logits", logits_);
  const ScalarType acc = acc_of(dtype);
  const Tensor logits = with_contiguous_rows(logits_);
  const int64_t T = logits.size(0), E = logits.size(1), K = topk_ids.size(1);
  want("route_backward", "topk_ids", topk_ids, {T, K});
  const MaybeTensor grad_weights = to_type(grad_weights_, acc), grad_lse = to_type(grad_lse_, acc);
  const Tensor weights = to_type(topk_weights, acc);
  want("route_backward", "topk_weights", weights, {T, K});
  if (grad_weights) want("route_backward", "grad_weights", *grad_weights, {T, K});
  if (grad_lse) want("route_backward", "grad_lse", *grad_lse, {scoring == 0 ? T : 0});
  const Tensor ids = local_ids("route_backward", topk_ids, E);
  Tensor out = empty(logits, {T, E}, logits.scalar_type());
  RouteBackwardArgs args{T,
                         E,
                         K,
                         {Scoring(scoring), renormalize, renormalize_eps, scale, logit_softcap},
                         dtype,
                         data_of(grad_weights),
                         scoring == 0 ? data_of(grad_lse) : nullptr,
                         logits.const_data_ptr(),
                         logits.stride(0),
                         ids.const_data_ptr<int32_t>(),
                         weights.const_data_ptr(),
                         out.mutable_data_ptr(),
                         nullptr};
  run(logits, args);
  return out;
}

/// The arguments that sum_scores and its backward share; `logits` and `mask` are kept by the caller.
SumScoresArgs sum_scores_args(const char* op, const Tensor& logits, int64_t scoring, bool normalize,
                              double logit_softcap, int64_t groups, const MaybeTensor& mask) {
  require(logits.dim() == 2, op, ": logits must be [T, E], got ", logits.dim(), " dimensions");
  require(scoring >= 0 && scoring <= 2, op, ": no scoring function ", scoring);
  const int64_t T = logits.size(0), E = logits.size(1);
  require(groups >= 1 && T % groups == 0, op, ": T=", T, " must be a multiple of groups=", groups);
  if (mask) want(op, "padding_mask", *mask, {T});
  return {T,
          E,
          groups,
          {Scoring(scoring), false, 0, 1, logit_softcap},
          normalize,
          dtype_of(op, "logits", logits),
          logits.const_data_ptr(),
          logits.stride(0),
          static_cast<const uint8_t*>(data_of(mask)),
          nullptr,
          nullptr,
          nullptr,
          nullptr};
}

Tensor sum_scores(const Tensor& logits_, int64_t scoring, bool normalize, double logit_softcap, int64_t groups,
                  const MaybeTensor& padding_mask_) {
  const Tensor logits = with_contiguous_rows(logits_);
  const MaybeTensor mask = to_type(padding_mask_, ScalarType::Bool);
  SumScoresArgs args = sum_scores_args("sum_scores", logits, scoring, normalize, logit_softcap, groups, mask);
  Tensor sums = empty(logits, {groups, args.E}, acc_of(args.dtype));
  const Workers workers = torch_workers();
  const Tensor space = workspace(logits, cpu::sum_scores_workspace_bytes, args, workers);
  args.sums = sums.mutable_data_ptr();
  cpu::sum_scores(args, workers);
  return sums;
}

Tensor sum_scores_backward(const Tensor& grad_sums_, const Tensor& logits_, int64_t scoring, bool normalize,
                           double logit_softcap, int64_t groups, const MaybeTensor& padding_mask_) {
  const Tensor logits = with_contiguous_rows(logits_);
  const MaybeTensor mask = to_type(padding_mask_, ScalarType::Bool);
  SumScoresArgs args = sum_scores_args("sum_scores_backward", logits, scoring, normalize, logit_softcap, groups, mask);
  want("sum_scores_backward", "grad_sums", grad_sums_, {groups, args.E});
  const MaybeTensor grad_sums = to_type(MaybeTensor(dense(grad_sums_)), acc_of(args.dtype));
  Tensor grad_logits = empty(logits, {args.T, args.E}, logits.scalar_type());
  const Workers workers = torch_workers();
  const Tensor space = workspace(logits, cpu::sum_scores_workspace_bytes, args, workers);
  args.grad_sums = data_of(grad_sums), args.grad_logits = grad_logits.mutable_data_ptr();
  cpu::sum_scores_backward(args, workers);
  return grad_logits;
}

Tensor limit_capacity(const Tensor& topk_ids, int64_t E, int64_t capacity, int64_t group_size) {
  require(topk_ids.dim() == 2, "limit_capacity: topk_ids must be [T, K], got ", topk_ids.dim(), " dimensions");
  require(E >= 1 && capacity >= 1 && group_size >= 1, "limit_capacity: num_experts, capacity and group_size must be ",
          "positive, got ", E, ", ", capacity, " and ", group_size);
  const Tensor ids = narrow_ids("limit_capacity", topk_ids, E);
  Tensor dropped = empty(topk_ids, {topk_ids.size(0), topk_ids.size(1)}, ScalarType::Bool);
  LimitCapacityArgs args{topk_ids.size(0),
                         E,
                         topk_ids.size(1),
                         capacity,
                         group_size,
                         ids.const_data_ptr<int32_t>(),
                         static_cast<uint8_t*>(dropped.mutable_data_ptr()),
                         nullptr};
  const Workers workers = torch_workers();
  const Tensor space = workspace(topk_ids, cpu::limit_capacity_workspace_bytes, args, workers);
  cpu::limit_capacity(args, workers);
  return dropped;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> permute(const Tensor& x_, const Tensor& topk_ids, int64_t E, int64_t align) {
  const DType dtype = dtype_of("permute", "x", x_);
  require(x_.dim() == 2 && topk_ids.dim() == 2, "permute: x must be [T, H] and topk_ids [T, K]");
  const Tensor x = with_contiguous_rows(x_);
  const int64_t T = x.size(0), H = x.size(1), K = topk_ids.size(1);
  want("permute", "topk_ids", topk_ids, {T, K});
  require(E >= 1 && align >= 1, "permute: num_experts and align must be positive, got ", E, " and ", align);
  const int64_t S = T * K, P = S + E * (align - 1);
  require(P < std::numeric_limits<int32_t>::max(), "permute: more than 2^31 rows");
  const Tensor ids = local_ids("permute", topk_ids, E);
  Tensor x_rows = empty(x, {P, H}, x.scalar_type()), row_to_slot = empty(x, {P}, ScalarType::Int);
  Tensor slot_to_row = empty(x, {S}, ScalarType::Int), offsets = empty(x, {E + 1}, ScalarType::Int);
  PermuteIndexArgs index{S,
                         E,
                         P,
                         align,
                         ids.const_data_ptr<int32_t>(),
                         offsets.mutable_data_ptr<int32_t>(),
                         row_to_slot.mutable_data_ptr<int32_t>(),
                         slot_to_row.mutable_data_ptr<int32_t>(),
                         nullptr};
  run(x, index);
  run(x, PermuteArgs{P, H, K, dtype, x.const_data_ptr(), x.stride(0), row_to_slot.const_data_ptr<int32_t>(),
                     x_rows.mutable_data_ptr()});
  return {x_rows, row_to_slot, slot_to_row, offsets};
}

Tensor unpermute_with(const Tensor& rows_, const Tensor& slot_to_row_, int64_t T, const MaybeTensor& topk_weights) {
  const DType dtype = dtype_of("unpermute", "rows", rows_);
  require(rows_.dim() == 2, "unpermute: rows must be [P, H]");
  require(T >= 0 && (T > 0 || slot_to_row_.numel() == 0) && (T == 0 || slot_to_row_.numel() % T == 0),
          "unpermute: slot_to_row of ", slot_to_row_.numel(), " slots does not fit ", T, " tokens");
  const int64_t P = rows_.size(0), H = rows_.size(1), K = T ? slot_to_row_.numel() / T : 0;
  const Tensor rows = with_contiguous_rows(rows_), slot_to_row = local_ids("unpermute", slot_to_row_, P);
  const MaybeTensor weights = to_type(topk_weights, acc_of(dtype));
  if (weights) want("unpermute", "topk_weights", *weights, {T, weights->dim() == 2 && T == 0 ? weights->size(1) : K});
  Tensor y = empty(rows, {T, H}, rows.scalar_type());
  run(rows, UnpermuteArgs{T, H, K, P, dtype, rows.const_data_ptr(), rows.stride(0),
                          slot_to_row.const_data_ptr<int32_t>(), data_of(weights), y.mutable_data_ptr()});
  return y;
}
Tensor unpermute(const Tensor& rows, const Tensor& slot_to_row, const Tensor& topk_weights) {
  require(topk_weights.dim() == 2, "unpermute: topk_weights must be [T, K]");
  return unpermute_with(rows, slot_to_row, topk_weights.size(0), topk_weights);
}
Tensor permute_backward(const Tensor& grad_rows, const Tensor& slot_to_row, int64_t T) {
  return unpermute_with(grad_rows, slot_to_row, T, {});
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad_y_, const Tensor& rows_, const Tensor& slot_to_row_,
                                              const Tensor& topk_weights) {
  const DType dtype = dtype_of("unpermute_backward", "rows", rows_);
  const Tensor rows = with_contiguous_rows(rows_), grad_y = with_contiguous_rows(to_type(grad_y_, rows_.scalar_type()));
  const int64_t T = topk_weights.size(0), K = topk_weights.size(1), P = rows.size(0), H = rows.size(1);
  want("unpermute_backward", "grad_y", grad_y, {T, H});
  want("unpermute_backward", "slot_to_row", slot_to_row_, {T * K});
  const Tensor slot_to_row = local_ids("unpermute_backward", slot_to_row_, P),
               weights = to_type(topk_weights, acc_of(dtype));
  Tensor grad_rows = empty(rows, {P, H}, rows.scalar_type()), grad_weights = empty(rows, {T, K}, acc_of(dtype));
  UnpermuteBackwardArgs args{T,
                             H,
                             K,
                             P,
                             dtype,
                             grad_y.const_data_ptr(),
                             rows.const_data_ptr(),
                             grad_y.stride(0),
                             rows.stride(0),
                             slot_to_row.const_data_ptr<int32_t>(),
                             weights.const_data_ptr(),
                             grad_rows.mutable_data_ptr(),
                             grad_weights.mutable_data_ptr(),
                             nullptr};
  run(rows, args);
  return {grad_rows, to_type(grad_weights, topk_weights.scalar_type())};
}

#ifdef MOE_CPU_OPS
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
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MOE_LIBRARY, MOE_KEY, m) {
  m.impl("route", boxed<&route>);
  m.impl("route_backward", boxed<&route_backward>);
  m.impl("sum_scores", boxed<&sum_scores>);
  m.impl("sum_scores_backward", boxed<&sum_scores_backward>);
  m.impl("limit_capacity", boxed<&limit_capacity>);
  m.impl("permute", boxed<&permute>);
  m.impl("permute_backward", boxed<&permute_backward>);
#ifdef MOE_CPU_OPS
  m.impl("grouped_gemm", boxed<&grouped_gemm>);
#endif
  m.impl("unpermute", boxed<&unpermute>);
  m.impl("unpermute_backward", boxed<&unpermute_backward>);
}

}  // namespace moe::binding

// SPDX-License-Identifier: Apache-2.0
// The stages as ops: checks, allocation, structs; no kernel code. The schemas stand in moe_kernels/schemas.py.
// Compiled once a backend, which is a set of functions run(tensor, args): cuda_ops.cpp includes this file for CUDA
// tensors, and built with MOE_SIMT it becomes the CUDA kernels on the emulator, in a namespace of their own.
#include "backend.h"

namespace moe::binding {
namespace {

/// As narrow_ids of tensors.h; a backend that checks ids itself takes int32 as they are.
Tensor local_ids(const char* op, const Tensor& ids, int64_t E) {
  if (kChecksIds && ids.scalar_type() == ScalarType::Int) return dense(ids);
  return narrow_ids([](const Tensor& like, const NarrowIdsArgs& args) { run(like, args); }, op, ids, E, {});
}

/// What is summed over groups of tokens: T of them in `groups`; 0 groups where nothing is.
void want_groups(const char* op, int64_t T, int64_t groups, int64_t least) {
  require(groups >= least && (groups == 0 || T % groups == 0), op, ": T=", T, " must be a multiple of groups=", groups);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& logits_, int64_t top_k, int64_t scoring,
                                                         bool renormalize, double renormalize_eps, double scale,
                                                         double logit_softcap, int64_t num_expert_group,
                                                         int64_t topk_group, int64_t group_top,
                                                         const MaybeTensor& bias_, const MaybeTensor& padding_mask_,
                                                         int64_t score_groups, bool normalize_scores) {
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
  want_groups("route", T, score_groups, 0);
  const ScalarType acc = acc_of(dtype);
  const Tensor logits = with_contiguous_rows(logits_);
  const MaybeTensor bias = to_type(bias_, acc), mask = to_type(padding_mask_, ScalarType::Bool);
  Tensor weights = empty(logits, {T, top_k}, acc), ids = empty(logits, {T, top_k}, ScalarType::Int);
  Tensor counts = empty(logits, {E}, ScalarType::Int), lse = empty(logits, {scoring == 0 ? T : 0}, acc);
  Tensor score_sums = empty(logits, {score_groups, E}, acc);
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
                 score_groups,
                 normalize_scores,
                 score_groups > 0 ? score_sums.mutable_data_ptr() : nullptr,
                 nullptr};
  run(logits, args);
  return {weights, ids, counts, lse, score_sums};
}

Tensor route_backward(const MaybeTensor& grad_weights_, const MaybeTensor& grad_lse_,
                      const MaybeTensor& grad_score_sums_, const Tensor& logits_, const Tensor& topk_ids,
                      const Tensor& topk_weights, int64_t scoring, bool renormalize, double renormalize_eps,
                      double scale, double logit_softcap, bool normalize_scores) {
  const DType dtype = dtype_of("route_backward", "logits", logits_);
  const ScalarType acc = acc_of(dtype);
  const Tensor logits = with_contiguous_rows(logits_);
  const int64_t T = logits.size(0), E = logits.size(1), K = topk_ids.size(1);
  want("route_backward", "topk_ids", topk_ids, {T, K});
  const MaybeTensor grad_weights = to_type(grad_weights_, acc), grad_lse = to_type(grad_lse_, acc),
                    grad_sums = to_type(grad_score_sums_, acc);
  const Tensor weights = to_type(topk_weights, acc);
  want("route_backward", "topk_weights", weights, {T, K});
  if (grad_weights) want("route_backward", "grad_weights", *grad_weights, {T, K});
  if (grad_lse) want("route_backward", "grad_lse", *grad_lse, {scoring == 0 ? T : 0});
  const int64_t B = grad_sums && grad_sums->dim() > 0 ? grad_sums->size(0) : 0;
  if (grad_sums) want("route_backward", "grad_score_sums", *grad_sums, {B, E});
  want_groups("route_backward", T, B, 0);
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
                         B,
                         normalize_scores,
                         B > 0 ? data_of(grad_sums) : nullptr,
                         out.mutable_data_ptr(),
                         nullptr};
  run(logits, args);
  return out;
}

RouteRule scoring_rule(const char* op, const Tensor& logits, int64_t scoring, double logit_softcap) {
  require(logits.dim() == 2, op, ": logits must be [T, E], got ", logits.dim(), " dimensions");
  require(scoring >= 0 && scoring <= 2, op, ": no scoring function ", scoring);
  return {Scoring(scoring), false, 0, 1, logit_softcap};
}

Tensor sum_scores(const Tensor& logits_, int64_t scoring, bool normalize, double logit_softcap, int64_t groups,
                  const MaybeTensor& padding_mask_) {
  const RouteRule rule = scoring_rule("sum_scores", logits_, scoring, logit_softcap);
  const DType dtype = dtype_of("sum_scores", "logits", logits_);
  const Tensor logits = with_contiguous_rows(logits_);
  const MaybeTensor mask = to_type(padding_mask_, ScalarType::Bool);
  const int64_t T = logits.size(0), E = logits.size(1);
  want_groups("sum_scores", T, groups, 1);
  if (mask) want("sum_scores", "padding_mask", *mask, {T});
  Tensor sums = empty(logits, {groups, E}, acc_of(dtype));
  SumScoresArgs args{T,
                     E,
                     groups,
                     rule,
                     normalize,
                     dtype,
                     logits.const_data_ptr(),
                     logits.stride(0),
                     static_cast<const uint8_t*>(data_of(mask)),
                     sums.mutable_data_ptr(),
                     nullptr};
  run(logits, args);
  return sums;
}

Tensor sum_scores_backward(const Tensor& grad_sums_, const Tensor& logits_, int64_t scoring, bool normalize,
                           double logit_softcap, int64_t groups, const MaybeTensor& padding_mask_) {
  const RouteRule rule = scoring_rule("sum_scores_backward", logits_, scoring, logit_softcap);
  const DType dtype = dtype_of("sum_scores_backward", "logits", logits_);
  const Tensor logits = with_contiguous_rows(logits_), grad_sums = to_type(grad_sums_, acc_of(dtype));
  const MaybeTensor mask = to_type(padding_mask_, ScalarType::Bool);
  const int64_t T = logits.size(0), E = logits.size(1);
  want_groups("sum_scores_backward", T, groups, 1);
  want("sum_scores_backward", "grad_sums", grad_sums, {groups, E});
  if (mask) want("sum_scores_backward", "padding_mask", *mask, {T});
  Tensor grad_logits = empty(logits, {T, E}, logits.scalar_type());
  SumScoresBackwardArgs args{T,
                             E,
                             groups,
                             rule,
                             normalize,
                             dtype,
                             grad_sums.const_data_ptr(),
                             logits.const_data_ptr(),
                             logits.stride(0),
                             static_cast<const uint8_t*>(data_of(mask)),
                             grad_logits.mutable_data_ptr(),
                             nullptr};
  run(logits, args);
  return grad_logits;
}

Tensor limit_capacity(const Tensor& topk_ids, int64_t E, int64_t capacity, int64_t group_size) {
  require(topk_ids.dim() == 2, "limit_capacity: topk_ids must be [T, K], got ", topk_ids.dim(), " dimensions");
  require(E >= 1 && capacity >= 1 && group_size >= 1, "limit_capacity: num_experts, capacity and group_size must be ",
          "positive, got ", E, ", ", capacity, " and ", group_size);
  const int64_t T = topk_ids.size(0), K = topk_ids.size(1);
  require(T * K < std::numeric_limits<int32_t>::max(), "limit_capacity: more than 2^31 slots");
  const Tensor ids = local_ids("limit_capacity", topk_ids, E);
  Tensor dropped = empty(topk_ids, {T, K}, ScalarType::Bool);
  LimitCapacityArgs args{T,
                         E,
                         K,
                         capacity,
                         group_size,
                         ids.const_data_ptr<int32_t>(),
                         static_cast<uint8_t*>(dropped.mutable_data_ptr()),
                         nullptr};
  run(topk_ids, args);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MOE_LIBRARY, MOE_KEY, m) {
  m.impl("route", boxed<&route>);
  m.impl("route_backward", boxed<&route_backward>);
  m.impl("sum_scores", boxed<&sum_scores>);
  m.impl("sum_scores_backward", boxed<&sum_scores_backward>);
  m.impl("limit_capacity", boxed<&limit_capacity>);
  m.impl("permute", boxed<&permute>);
  m.impl("permute_backward", boxed<&permute_backward>);
  m.impl("unpermute", boxed<&unpermute>);
  m.impl("unpermute_backward", boxed<&unpermute_backward>);
}

}  // namespace moe::binding

#include "router_ops.h"

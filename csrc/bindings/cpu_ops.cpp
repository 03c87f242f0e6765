// SPDX-License-Identifier: Apache-2.0
// The stages that have kernels for CPU tensors only.
#include "tensors.h"

namespace moe::binding {
namespace {

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
  const Tensor ids =
      narrow_ids([](const Tensor&, const NarrowIdsArgs& a) { cpu::narrow_ids(a); }, "limit_capacity", topk_ids, E, {});
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("sum_scores", boxed<&sum_scores>);
  m.impl("sum_scores_backward", boxed<&sum_scores_backward>);
  m.impl("limit_capacity", boxed<&limit_capacity>);
}

}  // namespace moe::binding

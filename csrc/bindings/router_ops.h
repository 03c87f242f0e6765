// SPDX-License-Identifier: Apache-2.0
// The routers that look at all tokens as ops: expert choice and Sinkhorn. Included by ops.cpp alone, once a backend.
#pragma once

namespace moe::binding {
namespace {

MaybeTensor mask_of(const char* op, const MaybeTensor& padding_mask, int64_t T) {
  if (!padding_mask) return padding_mask;
  want(op, "padding_mask", *padding_mask, {T});
  require(padding_mask->scalar_type() == ScalarType::Bool, op, ": padding_mask must be bool");
  return MaybeTensor(dense(*padding_mask));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_cuts(const Tensor& logits_, int64_t count, int64_t group_size,
                                                               const MaybeTensor& padding_mask) {
  const DType dtype = dtype_of("expert_cuts", "logits", logits_);
  require(logits_.dim() == 2, "expert_cuts: logits must be [T, E], got ", logits_.dim(), " dimensions");
  const int64_t T = logits_.size(0), E = logits_.size(1), n = group_size;
  require(n >= 1 && T % n == 0, "expert_cuts: T=", T, " must be a multiple of group_size=", n);
  require(count >= 1 && count <= n, "expert_cuts: count must be in 1..group_size=", n, ", got ", count);
  require(T < std::numeric_limits<int32_t>::max(), "expert_cuts: more than 2^31 tokens");
  const ScalarType acc = acc_of(dtype);
  const Tensor logits = with_contiguous_rows(logits_);
  const MaybeTensor mask = mask_of("expert_cuts", padding_mask, T);
  Tensor scores = empty(logits, {E, T}, acc), least = empty(logits, {T / n, E}, acc);
  Tensor last = empty(logits, {T / n, E}, ScalarType::Int), per_token = empty(logits, {T}, ScalarType::Int);
  Tensor per_expert = empty(logits, {E}, ScalarType::Int);
  ExpertCutsArgs args{T,
                      E,
                      n,
                      count,
                      dtype,
                      logits.const_data_ptr(),
                      logits.stride(0),
                      static_cast<const uint8_t*>(data_of(mask)),
                      scores.mutable_data_ptr(),
                      least.mutable_data_ptr(),
                      last.mutable_data_ptr<int32_t>(),
                      per_token.mutable_data_ptr<int32_t>(),
                      per_expert.mutable_data_ptr<int32_t>(),
                      nullptr};
  run(logits, args);
  return {scores, least, last, per_token, per_expert};
}

/// logits are an argument for the sake of the backward.
std::tuple<Tensor, Tensor> expert_choice(const Tensor& logits, const Tensor& scores_, const Tensor& least_,
                                         const Tensor& last_, int64_t slots) {
  const int64_t E = scores_.size(0), T = scores_.size(1), groups = least_.size(0);
  const DType dtype = dtype_of("expert_choice", "scores", scores_);
  want("expert_choice", "logits", logits, {T, E});
  require(acc_of(dtype) == scores_.scalar_type(), "expert_choice: scores must be float32 or float64");
  require(groups > 0 ? T % groups == 0 : T == 0, "expert_choice: T=", T, " must be a multiple of the groups=", groups);
  want("expert_choice", "least", least_, {groups, E}), want("expert_choice", "last", last_, {groups, E});
  require(slots >= 1 && slots <= E, "expert_choice: slots must be in 1..E=", E, ", got ", slots);
  const Tensor scores = dense(scores_), least = to_type(least_, scores.scalar_type());
  const Tensor last = to_type(last_, ScalarType::Int);
  Tensor weights = empty(scores, {T, slots}, scores.scalar_type()), ids = empty(scores, {T, slots}, ScalarType::Int);
  run(scores,
      ExpertChoiceArgs{T, E, groups ? T / groups : 1, slots, dtype, scores.const_data_ptr(), least.const_data_ptr(),
                       last.const_data_ptr<int32_t>(), weights.mutable_data_ptr(), ids.mutable_data_ptr<int32_t>()});
  return {weights, ids};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn(const Tensor& logits_, int64_t top_k, double tol,
                                                            int64_t max_iterations, const MaybeTensor& padding_mask) {
  const DType dtype = dtype_of("sinkhorn", "logits", logits_);
  require(logits_.dim() == 2, "sinkhorn: logits must be [T, E], got ", logits_.dim(), " dimensions");
  const int64_t T = logits_.size(0), E = logits_.size(1);
  require(top_k >= 1 && top_k <= E, "sinkhorn: top_k must be in 1..E=", E, ", got ", top_k);
  require(tol > 0 && max_iterations >= 1, "sinkhorn: tol and max_iterations must be positive, got ", tol, " and ",
          max_iterations);
  const ScalarType acc = acc_of(dtype);
  const Tensor logits = with_contiguous_rows(logits_);
  const MaybeTensor mask = mask_of("sinkhorn", padding_mask, T);
  Tensor plan = empty(logits, {T, E}, acc), iterations = empty(logits, {1}, ScalarType::Int);
  Tensor weights = empty(logits, {T, top_k}, acc), ids = empty(logits, {T, top_k}, ScalarType::Int);
  Tensor counts = empty(logits, {E}, ScalarType::Int);
  SinkhornArgs args{T,
                    E,
                    top_k,
                    max_iterations,
                    tol,
                    dtype,
                    logits.const_data_ptr(),
                    logits.stride(0),
                    static_cast<const uint8_t*>(data_of(mask)),
                    plan.mutable_data_ptr(),
                    iterations.mutable_data_ptr<int32_t>(),
                    weights.mutable_data_ptr(),
                    ids.mutable_data_ptr<int32_t>(),
                    counts.mutable_data_ptr<int32_t>(),
                    nullptr};
  run(logits, args);
  return {weights, ids, counts, plan, iterations};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MOE_LIBRARY, MOE_KEY, m) {
  m.impl("expert_cuts", boxed<&expert_cuts>);
  m.impl("expert_choice", boxed<&expert_choice>);
  m.impl("sinkhorn", boxed<&sinkhorn>);
}

}  // namespace moe::binding

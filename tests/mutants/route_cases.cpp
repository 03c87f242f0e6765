// SPDX-License-Identifier: Apache-2.0
// route and its backward, for the mutation suite: shapes with tails in every direction, all scores, groups, a mask.
#include "stage_cases.h"

namespace moe::faults {
namespace {

struct Shape {
  int T, E, K, G, topk_group, group_top, stride;
  Scoring scoring;
  bool renormalize, bias, mask;
  double softcap;
  int offset = 0;  // elements from an aligned address to the tensors
  int groups = 0;  // of tokens, with sums of their scores
  bool normalize = false;
};

RouteRule rule_of(const Shape& s) { return {s.scoring, s.renormalize, s.renormalize ? 1e-20 : 0., 1.5, s.softcap}; }

template <class T> DType dtype_of();
template <> DType dtype_of<float>() { return DType::f32; }
template <> DType dtype_of<double>() { return DType::f64; }
template <> DType dtype_of<bf16>() { return DType::bf16; }

template <class T> cudaError_t forward(const Shape& s, Outputs& out) {
  using A = acc_t<T>;
  std::vector<T> values = numbers<T>(size_t(s.T) * s.stride + s.offset, 1);
  for (int e = 0; e < s.E; ++e)
    values[size_t(2 % s.T) * s.stride + s.offset + e] = T(-INFINITY);  // a token without any expert
  test::Device<T> logits(values);
  test::Device<A> bias(numbers<A>(size_t(s.E), 2)), weights(size_t(s.T) * s.K + s.offset), lse(size_t(s.T));
  std::vector<uint8_t> live(size_t(s.T), 1);
  live[size_t(s.T) / 2] = 0;
  test::Device<uint8_t> mask(live);
  test::Device<int32_t> ids(size_t(s.T) * s.K + s.offset), counts(size_t(s.E));
  RouteArgs args{};
  args.T = s.T, args.E = s.E, args.K = s.K, args.G = s.G, args.topk_group = s.topk_group, args.group_top = s.group_top;
  args.rule = rule_of(s), args.dtype = dtype_of<T>(), args.logits = raw(logits) + s.offset,
  args.logits_stride = s.stride;
  args.correction_bias = s.bias ? raw(bias) : nullptr, args.padding_mask = s.mask ? raw(mask) : nullptr;
  args.topk_weights = raw(weights) + s.offset, args.topk_ids = raw(ids) + s.offset;
  args.tokens_per_expert = raw(counts);
  args.lse = s.scoring == Scoring::softmax ? raw(lse) : nullptr;
  test::Device<A> sums(size_t(s.groups) * s.E);
  args.B = s.groups, args.normalize_scores = s.normalize, args.score_sums = s.groups ? raw(sums) : nullptr;
  test::Device<uint8_t> workspace(size_t(cuda::route_workspace_bytes(args)));
  args.workspace = raw(workspace);
  const cudaError_t error = cuda::route(args, nullptr);
  out.add(weights), out.add(ids), out.add(counts), out.add(lse), out.add(sums);
  return error;
}

template <class T> cudaError_t backward(const Shape& s, Outputs& out) {
  using A = acc_t<T>;
  test::Device<T> logits(numbers<T>(size_t(s.T) * s.stride + s.offset, 1)), grad(size_t(s.T) * s.E + s.offset);
  std::vector<int32_t> chosen(size_t(s.T) * s.K);
  for (size_t i = 0; i < chosen.size(); ++i) chosen[i] = int32_t((i / s.K + i % s.K * 3) % size_t(s.E));
  chosen[1] = -1;
  chosen[chosen.size() - size_t(s.K)] = chosen[chosen.size() - size_t(s.K) - 1] = s.E;  // absent, too
  std::vector<A> given = numbers<A>(size_t(s.T) * s.K, 3);
  for (A& w : given) w = w * w + A(0.01);
  given[size_t(s.K)] = 0;
  test::Device<int32_t> ids(chosen);
  test::Device<A> weights(given), pulls(numbers<A>(size_t(s.T) * s.K, 4)), lse(numbers<A>(size_t(s.T), 5));
  RouteBackwardArgs args{};
  args.T = s.T, args.E = s.E, args.K = s.K, args.rule = rule_of(s), args.dtype = dtype_of<T>();
  args.grad_weights = raw(pulls), args.grad_lse = s.scoring == Scoring::softmax ? raw(lse) : nullptr;
  args.logits = raw(logits) + s.offset, args.logits_stride = s.stride, args.topk_ids = raw(ids),
  args.topk_weights = raw(weights);
  args.grad_logits = raw(grad) + s.offset;
  test::Device<A> pull_sums(numbers<A>(size_t(s.groups) * s.E, 6));
  args.B = s.groups, args.normalize_scores = s.normalize, args.grad_score_sums = s.groups ? raw(pull_sums) : nullptr;
  const cudaError_t error = cuda::route_backward(args, nullptr);
  out.add(grad);
  return error;
}

template <class T> std::string both(const Shape& s) {
  const std::string report = compare([&](Outputs& out) { return forward<T>(s, out); });
  return report.empty() ? compare([&](Outputs& out) { return backward<T>(s, out); }) : report;
}

}  // namespace

MOE_CASE(softmax) { return both<float>({67, 37, 3, 1, 1, 1, 37, Scoring::softmax, true, false, true, 0, 1}); }
MOE_CASE(groups) { return both<bf16>({20, 40, 6, 8, 3, 2, 43, Scoring::sigmoid, true, true, false, 0}); }
MOE_CASE(wide_groups) { return both<float>({6, 80, 33, 2, 1, 33, 80, Scoring::sigmoid, false, true, false, 0}); }
MOE_CASE(many_groups) { return both<float>({5, 68, 34, 34, 33, 1, 68, Scoring::softmax, true, false, false, 0}); }
MOE_CASE(doubles) { return both<double>({9, 33, 2, 1, 1, 1, 33, Scoring::softmax, false, false, false, 3}); }
MOE_CASE(every_expert) { return both<bf16>({3, 5, 5, 1, 1, 1, 5, Scoring::sqrtsoftplus, false, false, false, 3}); }
MOE_CASE(sums) { return both<float>({67, 37, 3, 1, 1, 1, 37, Scoring::softmax, true, false, true, 0, 1, 1}); }
MOE_CASE(sums_of_groups) {
  return both<bf16>({140, 20, 2, 1, 1, 1, 20, Scoring::sigmoid, true, true, false, 0, 3, 2, true});
}
MOE_CASE(sums_of_short_groups) {
  return both<float>({21, 5, 2, 1, 1, 1, 7, Scoring::sqrtsoftplus, false, false, true, 2, 0, 7, true});
}
MOE_CASE(sums_of_long_rows) {
  return both<double>({67, 130, 2, 1, 1, 1, 130, Scoring::sigmoid, false, false, false, 0, 0, 1});
}

}  // namespace moe::faults

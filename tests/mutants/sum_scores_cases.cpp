// SPDX-License-Identifier: Apache-2.0
// sum_scores and its backward, for the mutation suite: one group and several, shorter and longer than a run.
#include "stage_cases.h"

namespace moe::faults {
namespace {

struct Shape {
  int T, E, B, stride;
  Scoring scoring;
  bool normalize, mask;
  double softcap;
  int offset = 0;  // elements from an aligned address to the tensors
};

std::vector<uint8_t> mask_of(const Shape& s) {
  std::vector<uint8_t> live(size_t(s.T), 1);
  live[size_t(s.T) / 2] = 0;
  return live;
}
template <class T> std::vector<T> logits_of(const Shape& s) {
  std::vector<T> values = numbers<T>(size_t(s.T) * s.stride + s.offset, 1);
  for (int e = 0; e < s.E; ++e) values[size_t(2 % s.T) * s.stride + s.offset + e] = T(-INFINITY);
  return values;
}

template <class T> cudaError_t forward(DType dtype, const Shape& s, Outputs& out) {
  using A = acc_t<T>;
  test::Device<T> logits(logits_of<T>(s));
  test::Device<uint8_t> mask(mask_of(s));
  test::Device<A> sums(size_t(s.B) * s.E);
  SumScoresArgs args{s.T,
                     s.E,
                     s.B,
                     {s.scoring, false, 0, 1, s.softcap},
                     s.normalize,
                     dtype,
                     raw(logits) + s.offset,
                     s.stride,
                     s.mask ? raw(mask) : nullptr,
                     raw(sums),
                     nullptr};
  test::Device<uint8_t> workspace(size_t(cuda::sum_scores_workspace_bytes(args)));
  args.workspace = raw(workspace);
  const cudaError_t error = cuda::sum_scores(args, nullptr);
  out.add(sums);
  return error;
}

template <class T> cudaError_t backward(DType dtype, const Shape& s, Outputs& out) {
  using A = acc_t<T>;
  test::Device<T> logits(logits_of<T>(s)), grad(size_t(s.T) * s.E + s.offset);
  test::Device<uint8_t> mask(mask_of(s));
  test::Device<A> pull(numbers<A>(size_t(s.B) * s.E, 2));
  const cudaError_t error = cuda::sum_scores_backward({s.T,
                                                       s.E,
                                                       s.B,
                                                       {s.scoring, false, 0, 1, s.softcap},
                                                       s.normalize,
                                                       dtype,
                                                       raw(pull),
                                                       raw(logits) + s.offset,
                                                       s.stride,
                                                       s.mask ? raw(mask) : nullptr,
                                                       raw(grad) + s.offset,
                                                       nullptr},
                                                      nullptr);
  out.add(grad);
  return error;
}

template <class T> std::string both(DType dtype, const Shape& s) {
  const std::string report = compare([&](Outputs& out) { return forward<T>(dtype, s, out); });
  return report.empty() ? compare([&](Outputs& out) { return backward<T>(dtype, s, out); }) : report;
}

}  // namespace

MOE_CASE(softmax) { return both<float>(DType::f32, {67, 37, 1, 37, Scoring::softmax, false, true, 0, 1}); }
MOE_CASE(groups) { return both<bf16>(DType::bf16, {140, 20, 2, 23, Scoring::sigmoid, true, false, 0, 3}); }
MOE_CASE(short_groups) { return both<float>(DType::f32, {21, 5, 7, 5, Scoring::sqrtsoftplus, true, true, 2}); }
MOE_CASE(long_rows) { return both<double>(DType::f64, {67, 130, 1, 130, Scoring::softmax, false, true, 0}); }

}  // namespace moe::faults

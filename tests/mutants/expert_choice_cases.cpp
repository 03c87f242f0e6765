// SPDX-License-Identifier: Apache-2.0
// expert_choice, for the mutation suite: tails in every direction, ties, masks, groups, more tokens than threads.
#include "stage_cases.h"

namespace moe::faults {
namespace {

struct Shape {
  int T, E, n, C, K;
  bool mask, ties;
};

/// Logits of few different values where ties are wanted; a token without any expert.
template <class T> std::vector<T> logits_of(const Shape& s) {
  std::vector<T> values = numbers<T>(size_t(s.T) * s.E, 1);
  if (s.ties)
    for (size_t i = 0; i < values.size(); ++i) values[i] = T(float(i * 7 % 3 == 0));
  for (int e = 0; e < s.E; ++e) values[size_t(s.T) / 3 * s.E + e] = T(-INFINITY);
  return values;
}
std::vector<uint8_t> mask_of(const Shape& s) {
  std::vector<uint8_t> live(size_t(s.T), 1);
  for (size_t t = 0; t < live.size(); t += 5) live[t] = 0;
  return live;
}

template <class T> cudaError_t choice(const Shape& s, Outputs& out) {
  using A = acc_t<T>;
  const size_t cuts = size_t(s.T / s.n) * s.E, S = size_t(s.T) * s.K;
  test::Device<T> logits(logits_of<T>(s));
  test::Device<uint8_t> mask(mask_of(s));
  test::Device<A> scores(size_t(s.T) * s.E), least(cuts), weights(S);
  test::Device<int32_t> last(cuts), per_token(size_t(s.T)), per_expert(size_t(s.E)), ids(S);
  ExpertCutsArgs args{};
  args.T = s.T, args.E = s.E, args.n = s.n, args.C = s.C, args.logits = raw(logits), args.logits_stride = s.E;
  args.dtype = sizeof(T) == 8 ? DType::f64 : sizeof(T) == 4 ? DType::f32 : DType::bf16;
  args.padding_mask = s.mask ? raw(mask) : nullptr;
  args.scores = raw(scores), args.least = raw(least), args.last = raw(last);
  args.experts_per_token = raw(per_token), args.tokens_per_expert = raw(per_expert);
  cudaError_t error = cuda::expert_cuts(args, nullptr);
  if (error != cudaSuccess) return error;
  const DType acc = sizeof(A) == 8 ? DType::f64 : DType::f32;
  error = cuda::expert_choice({s.T, s.E, s.n, s.K, acc, raw(scores), raw(least), raw(last), raw(weights), raw(ids)},
                              nullptr);
  out.add(scores), out.add(least), out.add(last), out.add(per_token), out.add(per_expert), out.add(weights);
  out.add(ids);
  return error;
}

}  // namespace

MOE_CASE(choice) {
  return compare([](Outputs& out) { return choice<float>({21, 5, 21, 9, 5, true, false}, out); });
}
MOE_CASE(choice_of_groups) {
  return compare([](Outputs& out) { return choice<bf16>({16, 37, 8, 3, 37, false, true}, out); });
}
MOE_CASE(choice_of_many) {
  return compare([](Outputs& out) { return choice<float>({260, 1, 260, 250, 1, false, true}, out); });
}
MOE_CASE(choice_of_doubles) {
  return compare([](Outputs& out) { return choice<double>({9, 3, 9, 9, 2, true, false}, out); });
}

}  // namespace moe::faults

// SPDX-License-Identifier: Apache-2.0
// sinkhorn, for the mutation suite: several tiles a block and blocks a grid, a mask, a token without any expert.
#include "stage_cases.h"

namespace moe::faults {
namespace {

struct Shape {
  int T, E, K, steps;
  bool mask;
};

template <class T> cudaError_t plan(const Shape& s, Outputs& out) {
  using A = acc_t<T>;
  const size_t S = size_t(s.T) * s.K;
  std::vector<T> values = numbers<T>(size_t(s.T) * s.E, 1);
  for (int e = 0; e < s.E; ++e) values[size_t(s.T) / 3 * s.E + e] = T(-INFINITY);
  std::vector<uint8_t> live(size_t(s.T), 1);
  for (size_t t = 0; t < live.size(); t += 5) live[t] = 0;
  test::Device<T> logits(values);
  test::Device<uint8_t> mask(live);
  test::Device<A> plan(size_t(s.T) * s.E), weights(S);
  test::Device<int32_t> iterations(1), ids(S), per_expert(size_t(s.E));
  SinkhornArgs args{};
  args.T = s.T, args.E = s.E, args.K = s.K, args.max_iterations = s.steps, args.tol = 1e-30;
  args.dtype = sizeof(T) == 8 ? DType::f64 : sizeof(T) == 4 ? DType::f32 : DType::bf16;
  test::Device<char> space(size_t(cuda::sinkhorn_workspace_bytes(s.T, s.E, args.dtype)));
  args.logits = raw(logits), args.logits_stride = s.E, args.padding_mask = s.mask ? raw(mask) : nullptr;
  args.plan = raw(plan), args.iterations = raw(iterations), args.topk_weights = raw(weights);
  args.topk_ids = raw(ids), args.tokens_per_expert = raw(per_expert), args.workspace = raw(space);
  const cudaError_t error = cuda::sinkhorn(args, nullptr);
  out.add(plan), out.add(iterations), out.add(weights), out.add(ids), out.add(per_expert);
  return error;
}

}  // namespace

MOE_CASE(tiles) {
  return compare([](Outputs& out) { return plan<float>({45, 35, 2, 2, true}, out); });
}
MOE_CASE(halves) {
  return compare([](Outputs& out) { return plan<bf16>({20, 5, 1, 1, false}, out); });
}
MOE_CASE(one_block) {
  return compare([](Outputs& out) { return plan<float>({8, 70, 2, 1, false}, out); });
}
MOE_CASE(doubles) {
  return compare([](Outputs& out) { return plan<double>({9, 3, 3, 1, false}, out); });
}

}  // namespace moe::faults

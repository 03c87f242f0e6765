// SPDX-License-Identifier: Apache-2.0
// grouped_wgrad, for the mutation suite: every kernel, several stages and tiles, experts that end inside a stage, NaN
// in the rows that belong to nobody, gathered sides, rows in parts, ends that are out of range.
#include <cmath>

#include "../../csrc/cuda/grouped_wgrad.h"
#include "stage_cases.h"

namespace moe::cuda {  // of sm_90a: left out
bool grouped_wgrad_uses_wgmma(const GroupedWgradArgs&) { return false; }
cudaError_t grouped_wgrad_sm90(const GroupedWgradArgs&, cudaStream_t) { return cudaErrorInvalidValue; }
}  // namespace moe::cuda

namespace moe::faults {
namespace {

struct Shape {
  std::vector<int32_t> ends;
  int S, N, K;
  bool gather, accumulate, turned, tf32;
  int parts = 1;
};

/// Numbers, and NaN in the rows that no expert owns.
template <class T> std::vector<T> side(int rows, int owned, int width, uint32_t seed) {
  std::vector<T> values = numbers<T>(size_t(rows) * width, seed);
  for (size_t i = size_t(owned) * width; i < values.size(); ++i) values[i] = T(std::nanf(""));
  return values;
}

template <class T> std::string run(DType dtype, DType out_dtype, const Shape& s) {
  using A = acc_t<T>;
  return compare([&](Outputs& out) {
    constexpr int per_token = 3;
    const int E = int(s.ends.size()), owned = std::min(s.S, std::max(s.ends.back(), 0));
    const int tokens = (s.S + per_token - 1) / per_token;
    test::Device<T> n(s.gather ? numbers<T>(size_t(tokens) * s.N, 1) : side<T>(s.S, owned, s.N, 1));
    test::Device<T> k(side<T>(s.S, owned, s.K, 2));
    std::vector<int32_t> slot_of(size_t(s.S), 0);
    for (int r = 0; r < s.S; ++r) slot_of[size_t(r)] = (r * 7 + 2) % (tokens * per_token);
    if (s.gather) slot_of[1] = -1;
    test::Device<int32_t> slots(slot_of), ends(s.ends);
    test::Device<A> partial(size_t(s.parts) * E * s.N * s.K);
    const size_t size = size_t(E) * s.N * s.K * size_t(dtype_bytes(out_dtype));
    test::Device<uint8_t> grad(s.accumulate ? std::vector<uint8_t>(size, 0x3e) : std::vector<uint8_t>(size));
    test::Device<uint8_t> fresh(size);
    cuda::GroupedWgradArgs args{};
    args.E = E, args.S = s.S, args.N = s.N, args.K = s.K, args.dtype = dtype, args.out_dtype = out_dtype;
    args.allow_tf32 = s.tf32, args.accumulate = s.accumulate, args.ends = raw(ends);
    args.parts = s.parts, args.partial = raw(partial);
    args.n_side = {raw(n), s.N, 1, s.gather ? raw(slots) : nullptr, per_token};
    args.k_side = {raw(k), s.K, 1, nullptr, 1};
    args.out = s.accumulate ? raw(grad) : raw(fresh), args.out_expert = int64_t(s.N) * s.K;
    args.out_row = s.turned ? 1 : s.K, args.out_col = s.turned ? s.N : 1;
    const cudaError_t error = cuda::grouped_wgrad(args, nullptr);
    out.add(s.accumulate ? grad : fresh);
    return error;
  });
}

}  // namespace

MOE_CASE(bf16_stages) { return run<bf16>(DType::bf16, DType::bf16, {{37, 37, 190}, 195, 24, 40}); }
MOE_CASE(f16_gathered) { return run<f16>(DType::f16, DType::f32, {{0, 45}, 50, 136, 16, true, false, true}); }
MOE_CASE(bf16_accumulates) { return run<bf16>(DType::bf16, DType::f32, {{9, 9, 30}, 31, 8, 136, false, true}); }
MOE_CASE(tf32_gathered) { return run<float>(DType::f32, DType::f32, {{20}, 24, 136, 136, true, false, false, true}); }
MOE_CASE(wild_ends) { return run<bf16>(DType::bf16, DType::bf16, {{90, -5, 60}, 70, 8, 8}); }
MOE_CASE(f32_exact) { return run<float>(DType::f32, DType::f32, {{21, 21, 40}, 44, 65, 67, true}); }
MOE_CASE(double_accumulates) { return run<double>(DType::f64, DType::f64, {{5, 5, 18}, 20, 3, 5, false, true}); }
MOE_CASE(bf16_parts) {
  return run<bf16>(DType::bf16, DType::bf16, {{70, 70, 75}, 80, 24, 40, false, false, false, false, 3});
}
MOE_CASE(f32_parts_accumulate) {
  return run<float>(DType::f32, DType::f32, {{40, 40, 45}, 47, 9, 33, false, true, true, false, 2});
}

}  // namespace moe::faults

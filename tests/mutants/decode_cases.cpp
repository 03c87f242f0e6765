// SPDX-License-Identifier: Apache-2.0
// decode behind its index, for the mutation suite: every kernel, several parts of k, experts without rows, more rows
// than one pass multiplies or a block keeps, absent slots, offsets past the end.
#include "../../csrc/cuda/decode.h"
#include "stage_cases.h"

namespace moe::cuda {  // of sm_90a: left out
bool decode_uses_wgmma(const ExpertMlp&) { return false; }
cudaError_t decode_sm90(const DecodeArgs&, const RowsEpilogue&, cudaStream_t) { return cudaErrorInvalidValue; }
}  // namespace moe::cuda

namespace moe::faults {
namespace {

struct Shape {
  int T, H, I, E, K;
  bool gated, interleaved, bias, weight_on_input, one, wild;
};

template <class T> std::string run(DType dtype, const Shape& s) {
  using A = acc_t<T>;
  return compare([&](Outputs& out) {
    const int S = s.T * s.K, rows = s.gated ? 2 * s.I : s.I;
    test::Device<T> x(numbers<T>(size_t(s.T) * s.H, 1)), w13(numbers<T>(size_t(s.E) * rows * s.H, 2));
    test::Device<T> w2(numbers<T>(size_t(s.E) * s.H * s.I, 3)), b13(numbers<T>(size_t(s.E) * rows, 4));
    test::Device<T> b2(numbers<T>(size_t(s.E) * s.H, 5)), y(size_t(s.T) * s.H), act(size_t(S) * s.I);
    test::Device<A> weights(numbers<A>(size_t(S), 6));
    test::Device<int32_t> id(s.one ? std::vector<int32_t>(size_t(S), s.E - 1) : ids(size_t(S), s.E, 7));
    std::vector<int32_t> in_order(static_cast<size_t>(S));
    for (int r = 0; r < S; ++r) in_order[size_t(r)] = r;
    test::Device<int32_t> offsets(s.wild ? std::vector<int32_t>{0, 2, 3, 1000} : std::vector<int32_t>(size_t(s.E) + 1));
    test::Device<int32_t> row_to_slot(in_order);
    cudaError_t error = cudaSuccess;
    if (!s.wild)
      error = cuda::permute_index({S, s.E, S, 1, raw(id), raw(offsets), raw(row_to_slot), nullptr, nullptr}, nullptr);
    if (error != cudaSuccess) return error;
    cuda::DecodeArgs args{};
    ExpertMlp& p = args.mlp;
    p.T = s.T, p.H = s.H, p.I = s.I, p.E = s.E, p.K = s.K, p.dtype = p.weight_dtype = dtype;
    p.activation = Activation::relu2, p.gated = s.gated, p.interleaved = s.interleaved;
    p.weight_on_input = s.weight_on_input, p.x = raw(x), p.x_stride = s.H;
    p.w13.data = raw(w13), p.w13.expert_stride = int64_t(rows) * s.H, p.w13.row_stride = s.H, p.w13.col_stride = 1;
    p.w2.data = raw(w2), p.w2.expert_stride = int64_t(s.H) * s.I, p.w2.row_stride = s.I, p.w2.col_stride = 1;
    p.w13_bias = s.bias ? raw(b13) : nullptr, p.w2_bias = s.bias ? raw(b2) : nullptr, p.topk_weights = raw(weights);
    p.row_to_slot = raw(row_to_slot), p.expert_offsets = raw(offsets), args.y = raw(y), args.act = raw(act);
    error = cuda::decode(args, nullptr);
    out.add(y);
    return error;
  });
}

}  // namespace

MOE_CASE(few_tokens) { return run<bf16>(DType::bf16, {2, 1048, 24, 34, 3, true, false, true, false}); }
MOE_CASE(repeated_ids) { return run<f16>(DType::f16, {7, 24, 40, 3, 2, false, false, true, false, true}); }
MOE_CASE(many_rows) { return run<bf16>(DType::bf16, {26, 24, 24, 4, 4, true, true, false, false}); }
MOE_CASE(weight_on_input) { return run<f16>(DType::f16, {2, 24, 1048, 5, 2, true, false, true, true}); }
MOE_CASE(wild_offsets) { return run<bf16>(DType::bf16, {2, 16, 8, 3, 3, true, false, false, false, false, true}); }
MOE_CASE(odd_widths) { return run<float>(DType::f32, {5, 37, 11, 34, 3, true, true, true, false}); }
MOE_CASE(double_ungated) { return run<double>(DType::f64, {3, 5, 35, 3, 2, false, false, true, true}); }

}  // namespace moe::faults

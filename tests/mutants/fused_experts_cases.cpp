// SPDX-License-Identifier: Apache-2.0
// fused_experts and its backward on plain multiply-adds, for the mutation suite: gates or none, interleaved rows, the
// weight on either side, biases, a mask, absent slots, an expert of more rows than a tile and one of none.
// Products of tensor cores, weight gradients and decode have suites of their own and are left out.
#include "../../csrc/cuda/decode.h"
#include "../../csrc/cuda/grouped_gemm.h"
#include "../../csrc/cuda/grouped_wgrad.h"
#include "stage_cases.h"

namespace moe::cuda {

cudaError_t grouped_rows(const GroupedRows& g, cudaStream_t stream) { return grouped_fma(g, stream); }
int64_t weight_part_count(const GroupedRows& g) { return (g.N + kFmaColumns - 1) / kFmaColumns; }
cudaError_t grouped_wgrad(const GroupedWgradArgs&, cudaStream_t) { return cudaSuccess; }
int64_t grouped_wgrad_parts(const GroupedWgradArgs&) { return 1; }
int64_t grouped_wgrad_partial_bytes(const GroupedWgradArgs&) { return 0; }
bool decode_takes(const ExpertMlp&) { return false; }
int64_t decode_workspace_bytes(const ExpertMlp&) { return 0; }
cudaError_t decode(const DecodeArgs&, cudaStream_t) { return cudaErrorInvalidValue; }

}  // namespace moe::cuda

namespace moe::faults {
namespace {

struct Shape {
  int T, H, I, E, K;
  bool gated, interleaved, weight_on_input, transposed, crowded;  // crowded: all but a few slots go to expert 0
};

/// The index maps of a counting sort.
struct Maps {
  std::vector<int32_t> row_to_slot, slot_to_row, offsets;

  explicit Maps(const Shape& s) : row_to_slot(size_t(s.T) * s.K, -1), slot_to_row(size_t(s.T) * s.K, -1) {
    std::vector<int32_t> of = ids(row_to_slot.size(), s.E, 5);
    for (size_t i = 0; s.crowded && i < of.size(); ++i) of[i] = i % 9 == 4 ? -1 : i % 7 == 3 ? 1 : 0;
    int32_t row = 0;
    for (int e = 0; e < s.E; ++e) {
      offsets.push_back(row);
      for (size_t slot = 0; slot < of.size(); ++slot)
        if (of[slot] == e) row_to_slot[size_t(row)] = int32_t(slot), slot_to_row[slot] = row++;
    }
    offsets.push_back(row);
  }
};

/// Every tensor of the layer.
template <class T> struct Layer {
  using A = acc_t<T>;
  Shape s;
  Maps maps;
  size_t rows13;

  explicit Layer(const Shape& shape) : s(shape), maps(shape), rows13(size_t(s.gated ? 2 : 1) * s.I) {}
  size_t slots() const { return size_t(s.T) * s.K; }
  size_t in(size_t rows) const { return rows * s.H; }

  test::Device<T> x{numbers<T>(in(size_t(s.T)), 1)}, w13{numbers<T>(size_t(s.E) * in(rows13), 2)};
  test::Device<T> w2{numbers<T>(size_t(s.E) * in(size_t(s.I)), 3)}, b13{numbers<T>(size_t(s.E) * rows13, 4)};
  test::Device<T> b2{numbers<T>(in(size_t(s.E)), 5)}, grad_y{numbers<T>(in(size_t(s.T)), 6)};
  test::Device<A> weights{numbers<A>(slots(), 7)}, mask{numbers<A>(slots() * s.I, 8)};
  test::Device<int32_t> row_to_slot{maps.row_to_slot}, slot_to_row{maps.slot_to_row}, offsets{maps.offsets};

  Weight weight(test::Device<T>& w, int64_t n, int64_t k) {
    return s.transposed ? Weight{raw(w), n * k, 1, n, 0, false} : Weight{raw(w), n * k, k, 1, 0, false};
  }
  ExpertMlp mlp(DType dtype) {
    ExpertMlp p{};
    p.T = s.T, p.H = s.H, p.I = s.I, p.E = s.E, p.K = s.K, p.dtype = p.weight_dtype = dtype;
    p.activation = s.interleaved ? Activation::swigluoai : Activation::silu, p.gated = s.gated;
    p.interleaved = s.interleaved, p.weight_on_input = s.weight_on_input, p.limit = 1, p.alpha = 1.5;
    p.x = raw(x), p.x_stride = s.H, p.w13 = weight(w13, int64_t(rows13), s.H), p.w2 = weight(w2, s.H, s.I);
    p.w13_bias = raw(b13), p.w2_bias = raw(b2), p.topk_weights = raw(weights), p.hidden_mask = raw(mask);
    p.row_to_slot = raw(row_to_slot), p.slot_to_row = raw(slot_to_row), p.expert_offsets = raw(offsets);
    return p;
  }
};

template <class T> cudaError_t forward_and_backward(DType dtype, const Shape& s, Outputs& out) {
  Layer<T> layer(s);
  const size_t S = layer.slots(), rows13 = layer.rows13;
  test::Device<T> y(layer.in(size_t(s.T)));
  FusedExpertsArgs forward{layer.mlp(dtype), nullptr, raw(y), nullptr};
  test::Device<uint8_t> space(size_t(cuda::fused_experts_workspace_bytes(forward)));
  forward.workspace = raw(space);
  cudaError_t error = cuda::fused_experts(forward, nullptr);
  out.add(y);
  if (error != cudaSuccess) return error;
  test::Device<T> grad_x(layer.in(size_t(s.T))), grad_b13(size_t(s.E) * rows13), grad_b2(layer.in(size_t(s.E)));
  test::Device<acc_t<T>> grad_weights(std::vector<acc_t<T>>(S, 0));
  FusedExpertsBackwardArgs back{};
  back.mlp = layer.mlp(dtype), back.grad_y = raw(layer.grad_y), back.grad_y_stride = s.H, back.grad_x = raw(grad_x);
  back.grad_topk_weights = raw(grad_weights), back.grad_w13_bias = raw(grad_b13), back.grad_w2_bias = raw(grad_b2);
  test::Device<uint8_t> more(size_t(cuda::fused_experts_backward_workspace_bytes(back)));
  back.workspace = raw(more);
  error = cuda::fused_experts_backward(back, nullptr);
  out.add(grad_x), out.add(grad_b13), out.add(grad_b2), out.add(grad_weights);
  return error;
}

template <class T> std::string layer(DType dtype, const Shape& s) {
  return compare([&](Outputs& out) { return forward_and_backward<T>(dtype, s, out); });
}

}  // namespace

MOE_CASE(gated) { return layer<float>(DType::f32, {11, 34, 35, 4, 2, true, false, false, false, false}); }
MOE_CASE(interleaved) { return layer<float>(DType::f32, {5, 18, 9, 3, 2, true, true, true, true, false}); }
MOE_CASE(crowded) { return layer<float>(DType::f32, {67, 3, 2, 3, 2, false, false, false, false, true}); }
MOE_CASE(doubles) { return layer<double>(DType::f64, {4, 16, 3, 2, 1, true, false, true, false, false}); }
MOE_CASE(halves) { return layer<bf16>(DType::bf16, {6, 17, 5, 33, 2, true, false, false, true, false}); }

}  // namespace moe::faults

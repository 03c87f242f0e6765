// SPDX-License-Identifier: Apache-2.0
// Grouped products on the tensor cores, for the mutation suite: both tiles of the smaller table, both layouts of the
// weights, every epilogue, sums that go round the ring, an empty expert, NaN in the rows and columns of nobody.
#include <cmath>

#include "../../csrc/cuda/grouped_gemm.h"
#include "stage_cases.h"

namespace moe::cuda {
cudaError_t grouped_rows_bf16(int row, const GroupedRows&, cudaStream_t);
}

namespace moe::faults {
namespace {

constexpr int kRows64 = 0, kRows16 = 1;  // rows of the smaller table

/// Ends of three experts, the second one without rows; two rows belong to nobody.
const std::vector<int32_t> kEnds = {3, 3, 40};
const std::vector<int32_t> kHostileEnds = {-7, 60, 20};  // no rows, all there are, none
constexpr int kSlots = 42, kTokens = 14, kPad = 8;

struct Shape {
  cuda::Epilogue kind;
  int row, units, K;  // units: columns of D, or hidden units
  bool gated = false, interleaved = false, along_columns = false, on_input = false;
  const std::vector<int32_t>& ends = kEnds;
};

std::vector<bf16> padded(int rows, int width, uint32_t seed) {  // NaN behind every row
  std::vector<bf16> values = numbers<bf16>(size_t(rows) * (width + kPad), seed);
  for (size_t i = 0; i < values.size(); ++i)
    if (int(i % size_t(width + kPad)) >= width) values[i] = bf16(std::nanf(""));
  return values;
}

std::string run(const Shape& s) {
  return compare([&](Outputs& out) {
    const bool backward = s.kind == cuda::Epilogue::activation_backward, plain = s.kind == cuda::Epilogue::plain;
    const int E = int(s.ends.size()), I = s.units, width = s.gated ? 2 * I : I, N = plain || backward ? I : width;
    const int pitch = (s.along_columns ? N : s.K) + kPad, lines = s.along_columns ? s.K : N;
    test::Device<bf16> a(padded(kTokens, s.K, 1)), b(padded(E * lines, pitch - kPad, 2));
    test::Device<bf16> bias(numbers<bf16>(size_t(E) * width, 3)), saved(numbers<bf16>(size_t(kSlots) * width, 4));
    test::Device<bf16> result(size_t(kSlots) * N), hidden(size_t(kSlots) * width), act(size_t(kSlots) * I);
    test::Device<bf16> biased(size_t(kSlots) * width);
    test::Device<float> weights(numbers<float>(kSlots, 5)), mask(numbers<float>(size_t(kSlots) * I, 6));
    test::Device<float> parts(size_t(kSlots) * ((I + 31) / 32));
    std::vector<int32_t> slot_of(kSlots);
    for (int r = 0; r < kSlots; ++r) slot_of[size_t(r)] = (r * 11 + 3) % kSlots;
    if (plain) slot_of[6] = -1;
    test::Device<int32_t> slots(slot_of), ends(s.ends);
    cuda::GroupedRows g{};
    g.E = E, g.S = kSlots, g.N = N, g.K = s.K, g.dtype = DType::bf16, g.a = raw(a), g.a_stride = s.K + kPad;
    g.gather = raw(slots), g.per_token = kSlots / kTokens, g.ends = raw(ends);
    g.b = {raw(b), int64_t(lines) * pitch, s.along_columns ? 1 : pitch, s.along_columns ? pitch : 1, 0, false};
    cuda::RowsEpilogue& e = g.epilogue;
    e.kind = s.kind, e.row_to_slot = raw(slots), e.topk_weights = raw(weights), e.bias = raw(bias);
    e.out = raw(result), e.out_stride = N, e.out_dtype = DType::bf16, e.hidden_mask = raw(mask);
    e.activation = Activation::silu, e.gated = s.gated, e.interleaved = s.interleaved;
    e.weight_on_input = s.on_input, e.hidden = backward ? raw(saved) : raw(hidden), e.act = raw(act);
    e.grad_hidden = raw(hidden), e.grad_biased = raw(biased), e.weighted_act = raw(act), e.weight_parts = raw(parts);
    const cudaError_t error = cuda::grouped_rows_bf16(s.row, g, nullptr);
    if (plain) out.add(result);
    else out.add(hidden), out.add(act);
    if (backward) out.add(biased), out.add(parts);
    return error;
  });
}

}  // namespace

MOE_CASE(plain_rows) { return run({cuda::Epilogue::plain, kRows16, 132, 328}); }
MOE_CASE(hostile_ends) {
  return run({cuda::Epilogue::plain, kRows16, 40, 40, false, false, false, false, kHostileEnds});
}
MOE_CASE(gated) { return run({cuda::Epilogue::activation, kRows16, 24, 64, true}); }
MOE_CASE(gated_in_pairs) { return run({cuda::Epilogue::activation, kRows64, 40, 216, true, true, true}); }
MOE_CASE(backward) { return run({cuda::Epilogue::activation_backward, kRows64, 70, 40, true, true, false, true}); }

}  // namespace moe::faults

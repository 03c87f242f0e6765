// SPDX-License-Identifier: Apache-2.0
// unpermute and its backward, for the mutation suite: dropped slots, rows nobody owns, a row that two slots name.
#include "stage_cases.h"

namespace moe::faults {
namespace {

struct Shape {
  int T, H, K, P;
  bool weighted, shared_row;
};

std::vector<int32_t> rows_of(const Shape& s) {
  std::vector<int32_t> rows(size_t(s.T) * s.K);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = int32_t((i * 7 + 3) % size_t(s.P + 2)) - 1;  // -1 and P: absent
  std::vector<bool> taken(size_t(s.P) + 2, false);
  for (int32_t& r : rows) {  // every row has one owner at most
    if (r >= 0 && taken[size_t(r)]) r = -1;
    if (r >= 0) taken[size_t(r)] = true;
  }
  if (s.shared_row) rows[0] = rows[rows.size() - 2] = 1;
  return rows;
}

template <class T> cudaError_t forward(DType dtype, const Shape& s, Outputs& out) {
  using A = acc_t<T>;
  test::Device<T> rows(numbers<T>(size_t(s.P) * s.H, 1)), y(size_t(s.T) * s.H);
  test::Device<A> weights(numbers<A>(size_t(s.T) * s.K, 2));
  test::Device<int32_t> map(rows_of(s));
  UnpermuteArgs args{};
  args.T = s.T, args.H = s.H, args.K = s.K, args.P = s.P, args.dtype = dtype, args.rows = raw(rows);
  args.rows_stride = s.H, args.slot_to_row = raw(map), args.topk_weights = s.weighted ? raw(weights) : nullptr;
  args.y = raw(y);
  const cudaError_t error = cuda::unpermute(args, nullptr);
  out.add(y);
  return error;
}

template <class T> cudaError_t backward(DType dtype, const Shape& s, Outputs& out) {
  using A = acc_t<T>;
  test::Device<T> rows(numbers<T>(size_t(s.P) * s.H, 1)), grad_y(numbers<T>(size_t(s.T) * s.H, 3));
  test::Device<T> grad_rows(size_t(s.P) * s.H);
  test::Device<A> weights(numbers<A>(size_t(s.T) * s.K, 2)), grad_weights(size_t(s.T) * s.K);
  test::Device<int32_t> map(rows_of(s));
  test::Device<uint8_t> workspace(size_t(cuda::unpermute_backward_workspace_bytes(s.P)));
  UnpermuteBackwardArgs args{};
  args.T = s.T, args.H = s.H, args.K = s.K, args.P = s.P, args.dtype = dtype, args.grad_y = raw(grad_y);
  args.rows = raw(rows), args.grad_y_stride = args.rows_stride = s.H, args.slot_to_row = raw(map);
  args.topk_weights = raw(weights), args.grad_rows = raw(grad_rows), args.grad_weights = raw(grad_weights);
  args.workspace = raw(workspace);
  const cudaError_t error = cuda::unpermute_backward(args, nullptr);
  out.add(grad_rows), out.add(grad_weights);
  return error;
}

template <class T> std::string both(DType dtype, const Shape& s) {
  const std::string report = compare([&](Outputs& out) { return forward<T>(dtype, s, out); });
  return report.empty() ? compare([&](Outputs& out) { return backward<T>(dtype, s, out); }) : report;
}

}  // namespace

MOE_CASE(narrow_rows) { return both<float>(DType::f32, {11, 33, 3, 27, true, true}); }
MOE_CASE(wide_rows) { return both<float>(DType::f32, {9, 260, 5, 40, true, false}); }
MOE_CASE(bf16_rows) { return both<bf16>(DType::bf16, {10, 264, 2, 300, false, true}); }
MOE_CASE(double_rows) { return both<double>(DType::f64, {3, 6, 4, 10, true, false}); }
MOE_CASE(one_column) { return both<bf16>(DType::bf16, {130, 1, 2, 256, true, false}); }

}  // namespace moe::faults

// SPDX-License-Identifier: Apache-2.0
// grouped_gemm: one product a group over any strides. A task is 64 output columns of a group. The left operand is used
// where it lies when it is acc and runs along k. Otherwise it is copied once: row by row, or where it runs along m as
// blocks [k][kRowBlock], which the broadcasts of a product read from front to back.

#include <cstring>

#include "panel.h"

namespace moe::cpu {
namespace {

bool left_in_place(const GroupedGemmArgs& a) {
  return (a.dtype == DType::f64 || a.dtype == DType::f32) && a.a_col == 1;
}
bool left_by_column(const GroupedGemmArgs& a) { return a.a_col != 1 && a.a_row == 1; }
int64_t left_size(const GroupedGemmArgs& a) {
  return (left_by_column(a) ? ceil_div(a.M, kRowBlock) * kRowBlock : a.M) * a.K;
}
int64_t left_groups(const GroupedGemmArgs& a) {
  return a.grouped == Grouped::rows || a.grouped == Grouped::contraction ? 1 : a.G;
}

template <class A> struct Buffers {
  A *left, *packed, *c;
  int64_t c_size = kRowBlock * kPair;
  Buffers(const GroupedGemmArgs& a, int32_t workers, Workspace& space) {
    left = space.take<A>(left_in_place(a) ? 0 : left_groups(a) * left_size(a));
    packed = space.take<A>(workers * kPackedSize<A>);
    c = space.take<A>(workers * c_size);
  }
};

/// Fills the copy of the left operand.
template <class T> void copy_left(const GroupedGemmArgs& a, acc_t<T>* copy, const Workers& workers) {
  using A = acc_t<T>;
  const auto* data = static_cast<const T*>(a.a);
  const int64_t blocks = ceil_div(a.M, kRowBlock);
  if (left_by_column(a)) {
    for_tasks(workers, left_groups(a) * blocks, [&](int32_t, int64_t task) {
      const int64_t g = task / blocks, m0 = task % blocks * kRowBlock, m = std::min(kRowBlock, a.M - m0);
      tile<T>().gather(data + g * a.a_group + m0, a.a_col, nullptr, m, a.K, copy + g * left_size(a) + m0 * a.K,
                       kRowBlock);
    });
    return;
  }
  for_chunks(workers, left_groups(a) * a.M, 16, [&](int32_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = data + i / a.M * a.a_group + i % a.M * a.a_row;
      A* to = copy + i * a.K;
      if (a.a_col == 1) tile<T>().widen(from, to, a.K);
      else
        for (int64_t k = 0; k < a.K; ++k) to[k] = A(from[k * a.a_col]);
    }
  });
}

/// Rows m.. and contracted elements k.. of group g, from the copy if there is one.
template <class A> Left<A> left_at(const GroupedGemmArgs& a, const A* copy, int64_t g, int64_t m, int64_t k) {
  const int64_t group = left_groups(a) > 1 ? g : 0, in_block = m % kRowBlock;
  if (left_in_place(a)) return {static_cast<const A*>(a.a) + group * a.a_group + m * a.a_row + k, a.a_row};
  copy += group * left_size(a);
  if (!left_by_column(a)) return {copy + m * a.K + k, a.K};
  return {copy + (m - in_block) * a.K + k * kRowBlock + in_block, kRowBlock, nullptr, true};
}

/// Writes rows of c to the output, n columns from element `at` on.
template <class A> void store(const GroupedGemmArgs& a, const A* c, int64_t at, int64_t rows, int64_t n) {
  if (a.accumulate) {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < n; ++j) static_cast<A*>(a.out)[at + m * a.N + j] += c[m * kPair + j];
    return;
  }
  if ((sizeof(A) == 8) == (a.out_dtype == DType::f64)) return narrow(a.out_dtype, c, kPair, a.out, at, a.N, rows, n);
  visit_dtype(a.out_dtype, [&](auto tag) {
    using Out = decltype(tag);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < n; ++j) static_cast<Out*>(a.out)[at + m * a.N + j] = Out(acc_t<Out>(c[m * kPair + j]));
  });
}

struct Range { int64_t begin, end; };
Range range_of(const GroupedGemmArgs& a, Grouped axis, int64_t g, int64_t size) {
  return a.grouped != axis ? Range{0, size} : Range{g ? a.offs[g - 1] : 0, a.offs[g]};
}

template <class T> void run(const GroupedGemmArgs& a, const Workers& workers) {
  using A = acc_t<T>;
  Workspace space(a.workspace);
  const Buffers<A> buffers(a, workers.count, space);
  if (!left_in_place(a)) copy_left<T>(a, buffers.left, workers);
  const int64_t panels = ceil_div(a.N, kPair);
  const bool one_output = a.grouped == Grouped::rows || a.grouped == Grouped::cols;

  for_tasks(workers, a.G * panels, [&](int32_t worker, int64_t task) {
    const int64_t g = task / panels, index = task % panels;
    const Range rows = range_of(a, Grouped::rows, g, a.M), depth = range_of(a, Grouped::contraction, g, a.K);
    Range cols = range_of(a, Grouped::cols, g, a.N);
    cols.begin += index * kPair;
    if (cols.begin >= cols.end || rows.begin == rows.end) return;
    const int64_t n = std::min(kPair, cols.end - cols.begin);
    Weight b = a.b;
    b.data = static_cast<const T*>(b.data) + depth.begin * b.col_stride + cols.begin * b.row_stride;
    const Panel<T> panel =
        Panel<T>::columns(b, g, 0, n, depth.end - depth.begin, rows.end - rows.begin, left_by_column(a));
    const T* bias = a.bias ? static_cast<const T*>(a.bias) + g * a.N + cols.begin : nullptr;
    A* c = buffers.c + worker * buffers.c_size;
    for_row_blocks(rows.begin, rows.end, [&](int64_t m0, int64_t count) {
      const Left<A> block = left_at(a, buffers.left, g, m0, depth.begin);
      panel.product(block, count, c, kPair, buffers.packed + worker * kPackedSize<A>);
      for (int64_t m = 0; bias && m < count; ++m)
        for (int64_t j = 0; j < n; ++j) c[m * kPair + j] += A(bias[j]);
      store(a, c, ((one_output ? 0 : g * a.M) + m0) * a.N + cols.begin, count, n);
    });
  });
}

/// Rows (or columns) past the last group.
void zero_rest(const GroupedGemmArgs& a) {
  const int64_t bytes = dtype_bytes(a.out_dtype), used = a.G ? a.offs[a.G - 1] : 0;
  auto* out = static_cast<char*>(a.out);
  if (a.grouped == Grouped::rows) std::memset(out + used * a.N * bytes, 0, (a.M - used) * a.N * bytes);
  if (a.grouped == Grouped::cols)
    for (int64_t m = 0; m < a.M; ++m) std::memset(out + (m * a.N + used) * bytes, 0, (a.N - used) * bytes);
}

}  // namespace

int64_t grouped_gemm_workspace_bytes(const GroupedGemmArgs& a, const Workers& workers) {
  Workspace space(nullptr);
  if (a.dtype == DType::f64) Buffers<double>(a, workers.count, space);
  else Buffers<float>(a, workers.count, space);
  return space.bytes();
}

void grouped_gemm(const GroupedGemmArgs& a, const Workers& workers) {
  visit_dtype(a.dtype, [&](auto tag) { run<decltype(tag)>(a, workers); });
  if (a.offs && !a.accumulate) zero_rest(a);
}

}  // namespace moe::cpu

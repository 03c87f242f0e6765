// SPDX-License-Identifier: Apache-2.0
// grouped_gemm: one product a group over any strides. A task is 32 output columns of a group; the left operand is used
// where it lies when it is acc and runs along m or k, and converted once otherwise.
#include <cstring>

#include "panel.h"

namespace moe::cpu {
namespace {

bool left_in_place(const GroupedGemmArgs& a) {
  return (a.dtype == DType::f64 || a.dtype == DType::f32) && (a.a_col == 1 || a.a_row == 1);
}
int64_t left_groups(const GroupedGemmArgs& a) {
  return a.grouped == Grouped::rows || a.grouped == Grouped::contraction ? 1 : a.G;
}

template <class A> struct Buffers {
  A *left, *packed, *c;
  int64_t c_size = kRowBlock * kPanel;
  Buffers(const GroupedGemmArgs& a, int32_t workers, Workspace& space) {
    left = space.take<A>(left_in_place(a) ? 0 : left_groups(a) * a.M * a.K);
    packed = space.take<A>(workers * kPackedSize<A>);
    c = space.take<A>(workers * c_size);
  }
};

/// The left operand of group 0 in acc, and the distance between groups.
template <class T> Left<acc_t<T>> left_as_acc(const GroupedGemmArgs& a, acc_t<T>* copy, int64_t& group_stride,
                                              const Workers& workers) {
  using A = acc_t<T>;
  const bool by_column = a.a_col != 1 && a.a_row == 1;
  group_stride = a.a_group;
  if (left_in_place(a)) return {static_cast<const A*>(a.a), by_column ? a.a_col : a.a_row, nullptr, by_column};
  group_stride = a.M * a.K;
  const int64_t lines = by_column ? a.K : a.M, length = by_column ? a.M : a.K;
  const int64_t line_stride = by_column ? a.a_col : a.a_row, step = by_column ? 1 : a.a_col;
  for_chunks(workers, left_groups(a) * lines, 16, [&](int32_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* from = static_cast<const T*>(a.a) + i / lines * a.a_group + i % lines * line_stride;
      if (step == 1) tile<T>().widen(from, copy + i * length, length);
      else
        for (int64_t j = 0; j < length; ++j) copy[i * length + j] = A(from[j * step]);
    }
  });
  return {copy, length, nullptr, by_column};
}

template <class A> void store_row(const GroupedGemmArgs& a, const A* row, int64_t at, int64_t n) {
  if (sizeof(A) == 8 || a.out_dtype != DType::f64)
    if (sizeof(A) == 4 || a.out_dtype == DType::f64) return narrow(a.out_dtype, row, a.out, at, n);
  visit_dtype(a.out_dtype, [&](auto tag) {
    using Out = decltype(tag);
    for (int64_t j = 0; j < n; ++j) static_cast<Out*>(a.out)[at + j] = Out(acc_t<Out>(row[j]));
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
  int64_t left_group = 0;
  const Left<A> left = left_as_acc<T>(a, buffers.left, left_group, workers);
  const int64_t panels = ceil_div(a.N, kPanel), left_k = left.by_column ? left.stride : 1,
                left_m = left.by_column ? 1 : left.stride;
  const bool one_output = a.grouped == Grouped::rows || a.grouped == Grouped::cols;

  for_tasks(workers, a.G * panels, [&](int32_t worker, int64_t task) {
    const int64_t g = task / panels, index = task % panels;
    const Range rows = range_of(a, Grouped::rows, g, a.M), depth = range_of(a, Grouped::contraction, g, a.K);
    Range cols = range_of(a, Grouped::cols, g, a.N);
    cols.begin += index * kPanel;
    if (cols.begin >= cols.end || rows.begin == rows.end) return;
    const int64_t n = std::min(kPanel, cols.end - cols.begin);
    Weight b = a.b;
    b.data = static_cast<const T*>(b.data) + depth.begin * b.col_stride + cols.begin * b.row_stride;
    const Panel<T> panel(b, g, 0, n, depth.end - depth.begin, rows.end - rows.begin, left.by_column);
    const T* bias = a.bias ? static_cast<const T*>(a.bias) + g * a.N + cols.begin : nullptr;
    A* c = buffers.c + worker * buffers.c_size;
    for_row_blocks(rows.begin, rows.end, [&](int64_t m0, int64_t count) {
      Left<A> block = left;
      block.data += (left_groups(a) > 1 ? g * left_group : 0) + m0 * left_m + depth.begin * left_k;
      panel.product(block, count, c, kPanel, buffers.packed + worker * kPackedSize<A>);
      for (int64_t m = 0; m < count; ++m) {
        A* row = c + m * kPanel;
        if (bias)
          for (int64_t j = 0; j < n; ++j) row[j] += A(bias[j]);
        store_row(a, row, ((one_output ? 0 : g * a.M) + m0 + m) * a.N + cols.begin, n);
      }
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
  if (a.offs) zero_rest(a);
}

}  // namespace moe::cpu

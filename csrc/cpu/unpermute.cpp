// SPDX-License-Identifier: Apache-2.0
// unpermute: a gather, each token sums its slots in slot order in acc; no atomics. Columns go in blocks that stay in
// cache.
#include "parallel.h"
#include "tile.h"

namespace moe::cpu {
namespace {

constexpr int64_t kColumns = 512;
constexpr int64_t kTokensPerTask = 16;

// Row `row` of data, columns [h, h + n), in acc: where it lies, or converted into buffer.
template <class T> const acc_t<T>* as_acc(const void* data, int64_t at, int64_t n, acc_t<T>* buffer) {
  const T* from = static_cast<const T*>(data) + at;
  if constexpr (std::is_same_v<T, acc_t<T>>) return from;
  tile<T>().widen(from, buffer, n);
  return buffer;
}

template <class T> void unpermute_token(const UnpermuteArgs& args, int64_t t) {
  using A = acc_t<T>;
  A sum[kColumns], buffer[kColumns];
  const A* weights = static_cast<const A*>(args.topk_weights);
  for (int64_t h = 0; h < args.H; h += kColumns) {
    const int64_t n = std::min(kColumns, args.H - h);
    std::fill_n(sum, n, A(0));
    for (int64_t slot = t * args.K; slot < (t + 1) * args.K; ++slot) {
      const int64_t row = args.slot_to_row[slot];
      if (row < 0 || row >= args.P) continue;
      math<A>().axpy(weights ? weights[slot] : A(1), as_acc<T>(args.rows, row * args.rows_stride + h, n, buffer), sum,
                     n);
    }
    tile<T>().narrow(sum, 0, static_cast<T*>(args.y) + t * args.H + h, 0, 1, n);
  }
}

// A task owns columns of all rows, so that a row which several slots name still gets one sum.
template <class T> void grad_rows_columns(const UnpermuteBackwardArgs& args, int64_t h) {
  using A = acc_t<T>;
  A sum[kColumns], buffer[kColumns];
  const int64_t n = std::min(kColumns, args.H - h);
  T* grad_rows = static_cast<T*>(args.grad_rows) + h;
  for (int64_t r = 0; r < args.P; ++r) std::fill_n(grad_rows + r * args.H, n, T(0.f));
  for (int64_t slot = 0; slot < args.T * args.K; ++slot) {
    const int64_t row = args.slot_to_row[slot];
    if (row < 0 || row >= args.P) continue;
    tile<T>().widen(grad_rows + row * args.H, sum, n);
    math<A>().axpy(static_cast<const A*>(args.topk_weights)[slot],
                   as_acc<T>(args.grad_y, slot / args.K * args.grad_y_stride + h, n, buffer), sum, n);
    tile<T>().narrow(sum, 0, grad_rows + row * args.H, 0, 1, n);
  }
}

template <class T> void grad_weights_token(const UnpermuteBackwardArgs& args, int64_t t) {
  using A = acc_t<T>;
  A left[kColumns], right[kColumns];
  for (int64_t slot = t * args.K; slot < (t + 1) * args.K; ++slot) {
    const int64_t row = args.slot_to_row[slot];
    A sum = 0;
    for (int64_t h = 0; h < args.H && row >= 0 && row < args.P; h += kColumns) {
      const int64_t n = std::min(kColumns, args.H - h);
      sum += math<A>().dot(as_acc<T>(args.rows, row * args.rows_stride + h, n, left),
                           as_acc<T>(args.grad_y, t * args.grad_y_stride + h, n, right), n);
    }
    static_cast<A*>(args.grad_weights)[slot] = sum;
  }
}

}  // namespace

void unpermute(const UnpermuteArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    for_chunks(workers, args.T, kTokensPerTask, [&](int32_t, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) unpermute_token<decltype(tag)>(args, t);
    });
  });
}

void unpermute_backward(const UnpermuteBackwardArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_tasks(workers, ceil_div(args.H, kColumns),
              [&](int32_t, int64_t task) { grad_rows_columns<T>(args, task * kColumns); });
    for_chunks(workers, args.T, kTokensPerTask, [&](int32_t, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) grad_weights_token<T>(args, t);
    });
  });
}

}  // namespace moe::cpu

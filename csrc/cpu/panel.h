// SPDX-License-Identifier: Apache-2.0
// One panel (up to 32 output columns) of an expert's weight, and the product of rows with it. The way is chosen by
// layout and by the number of rows: few rows read the weight where it lies, many rows pay for a packed float copy
// first.
#pragma once
#include "parallel.h"
#include "tile.h"

namespace moe::cpu {

constexpr int64_t kDotRows = 20;     // from here on a transposed copy is cheaper than sums across lanes
constexpr int64_t kDirectRows = 16;  // from here on a contiguous copy is cheaper than strided reads
constexpr int64_t kRowBlock = 240;   // rows of a product kept in cache (a multiple of the 12-row tile)

/// Contracted elements kept in the second-level cache at a time: 256 KiB of panel.
template <class A> constexpr int64_t kDepthBlock = 8192 / sizeof(A);

/// Calls f(first, count) for blocks of kRowBlock rows of [begin, end).
template <class F> void for_row_blocks(int64_t begin, int64_t end, F&& f) {
  for (int64_t r = begin; r < end; r += kRowBlock) f(r, std::min(kRowBlock, end - r));
}

template <class W> class Panel {
 public:
  using A = acc_t<W>;

  /// Panel number `index` of expert e of w: n <= 32 columns, k contracted, to be used for about `rows` rows.
  /// `buffer` holds k * 32 values and must outlive the panel. A left operand that runs by column cannot be dotted.
  Panel(const Weight& w, int64_t e, int64_t index, int64_t n, int64_t k, int64_t rows, A* buffer,
        bool by_column = false)
      : b_(static_cast<const W*>(w.data) + e * w.expert_stride + index * w.panel_stride),
        n_(n),
        k_(k),
        buffer_(buffer) {
    if (rows == 0 || (w.col_stride == 1 && rows < kDotRows && !by_column)) {
      way_ = Way::dot, b_stride_ = w.row_stride;
    } else if (w.row_stride == 1 && (n == kPanel || w.padded) &&
               (rows < kDirectRows || (w.padded && std::is_same_v<W, A>))) {
      way_ = Way::direct, b_stride_ = w.col_stride;
    } else {
      way_ = Way::packed;
      pack(w);
    }
  }

  /// c[rows][0 .. n) = left * panel; up to 32 columns of c are written.
  void product(Left<A> left, int64_t rows, A* c, int64_t c_stride) const {
    const int64_t step = way_ == Way::dot && rows <= 8 ? std::max<int64_t>(k_, 1) : kDepthBlock<A>;
    const int64_t left_step = left.by_column ? left.stride : 1;
    const A* data = left.data;
    for (int64_t k = 0; k < k_ || k == 0; k += step) {
      left.data = data + k * left_step;
      const int64_t depth = std::min(step, k_ - k);
      if (way_ == Way::dot) tile<W>().dot({left, b_ + k, b_stride_, c, c_stride, rows, n_, depth, k > 0});
      else if (way_ == Way::direct)
        tile<W>().outer({left, b_ + k * b_stride_, b_stride_, c, c_stride, rows, kPanel, depth, k > 0});
      else tile<A>().outer({left, buffer_ + k * kPanel, kPanel, c, c_stride, rows, kPanel, depth, k > 0});
    }
  }

 private:
  enum class Way { dot, direct, packed };

  void pack(const Weight& w) {
    if (w.col_stride == 1) return tile<W>().transpose(b_, w.row_stride, n_, k_, buffer_);
    if (w.row_stride == 1 && w.col_stride == kPanel && w.padded) return tile<W>().widen(b_, buffer_, k_ * kPanel);
    for (int64_t k = 0; k < k_; ++k) {
      A* row = buffer_ + k * kPanel;
      if (w.row_stride == 1) tile<W>().widen(b_ + k * w.col_stride, row, n_);
      else
        for (int64_t n = 0; n < n_; ++n) row[n] = A(b_[k * w.col_stride + n * w.row_stride]);
      std::fill(row + n_, row + kPanel, A(0));
    }
  }

  const W* b_;
  int64_t n_, k_, b_stride_ = 0;
  A* buffer_;
  Way way_;
};

/// Conversion of `count` elements of any float type to and from acc.
template <class A> void widen(DType dtype, const void* from, int64_t offset, A* to, int64_t count) {
  visit_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<acc_t<T>, A>) tile<T>().widen(static_cast<const T*>(from) + offset, to, count);
  });
}
template <class A> void narrow(DType dtype, const A* from, void* to, int64_t offset, int64_t count) {
  visit_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<acc_t<T>, A>) tile<T>().narrow(from, static_cast<T*>(to) + offset, count);
  });
}
template <class A> bool is_acc(DType dtype) { return dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32); }

/// Rows [rows, width] as acc: the tensor itself where it already is, else a copy in `copy` (which may be null only
/// then).
template <class A>
Left<A> rows_as_acc(DType dtype, const void* data, int64_t rows, int64_t width, int64_t stride, A* copy,
                    const Workers& workers) {
  if (is_acc<A>(dtype)) return {static_cast<const A*>(data), stride};
  for_chunks(workers, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)),
             [&](int32_t, int64_t begin, int64_t end) {
               for (int64_t r = begin; r < end; ++r) widen(dtype, data, r * stride, copy + r * width, width);
             });
  return {copy, width};
}

}  // namespace moe::cpu

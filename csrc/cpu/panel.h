// SPDX-License-Identifier: Apache-2.0
// One panel (up to 32 output columns, or 64) of an expert's weight, and the product of rows with it. The way is chosen
// by layout and by the number of rows (choice.h): few rows read the weight where it lies, many rows pay for a packed
// float copy first. A long contraction goes in blocks, each packed just before it is used, so that the copy is still in
// the second-level cache.
#pragma once
#include "choice.h"
#include "parallel.h"
#include "tile.h"

namespace moe::cpu {

constexpr int64_t kRowBlock = 480;  // rows of a product kept in cache (a multiple of the 12-row tile)

template <class A> constexpr int64_t kDepthBlock = depth_block(sizeof(A), kPanel);
template <class A> constexpr int64_t kPackedSize = kDepthBlock<A> * kPanel;

/// Calls f(first, count) for the rows [begin, end), cut at the multiples of kRowBlock.
template <class F> void for_row_blocks(int64_t begin, int64_t end, F&& f) {
  for (int64_t r = begin, next; r < end; r = next) {
    next = std::min(end, (r / kRowBlock + 1) * kRowBlock);
    f(r, next - r);
  }
}

template <class W> class Panel {
 public:
  using A = acc_t<W>;

  /// Columns [32 * index, +n) of expert e of w, k contracted, to be used for about `rows` rows. n is at most
  /// panel_columns(w). A left operand that runs by column cannot be dotted.
  Panel(const Weight& w, int64_t e, int64_t index, int64_t n, int64_t k, int64_t rows, bool by_column = false)
      : w_(w), b_(static_cast<const W*>(w.data) + e * w.expert_stride + index * w.panel_stride), n_(n), k_(k) {
    const PanelCase panel{w.row_stride, w.col_stride, w.padded, std::is_same_v<W, A>, n, rows, by_column};
    width_ = panel.width(), way_ = way_of(panel);
  }

  /// Contracted elements to take at a time.
  int64_t step() const { return way_ == Way::packed ? depth_block(sizeof(A), width_) : std::max<int64_t>(k_, 1); }

  /// c[rows][0 .. n) = left * panel; c has room for 32 or 64 columns. packed holds kPackedSize values.
  void product(const Left<A>& left, int64_t rows, A* c, int64_t c_stride, A* packed) const {
    for (int64_t k = 0; k < k_ || k == 0; k += step()) product_block(left, rows, k, c, c_stride, packed);
  }

  /// The share of the contracted elements [k, k + step()); the first share sets c, the others add to it.
  void product_block(Left<A> left, int64_t rows, int64_t k, A* c, int64_t c_stride, A* packed) const {
    const int64_t depth = std::min(step(), k_ - k);
    const bool add = k > 0;
    left.data += k * (left.by_column ? left.stride : 1);
    if (way_ == Way::dot) return tile<W>().dot({left, b_ + k, w_.row_stride, c, c_stride, rows, n_, depth, add});
    if (way_ == Way::direct)
      return tile<W>().outer({left, b_ + k * w_.col_stride, w_.col_stride, c, c_stride, rows, width_, depth, add});
    pack(b_ + k * w_.col_stride, depth, packed);
    tile<A>().outer({left, packed, width_, c, c_stride, rows, width_, depth, add});
  }

 private:
  void pack(const W* b, int64_t depth, A* packed) const {
    if (w_.col_stride == 1) return tile<W>().transpose(b, w_.row_stride, n_, depth, packed);
    if (w_.padded) return tile<W>().widen(b, packed, depth * kPanel);
    if (w_.row_stride == 1) return tile<W>().gather(b, w_.col_stride, nullptr, n_, depth, packed, width_);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < width_; ++n)
        packed[k * width_ + n] = n < n_ ? A(b[k * w_.col_stride + n * w_.row_stride]) : A(0);
  }

  const Weight w_;
  const W* b_;
  int64_t n_, k_, width_;
  Way way_;
};

/// Conversion of `count` elements of any float type to and from acc.
template <class A> void widen(DType dtype, const void* from, int64_t offset, A* to, int64_t count) {
  visit_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<acc_t<T>, A>) tile<T>().widen(static_cast<const T*>(from) + offset, to, count);
  });
}
template <class A>
void narrow(DType dtype, const A* from, int64_t from_stride, void* to, int64_t offset, int64_t to_stride, int64_t rows,
            int64_t n) {
  visit_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (std::is_same_v<acc_t<T>, A>)
      tile<T>().narrow(from, from_stride, static_cast<T*>(to) + offset, to_stride, rows, n);
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

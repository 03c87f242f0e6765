// SPDX-License-Identifier: Apache-2.0
// Two panels of 32 output columns of an expert's weight side by side, and the product of rows with them. The way is
// chosen by layout and by the number of rows (choice.h): few rows read the weight where it lies, many rows pay for a
// packed float copy first. A long contraction goes in blocks, each packed just before it is used, so that the copy is
// still in the second-level cache.
#pragma once
#include "choice.h"
#include "parallel.h"
#include "tile.h"

namespace moe::cpu {

constexpr int64_t kRowBlock = 480;  // rows of a product kept in cache (a multiple of the 12-row tile)

template <class A> constexpr int64_t kDepthBlock = depth_block(sizeof(A));
template <class A> constexpr int64_t kPackedSize = kDepthBlock<A> * kPair;

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
  struct Half {
    const W* b;  // element (0, 0)
    int64_t n;   // columns, at most 32
  };

  /// Columns 0.. from `first` and 32.. from `second` (n may be 0), k contracted, to be used for about `rows` rows. A
  /// left operand that runs by column cannot be dotted.
  Panel(const Weight& w, Half first, Half second, int64_t k, int64_t rows, bool by_column = false)
      : w_(w), half_{first, second}, k_(k), rows_(rows), width_(second.n > 0 ? kPair : kPanel) {
    const int64_t n = first.n + second.n;
    way_ = way_of({w.row_stride, w.col_stride, w.padded, std::is_same_v<W, A>, n, width_, rows, by_column});
  }

  /// Columns [32 * index, +n) of expert e, n at most 64.
  static Panel columns(const Weight& w, int64_t e, int64_t index, int64_t n, int64_t k, int64_t rows,
                       bool by_column = false) {
    const W* b = static_cast<const W*>(w.data) + e * w.expert_stride + index * w.panel_stride;
    const int64_t first = std::min(n, kPanel);
    return Panel(w, {b, first}, {b + w.panel_stride, n - first}, k, rows, by_column);
  }

  /// c[rows][0 .. n) = left * panel; c has room for 32 columns, or 64 if n > 32. packed holds kPackedSize values.
  /// Meanwhile `next`, if given, is fetched from memory.
  void product(Left<A> left, int64_t rows, A* c, int64_t c_stride, A* packed, const Panel* next = nullptr) const {
    const int64_t apart = half_[1].b - half_[0].b;
    if (way_ == Way::dot) {
      const bool together = apart == kPanel * w_.row_stride && half_[0].n == kPanel;
      if (together)
        return tile<W>().dot({left, half_[0].b, w_.row_stride, c, c_stride, rows, half_[0].n + half_[1].n, k_, false});
      for (const Half& h : half_)
        if (h.n) tile<W>().dot({left, h.b, w_.row_stride, c + (&h - half_) * kPanel, c_stride, rows, h.n, k_, false});
      return;
    }
    if (way_ == Way::direct) {
      // Panels of many rows in the blocks of the packed way: the same bits, packed or not.
      const int64_t block = w_.padded && rows_ >= kDotRows ? kDepthBlock<A> : std::max<int64_t>(k_, 1);
      for (int64_t k = 0; k < k_ || k == 0; k += block) {
        const int64_t depth = std::min(block, k_ - k);
        const W* b = half_[0].b + k * w_.col_stride;
        ProductArgs<W> args{left, b, w_.col_stride, c, c_stride, rows, width_, depth, k > 0, apart};
        if (next) next->set_ahead(k, depth, args);
        tile<W>().outer(args);
        left.data += depth * (left.by_column ? left.stride : 1);
      }
      return;
    }
    const bool joined =
        w_.row_stride == 1 && !w_.padded && apart == kPanel && half_[0].n == kPanel;  // 64 columns in one piece
    for (int64_t k = 0; k < k_ || k == 0; k += kDepthBlock<A>) {
      const int64_t depth = std::min(kDepthBlock<A>, k_ - k);
      if (joined)
        tile<W>().gather(half_[0].b + k * w_.col_stride, w_.col_stride, nullptr, half_[0].n + half_[1].n, depth, packed,
                         width_);
      else
        for (const Half& h : half_)
          if (h.n) pack({h.b + k * w_.col_stride, h.n}, depth, packed + (&h - half_) * depth * kPanel);
      const int64_t stride = joined ? width_ : kPanel, to_half = joined ? kPanel : depth * kPanel;
      ProductArgs<A> args{left, packed, stride, c, c_stride, rows, width_, depth, k > 0, to_half};
      if (next) next->set_ahead(k, depth, args);
      tile<A>().outer(args);
      left.data += depth * (left.by_column ? left.stride : 1);
    }
  }

 private:
  /// Of this panel, the rows that are fetched while the elements [k, k + depth) of another are multiplied. Only memory
  /// in one piece is worth it: rows that follow each other.
  template <class Args> void set_ahead(int64_t k, int64_t depth, Args& args) const {
    if (k_ == 0 || (w_.col_stride != 1 && !w_.padded)) return;
    const int64_t row = w_.padded ? k_ : w_.row_stride, first = width_ * k / k_, last = width_ * (k + depth) / k_;
    args.ahead = reinterpret_cast<const char*>(half_[first / kPanel].b + first % kPanel * row);
    args.ahead_bytes = (last - first) * row * int64_t(sizeof(W));
  }

  void pack(Half half, int64_t depth, A* packed) const {
    if (w_.col_stride == 1) return tile<W>().transpose(half.b, w_.row_stride, half.n, depth, packed);
    if (w_.padded) return tile<W>().widen(half.b, packed, depth * kPanel);
    if (w_.row_stride == 1) return tile<W>().gather(half.b, w_.col_stride, nullptr, half.n, depth, packed, kPanel);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = 0; n < kPanel; ++n)
        packed[k * kPanel + n] = n < half.n ? A(half.b[k * w_.col_stride + n * w_.row_stride]) : A(0);
  }

  const Weight w_;
  const Half half_[2];
  int64_t k_, rows_, width_;
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

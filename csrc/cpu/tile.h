// SPDX-License-Identifier: Apache-2.0
// The micro-kernels' interface: one table of functions an instruction set, filled by tile_impl.h. Replace that file to
// replace the micro-kernels; nothing else knows about vectors.
#pragma once
#include <type_traits>

#include "../moe.h"

namespace moe::cpu {

/// Left operand of a product, in acc. Row m stands at data + (index ? index[m] : m) * stride and runs along k;
/// with by_column, element (m, k) stands at data + m + k * stride.
template <class A> struct Left {
  const A* data;
  int64_t stride;
  const int32_t* index = nullptr;
  bool by_column = false;
};

/// c[m][n] = or += sum over k of left(m, k) * b(n, k). An outer product takes n = 32 or 64.
template <class T> struct ProductArgs {
  Left<acc_t<T>> left;
  const T* b;
  int64_t b_stride;  // dot: between n, k is contiguous. outer: between k, n is contiguous
  acc_t<T>* c;
  int64_t c_stride, m, n, k;
  bool accumulate;
  int64_t b_half = kPanel;      // outer: from column 0 to column 32
  bool stream = false;          // outer: c is written past the caches, where that is possible
  const char* ahead = nullptr;  // outer: memory to fetch into the second-level cache meanwhile, or null
  int64_t ahead_bytes = 0;
};

template <class T> struct Tile {
  using A = acc_t<T>;
  void (*dot)(const ProductArgs<T>&);
  void (*outer)(const ProductArgs<T>&);
  void (*transpose)(const T* b, int64_t b_stride, int64_t n, int64_t k,
                    A* panel);  // rows n -> panel [k][32], zero padded
  /// panel[k][0 .. width) = row k of b, n values and then zeros; rows stand b_stride apart, or where index says.
  void (*gather)(const T* b, int64_t b_stride, const int32_t* index, int64_t n, int64_t k, A* panel, int64_t width);
  void (*widen)(const T*, A*, int64_t count);
  /// The same with NaN as -inf and +inf as the largest finite float; returns the largest.
  A (*read_clean)(const T*, A*, int64_t count);
  void (*narrow)(const A* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t n);
};

/// cost [tokens, E]; rows <- the factor of every token, 0 where it is none; sums [E] <- sum of rows * cost.
template <class A> struct BalanceTile {
  int64_t tokens, E;
  const A *cost, *columns;
  const uint8_t* live;  // [tokens], or null
  int64_t all;          // tokens of all tiles
  A *rows, *sums;
};

/// The k best of values / divisor in descending order, ties to the lowest index, -inf never: top_k returns how many
/// there were. What the division makes equal is equal, unless the k-th best is below the smallest normal number.
template <class A> struct TopK {
  const A* values;  // [count]
  int64_t count, k;
  A divisor;
  A* best;       // [k] values / divisor
  int32_t* ids;  // [k]
  void* room;    // top_k_bytes
};
constexpr int64_t top_k_candidates(int64_t k) { return (2 * k + 160) / 16 * 16; }
template <class A> constexpr int64_t top_k_bytes(int64_t k) {
  return top_k_candidates(k) * int64_t(4 * sizeof(A) + 2 * sizeof(int32_t));
}

template <class A> struct Math {
  /// out = act(gate) * up, or act(gate) where up is null. In place is fine.
  void (*activate)(const ActivationRule&, const A* gate, const A* up, A* out, int64_t count);
  /// The same as `act`, and the gradients of scale * grad_out through it (grad_up only where up is given).
  void (*activate_backward)(const ActivationRule&, A scale, const A* gate, const A* up, const A* grad_out, A* grad_gate,
                            A* grad_up, A* act, int64_t count);
  void (*exp)(A* row, A shift, int64_t count);  // row = exp(row - shift)
  /// exps = exp(row - shift), where no number exceeds shift; returns their sum. In place is fine.
  A (*exp_sum)(const A* row, A shift, A* exps, int64_t count);
  void (*sigmoid)(const A* row, A* out, int64_t count);  // in place is fine
  /// In place: NaN to -inf, +inf to the largest finite float.
  void (*clean)(A* row, int64_t count);
  void (*divide)(A* row, A by, int64_t count);
  /// choice = score + bias (which may be null); -inf where logit is -inf or the sum is NaN.
  void (*choose)(const A* score, const A* bias, const A* logit, A* choice, int64_t count);
  int64_t (*top_k)(const TopK<A>&);
  A (*sum_of_best)(const A* values, int64_t count, int64_t top);  // the sum of the `top` largest, the largest first
  void (*softmax_backward)(const A* exps, A unit, const A* grad, A shift, A* d, int64_t count);
  A (*dot)(const A*, const A*, int64_t count);
  void (*axpy)(A scale, const A* x, A* y, int64_t count);  // y += scale * x
  /// panel [count][kPanel], a token a column: its softmax over the rows, in place; a column of -inf becomes 0.
  void (*softmax_panel)(A* panel, int64_t count);
  /// The least of the `best` largest of values in [0, 1] or negative, and where the last of just this value stands that
  /// is among them, of equal ones the first; -1 and -1 where it is negative.
  void (*cut)(const A* values, int64_t count, int64_t best, A* least, int64_t* last);
  /// marks[i] = values[i] is among them. count is at most kPanel; marks has kPanel places, of which the rest becomes 0.
  void (*mark)(const A* values, int64_t count, A least, int64_t last, uint8_t* marks);
  /// One pass of sinkhorn over a tile: the factors of its tokens, and the sums of its columns.
  void (*balance_tile)(const BalanceTile<A>&);
};

struct Kernels {
  Tile<double> f64;
  Tile<float> f32;
  Tile<bf16> b16;
  Tile<f16> h16;
  Math<float> math32;
  Math<double> math64;
};

const Kernels& kernels();  // of active_isa()

template <class T> const Tile<T>& tile() {
  if constexpr (sizeof(T) == 8) return kernels().f64;
  else if constexpr (sizeof(T) == 4) return kernels().f32;
  else if constexpr (std::is_same_v<T, bf16>) return kernels().b16;
  else return kernels().h16;
}
template <class A> const Math<A>& math() {
  if constexpr (sizeof(A) == 8) return kernels().math64;
  else return kernels().math32;
}

}  // namespace moe::cpu

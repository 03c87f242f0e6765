// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward of fused_experts share: the first product with gate and up side by side, and the
// combine that owns its output columns.
#pragma once
#include "panel.h"

namespace moe::cpu {

constexpr int64_t kPair = 2 * kPanel;  // gate columns, then up columns
constexpr int64_t kTokenBlock = 2048;  // tokens whose output columns one worker sums at a time

inline int64_t rows13(const ExpertMlp& p) { return p.gated ? 2 * p.I : p.I; }
inline ActivationRule rule_of(const ExpertMlp& p) { return {p.activation, p.limit, p.alpha}; }

/// Position of gate (or up) of hidden unit i among the rows of w13 and its bias.
inline int64_t gate_row(const ExpertMlp& p, int64_t i) { return p.interleaved ? 2 * i : i; }
inline int64_t up_row(const ExpertMlp& p, int64_t i) { return p.interleaved ? 2 * i + 1 : p.I + i; }

/// Rows of expert e, and their tokens. Rows of one expert ascend by token.
struct ExpertRows {
  const ExpertMlp& p;
  const int32_t* row_to_token;
  int64_t begin(int64_t e) const { return p.expert_offsets[e]; }
  int64_t end(int64_t e) const { return p.expert_offsets[e + 1]; }
  int64_t first_at(int64_t e, int64_t token) const {
    return std::lower_bound(row_to_token + begin(e), row_to_token + end(e), int32_t(token)) - row_to_token;
  }
};

inline void fill_row_to_token(const ExpertMlp& p, int32_t* row_to_token) {
  for (int64_t r = 0; r < p.expert_offsets[p.E]; ++r) row_to_token[r] = int32_t(p.row_to_slot[r] / p.K);
}

/// The first product for hidden units [32 * index, +units) of expert e.
template <class W> class FirstProduct {
 public:
  using A = acc_t<W>;
  static int64_t buffer_size(const ExpertMlp& p) { return p.H * kPair; }

  FirstProduct(const ExpertMlp& p, int64_t e, int64_t index, int64_t rows, A* buffer)
      : p_(p),
        e_(e),
        first_(index * kPanel),
        units_(std::min(kPanel, p.I - first_)),
        left_columns_(p.interleaved ? std::min(kPanel, 2 * units_) : units_),
        right_columns_(!p.gated        ? 0
                       : p.interleaved ? 2 * units_ - left_columns_
                                       : units_),
        left_(p.w13, e, p.interleaved || (p.w13.padded && p.gated) ? 2 * index : index, left_columns_, p.H, rows,
              buffer),
        right_(right_weight(), e, p.interleaved || p.w13.padded ? 2 * index + 1 : index, right_columns_, p.H,
               right_columns_ ? rows : 0, buffer + p.H * kPanel) {}

  int64_t first() const { return first_; }
  int64_t units() const { return units_; }

  /// c[rows][64]: x W13^T, gate in columns 0.., up in columns 32.. .
  void raw(const Left<A>& x, int64_t rows, A* c) const {
    left_.product(x, rows, c, kPair);
    if (right_columns_) right_.product(x, rows, c + kPanel, kPair);
    if (!p_.interleaved) return;
    for (int64_t m = 0; m < rows; ++m) {
      A pairs[kPair];
      std::copy_n(c + m * kPair, kPair, pairs);
      for (int64_t j = 0; j < units_; ++j)
        c[m * kPair + j] = pairs[2 * j], c[m * kPair + kPanel + j] = pairs[2 * j + 1];
    }
  }

  /// h = s * raw + bias, in place, for the row of one slot.
  void add_bias(int64_t slot, A* c) const {
    const A s = p_.weight_on_input ? static_cast<const A*>(p_.topk_weights)[slot] : A(1);
    const W* bias = p_.w13_bias ? static_cast<const W*>(p_.w13_bias) + e_ * rows13(p_) : nullptr;
    if (!bias && !p_.weight_on_input) return;
    for (int64_t j = 0; j < units_; ++j) {
      c[j] = s * c[j] + (bias ? A(bias[gate_row(p_, first_ + j)]) : A(0));
      if (p_.gated) c[kPanel + j] = s * c[kPanel + j] + (bias ? A(bias[up_row(p_, first_ + j)]) : A(0));
    }
  }

 private:
  Weight right_weight() const {  // up rows of separate blocks start at row I; elsewhere the panel number says it
    Weight w = p_.w13;
    if (p_.gated && !p_.interleaved && !w.padded) w.data = static_cast<const W*>(w.data) + p_.I * w.row_stride;
    return w;
  }

  const ExpertMlp& p_;
  int64_t e_, first_, units_, left_columns_, right_columns_;
  Panel<W> left_, right_;
};

/// A worker's share of the combine: y[t][32] for a block of tokens.
template <class A> int64_t combine_size(const ExpertMlp& p) { return std::min(p.T, kTokenBlock) * kPanel; }

/// out[t][32 * index ..] = sum over the rows r of t of scale(r) * (rows r of `left` times w2's panel + bias), in
/// ascending order of experts, for one block of tokens. A task owns its columns: no atomics, and one order for any
/// thread count.
template <class W, class Scale>
void combine_columns(const ExpertRows& rows, const Left<acc_t<W>>& left, const Weight& w, const void* bias, int64_t k,
                     Scale scale, int64_t task, void* out, acc_t<W>* buffer, acc_t<W>* c, acc_t<W>* y) {
  using A = acc_t<W>;
  const ExpertMlp& p = rows.p;
  const int64_t panels = ceil_div(p.H, kPanel), index = task % panels, t0 = task / panels * kTokenBlock;
  const int64_t tokens = std::min(kTokenBlock, p.T - t0), n = std::min(kPanel, p.H - index * kPanel);
  std::fill_n(y, tokens * kPanel, A(0));
  for (int64_t e = 0; e < p.E; ++e) {
    if (rows.begin(e) == rows.end(e)) continue;
    const int64_t begin = rows.first_at(e, t0), end = rows.first_at(e, t0 + tokens);
    if (begin == end) continue;
    const Panel<W> panel(w, e, index, n, k, end - begin, buffer);
    const W* b = bias ? static_cast<const W*>(bias) + e * p.H + index * kPanel : nullptr;
    for_row_blocks(begin, end, [&](int64_t r0, int64_t count) {
      panel.product({left.data + r0 * left.stride, left.stride}, count, c, kPanel);
      for (int64_t m = 0; m < count; ++m) {
        A* row = c + m * kPanel;
        if (b)
          for (int64_t j = 0; j < n; ++j) row[j] += A(b[j]);
        math<A>().axpy(scale(r0 + m), row, y + (rows.row_to_token[r0 + m] - t0) * kPanel, n);
      }
    });
  }
  for (int64_t t = 0; t < tokens; ++t) narrow(p.dtype, y + t * kPanel, out, (t0 + t) * p.H + index * kPanel, n);
}
inline int64_t combine_tasks(const ExpertMlp& p) { return ceil_div(p.H, kPanel) * ceil_div(p.T, kTokenBlock); }

}  // namespace moe::cpu

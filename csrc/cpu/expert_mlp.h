// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward of fused_experts share: the first product with gate and up side by side, and the
// combine that owns its output columns.
#pragma once
#include "panel.h"

namespace moe::cpu {

constexpr int64_t kPair = 2 * kPanel;  // gate columns, then up columns

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

/// The first product for hidden units [32 * index, +units) of expert e, as two panels: gate and up, or for interleaved
/// weights the first and the second 32 columns of gate, up, gate, up ..
template <class W> class FirstProduct {
 public:
  using A = acc_t<W>;

  FirstProduct(const ExpertMlp& p, int64_t e, int64_t index, int64_t rows)
      : p_(p),
        e_(e),
        first_(index * kPanel),
        units_(std::min(kPanel, p.I - first_)),
        left_(side(p, e, index, 0, rows)),
        right_(side(p, e, index, p.gated, rows)) {}

  int64_t first() const { return first_; }
  int64_t units() const { return units_; }

  /// c[rows][64]: x W13^T, gate in columns 0.., up in columns 32.. . The blocks of x serve both while they are in
  /// cache.
  void raw(const Left<A>& x, int64_t rows, A* c, A* packed) const {
    for (int64_t k = 0; k < p_.H; k += left_.step()) {
      left_.product_block(x, rows, k, c, kPair, packed);
      if (p_.gated) right_.product_block(x, rows, k, c + kPanel, kPair, packed);
    }
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
  static Panel<W> side(const ExpertMlp& p, int64_t e, int64_t index, int64_t which, int64_t rows) {
    const int64_t units = std::min(kPanel, p.I - index * kPanel);
    if (!p.gated) return Panel<W>(p.w13, e, index, units, p.H, rows);
    if (p.interleaved) {
      const int64_t first = std::min(kPanel, 2 * units);
      return Panel<W>(p.w13, e, 2 * index + which, which ? 2 * units - first : first, p.H, rows);
    }
    if (p.w13.padded) return Panel<W>(p.w13, e, 2 * index + which, units, p.H, rows);
    Weight w = p.w13;  // the up rows start at row I, which need not be a multiple of 32
    w.data = static_cast<const W*>(w.data) + which * p.I * w.row_stride;
    return Panel<W>(w, e, index, units, p.H, rows);
  }

  const ExpertMlp& p_;
  int64_t e_, first_, units_;
  Panel<W> left_, right_;
};

/// A worker's memory for one task.
template <class A> struct Scratch {
  A* packed;  // a packed panel
  A* c;       // [kRowBlock][64] a product
  A* y;       // [tokens][64] output columns
};
template <class A> int64_t combine_size(const ExpertMlp& p) { return std::min(p.T, kTokenBlock) * kPair; }

/// out[t] = sum over the rows r of t of scale(r) * (left[r] w + bias), in ascending order of experts. A task owns 32
/// or 64 columns of a block of tokens: no atomics, and one order for any number of threads.
template <class W> struct Combine {
  using A = acc_t<W>;
  const ExpertRows& rows;
  Left<A> left;      // [S, k]
  Weight w;          // (n = H, k)
  const void* bias;  // [E, H] or null
  int64_t k;
  void* out;  // [T, H]

  int64_t columns() const { return panel_columns(w); }
  int64_t column_blocks() const { return ceil_div(rows.p.H, columns()); }
  int64_t tasks() const { return column_blocks() * ceil_div(rows.p.T, kTokenBlock); }

  template <class Scale> void run(int64_t task, Scale scale, const Scratch<A>& scratch) const {
    const int64_t h0 = task % column_blocks() * columns(), n = std::min(columns(), rows.p.H - h0);
    const int64_t t0 = task / column_blocks() * kTokenBlock, tokens = std::min(kTokenBlock, rows.p.T - t0);
    std::fill_n(scratch.y, tokens * kPair, A(0));
    for (int64_t e = 0; e < rows.p.E; ++e) {
      if (rows.begin(e) == rows.end(e)) continue;
      const int64_t begin = rows.first_at(e, t0), end = rows.first_at(e, t0 + tokens);
      if (begin == end) continue;
      const Panel<W> panel(w, e, h0 / kPanel, n, k, end - begin);
      const W* b = bias ? static_cast<const W*>(bias) + e * rows.p.H + h0 : nullptr;
      for_row_blocks(begin, end, [&](int64_t r0, int64_t count) {
        const Left<A> block{left.data + r0 * left.stride, left.stride};
        panel.product(block, count, scratch.c, kPair, scratch.packed);
        for (int64_t m = 0; m < count; ++m) {
          A* row = scratch.c + m * kPair;
          for (int64_t j = 0; b && j < n; ++j) row[j] += A(b[j]);
          math<A>().axpy(scale(r0 + m), row, scratch.y + (rows.row_to_token[r0 + m] - t0) * kPair, n);
        }
      });
    }
    narrow(rows.p.dtype, scratch.y, kPair, out, t0 * rows.p.H + h0, rows.p.H, tokens, n);
  }
};

}  // namespace moe::cpu

// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward of fused_experts share: the first product with gate and up side by side, and the
// combine that owns its output columns.
#pragma once
#include "panel.h"

namespace moe::cpu {

constexpr int64_t kOutBlock = 1 << 17;  // output elements that it sums at a time: they stay in the second-level cache

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
  /// The first expert with rows from e on, or E.
  int64_t hit(int64_t e) const {
    while (e < p.E && begin(e) == end(e)) ++e;
    return e;
  }
  int64_t first_at(int64_t e, int64_t token) const {
    return std::lower_bound(row_to_token + begin(e), row_to_token + end(e), int32_t(token)) - row_to_token;
  }
};

inline void fill_row_to_token(const ExpertMlp& p, int32_t* row_to_token) {
  for (int64_t r = 0; r < p.expert_offsets[p.E]; ++r) row_to_token[r] = int32_t(p.row_to_slot[r] / p.K);
}

/// Hidden units of a task of the first product.
inline int64_t unit_block(const ExpertMlp& p) { return p.gated ? kPanel : kPair; }

/// The first product for hidden units [first, +units) of expert e: gate in columns 0.., up in columns 32.. ; up to 64
/// units where there is no gate.
template <class W> class FirstProduct {
 public:
  using A = acc_t<W>;

  FirstProduct(const ExpertMlp& p, int64_t e, int64_t first, int64_t units, int64_t rows)
      : p_(p), e_(e), first_(first), units_(units), panel_(panel(p, e, first, units, rows)) {}

  int64_t first() const { return first_; }
  int64_t units() const { return units_; }

  /// c[rows][64]: x W13^T. Meanwhile the weight of `next`, if given, is fetched.
  void raw(const Left<A>& x, int64_t rows, A* c, A* packed, const FirstProduct* next = nullptr) const {
    panel_.product(x, rows, c, kPair, packed, next ? &next->panel_ : nullptr);
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
  static Panel<W> panel(const ExpertMlp& p, int64_t e, int64_t first, int64_t units, int64_t rows) {
    const Weight& w = p.plain13.data && rows < kDotRows ? p.plain13 : p.w13;
    if (!p.gated) return Panel<W>::columns(w, e, first / kPanel, units, p.H, rows);
    // Gate, up, gate, up .. is 64 columns in a row; packed panels alternate.
    if (p.interleaved) return Panel<W>::columns(w, e, 2 * first / kPanel, 2 * units, p.H, rows);
    const W* gate =
        static_cast<const W*>(w.data) + e * w.expert_stride + (w.padded ? 2 : 1) * first / kPanel * w.panel_stride;
    return Panel<W>(w, {gate, units}, {gate + (w.padded ? w.panel_stride : p.I * w.row_stride), units}, p.H, rows);
  }

  const ExpertMlp& p_;
  int64_t e_, first_, units_;
  Panel<W> panel_;
};

/// A worker's memory for one task.
template <class A> struct Scratch {
  A* packed;  // a packed panel
  A* c;       // [kRowBlock][64] a product
  A* y;       // [tokens][64] output columns
};
/// Panels of 64 output columns that one task of the combine sums. It reads the rows of an expert once for all of them:
/// as many as leave four tasks a worker and the sums in cache.
inline int64_t combine_panels(const ExpertMlp& p, int32_t workers) {
  const int64_t tokens = std::max<int64_t>(1, std::min(p.T, kTokenBlock));
  const int64_t all = ceil_div(p.H, kPair) * ceil_div(p.T, kTokenBlock);
  return std::max<int64_t>(1, std::min(kOutBlock / (tokens * kPair), all / (4 * workers)));
}
inline int64_t combine_size(const ExpertMlp& p, int32_t workers) {
  return std::min(p.T, kTokenBlock) * kPair * combine_panels(p, workers);
}

/// out[t] = sum over the rows r of t of scale(r) * (left[r] w + bias), in ascending order of experts. A task owns some
/// columns of a block of tokens: no atomics, and one order for any number of threads.
template <class W> struct Combine {
  using A = acc_t<W>;
  const ExpertRows& rows;
  Left<A> left;      // [S, k]
  Weight w;          // (n = H, k)
  const void* bias;  // [E, H] or null
  int64_t k;
  void* out;        // [T, H]
  int64_t columns;  // of a task, a multiple of 64
  Weight plain{};   // beside a packed w, as ExpertMlp has it

  int64_t column_blocks() const { return ceil_div(rows.p.H, columns); }
  int64_t tasks() const { return column_blocks() * ceil_div(rows.p.T, kTokenBlock); }

  template <class Scale> void run(int64_t task, Scale scale, const Scratch<A>& scratch) const {
    const int64_t h0 = task % column_blocks() * columns, n = std::min(columns, rows.p.H - h0);
    const int64_t t0 = task / column_blocks() * kTokenBlock, tokens = std::min(kTokenBlock, rows.p.T - t0);
    std::fill_n(scratch.y, tokens * n, A(0));
    for (int64_t e = rows.hit(0); e < rows.p.E; e = rows.hit(e + 1)) {
      const int64_t begin = rows.first_at(e, t0), end = rows.first_at(e, t0 + tokens), after = rows.hit(e + 1);
      for (int64_t j = 0; j < n && begin < end; j += kPair) {
        const Panel<W> next = j + kPair < n ? panel(e, h0 + j + kPair) : panel(after < rows.p.E ? after : e, h0);
        add_panel(e, h0 + j, {begin, end, scratch.y + j - t0 * n, n}, next, scale, scratch);
      }
    }
    narrow(rows.p.dtype, scratch.y, n, out, t0 * rows.p.H + h0, rows.p.H, tokens, n);
  }

 private:
  /// Rows, and where the sums of their tokens are: token t at y + t * y_stride.
  struct Sums {
    int64_t begin, end;
    A* y;
    int64_t y_stride;
  };

  /// The weight of expert e for at most 64 columns of the output.
  Panel<W> panel(int64_t e, int64_t h) const {
    const int64_t n = std::min(kPair, rows.p.H - h), count = rows.end(e) - rows.begin(e);
    return Panel<W>::columns(plain.data && count < kDotRows ? plain : w, e, h / kPanel, n, k, count);
  }

  /// y[token][0 .. 64) += scale * (the rows of expert e times columns h.. of its weight). Meanwhile `next` is fetched.
  template <class Scale> void add_panel(int64_t e, int64_t h, const Sums& to, const Panel<W>& next, Scale scale,
                                        const Scratch<A>& scratch) const {
    const int64_t n = std::min(kPair, rows.p.H - h);
    const Panel<W> weight = panel(e, h);
    const W* b = bias ? static_cast<const W*>(bias) + e * rows.p.H + h : nullptr;
    for_row_blocks(to.begin, to.end, [&](int64_t r0, int64_t count) {
      const Left<A> block{left.data + r0 * left.stride, left.stride};
      weight.product(block, count, scratch.c, kPair, scratch.packed, &next);
      for (int64_t m = 0; m < count; ++m) {
        A* row = scratch.c + m * kPair;
        for (int64_t j = 0; b && j < n; ++j) row[j] += A(b[j]);
        math<A>().axpy(scale(r0 + m), row, to.y + rows.row_to_token[r0 + m] * to.y_stride, n);
      }
    });
  }
};

}  // namespace moe::cpu

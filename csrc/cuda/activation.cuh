// SPDX-License-Identifier: Apache-2.0
// What the epilogues of w13's product and of w2's dgrad do with one hidden unit of one row; shared by every kernel that
// has those epilogues.
#pragma once
#include "../activation.h"
#include "../score.h"
#include "element.cuh"
#include "grouped_gemm.h"

namespace moe::cuda {

/// What activation.h computes with: one number.
template <class Element> struct Number {
  using A = Element;
  using V = Element;
  static MOE_BOTH A exp(A x) { return exp_of(x); }
  static MOE_BOTH A erf(A x) {
    if constexpr (sizeof(A) == 8) return ::erf(x);
    else return ::erff(x);
  }
};

/// Row of w13, and of its bias, with gate (half 0) or up (half 1) of a hidden unit.
MOE_DEVICE int64_t w13_row(const RowsEpilogue& e, int64_t I, int64_t unit, int half) {
  return e.interleaved ? 2 * unit + half : unit + half * I;
}

/// The weights of one row: s multiplies its input, v its output. A padding row has weight 0.
template <class A> struct RowWeight {
  int64_t slot;  // -1: padding
  A s, v;
};
template <class A> MOE_DEVICE RowWeight<A> row_weight(const RowsEpilogue& e, int64_t r) {
  const int64_t slot = e.row_to_slot ? e.row_to_slot[r] : r;
  const A w = slot < 0 ? A(0) : e.topk_weights ? static_cast<const A*>(e.topk_weights)[slot] : A(1);
  return {slot, e.weight_on_input ? w : A(1), e.weight_on_input ? A(1) : w};
}
template <class A> MOE_DEVICE A mask_of(const RowsEpilogue& e, int64_t slot, int64_t I, int64_t unit) {
  return slot < 0 ? A(0) : e.hidden_mask ? static_cast<const A*>(e.hidden_mask)[slot * I + unit] : A(1);
}
/// bias[e, n], or 0.
template <class T> MOE_DEVICE acc_t<T> bias_of(const RowsEpilogue& e, int64_t expert, int64_t rows, int64_t n) {
  return e.bias ? widen(static_cast<const T*>(e.bias)[expert * rows + n]) : acc_t<T>(0);
}

/// mask * activation(h), h = (gate, up); up is not read where there is no gate.
template <class A> MOE_DEVICE A activate(const RowsEpilogue& e, A gate, A up, A mask) {
  const ActivationRule rule{e.activation, e.limit, e.alpha};
  return mask * gate_of<Number<A>, false>(rule, gate, e.gated ? &up : nullptr, A(0), nullptr, nullptr);
}

/// The backward of one unit.
template <class A> struct UnitGradient {
  A gate, up;  // of h
  A weighted;  // v * mask * activation(h)
  A share;     // in the gradient of the routing weight
};
/// raw = x w13^T of the unit, h = s * raw + bias, u = grad_y w2.
template <class A> MOE_DEVICE UnitGradient<A> activate_backward(const RowsEpilogue& e, const RowWeight<A>& w, A mask,
                                                                A u, A raw_gate, A raw_up, A bias_gate, A bias_up) {
  const ActivationRule rule{e.activation, e.limit, e.alpha};
  const A gate = w.s * raw_gate + bias_gate, up = w.s * raw_up + bias_up, pull = mask * u;
  UnitGradient<A> grad{};
  const A act = gate_of<Number<A>, true>(rule, gate, e.gated ? &up : nullptr, w.v * pull, &grad.gate,
                                         e.gated ? &grad.up : nullptr);
  grad.weighted = w.v * mask * act;
  grad.share = e.weight_on_input ? grad.gate * raw_gate + grad.up * raw_up : pull * act;
  return grad;
}

}  // namespace moe::cuda

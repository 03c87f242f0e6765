// SPDX-License-Identifier: Apache-2.0
// The activations and their derivatives, written once: M gives the numbers, one by one on a GPU, vectors on a CPU.
//   M::V  the number or vector     M::A  its element     M::exp, M::sigmoid, M::erf
#pragma once
#include "moe.h"

namespace moe {

template <class V> struct Value { V value, slope; };
constexpr double kSqrt2OverPi = 0.79788456080286535588, kSqrtHalf = 0.70710678118654752440;

/// act(x) and, where asked for, act'(x), for the activations of one argument.
template <class M, bool kSlope> MOE_BOTH Value<typename M::V> activation_of(Activation activation, typename M::V x) {
  using A = typename M::A;
  using V = typename M::V;
  const V zero{}, one = zero + A(1);
  switch (activation) {
    case Activation::silu: {
      const V s = M::sigmoid(x);
      return {x * s, kSlope ? s * (1 + x * (1 - s)) : zero};
    }
    case Activation::gelu: {
      const V cdf = A(.5) * (1 + M::erf(x * A(kSqrtHalf)));
      return {x * cdf, kSlope ? cdf + x * (A(.5 * kSqrt2OverPi) * M::exp(A(-.5) * x * x)) : zero};
    }
    case Activation::gelu_tanh: {  // (1 + tanh z) / 2 = sigmoid(2 z)
      const V s = M::sigmoid(A(2 * kSqrt2OverPi) * x * (1 + A(.044715) * x * x));
      const V dz = A(2 * kSqrt2OverPi) * (1 + A(3 * .044715) * x * x);
      const V tail = s * (1 - s);
      return {x * s, kSlope ? s + (tail == 0 ? zero : x * tail * dz) : zero};
    }
    case Activation::relu: return {x > 0 ? x : x != x ? x : zero, kSlope ? (x > 0 ? one : x != x ? x : zero) : zero};
    case Activation::relu2: {
      const V r = x > 0 ? x : x != x ? x : zero;
      return {r * r, kSlope ? 2 * r : zero};
    }
    case Activation::swigluoai: break;
  }
  return {zero, zero};
}

/// act(gate) * up, or act(gate) where nothing is gated; with kGrad also the gradients of grad times it.
template <class M, bool kGrad>
MOE_BOTH typename M::V gate_of(const ActivationRule& rule, typename M::V gate, typename M::V up, bool gated,
                               typename M::V grad, typename M::V* grad_gate, typename M::V* grad_up) {
  using A = typename M::A;
  using V = typename M::V;
  if (rule.activation == Activation::swigluoai) {  // (clamp(up) + 1) * min(gate) * sigmoid(alpha * min(gate))
    const V limit = V{} + A(rule.limit), zero{};
    const V g = gate > limit ? limit : gate, u = up > limit ? limit : up < -limit ? -limit : up;
    const V s = M::sigmoid(A(rule.alpha) * g);
    if constexpr (kGrad) {
      *grad_gate = gate > limit ? zero : grad * (u + 1) * s * (1 + A(rule.alpha) * g * (1 - s));
      *grad_up = up > limit ? zero : up < -limit ? zero : grad * g * s;
    }
    return (u + 1) * g * s;
  }
  const Value<V> act = activation_of<M, kGrad>(rule.activation, gate);
  if constexpr (kGrad) {
    *grad_gate = grad * act.slope * (gated ? up : V{} + A(1));
    if (gated) *grad_up = grad * act.value;
  }
  return gated ? act.value * up : act.value;
}

}  // namespace moe

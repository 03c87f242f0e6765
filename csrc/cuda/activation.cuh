// SPDX-License-Identifier: Apache-2.0
// The activations of the expert MLP and their derivatives, as cpu/math_impl.h has them, one hidden unit at a time.
#pragma once
#include "../moe.h"
#include "../score.h"
#include "device.h"

namespace moe::cuda {

MOE_DEVICE float erf_of(float x) { return erff(x); }
MOE_DEVICE double erf_of(double x) { return erf(x); }

/// exp and sigmoid; of a few units in the last place of a float where the result becomes a 16-bit number anyway.
template <bool kFast, class A> MOE_DEVICE A exp_as(A x) {
  if constexpr (kFast) return __expf(x);
  else return exp_of(x);
}
template <bool kFast, class A> MOE_DEVICE A sigmoid_as(A x) {
  if constexpr (kFast) return __fdividef(1.f, 1.f + __expf(-x));
  else return sigmoid_of(x);
}

template <class A> struct Sloped { A value, slope; };

/// act(x) and act'(x), for the activations of one argument.
template <bool kFast, class A> MOE_DEVICE Sloped<A> activation_of(Activation activation, A x) {
  constexpr A sqrt_2_over_pi = A(0.79788456080286535588), sqrt_half = A(0.70710678118654752440);
  const A positive = x > 0 ? x : x != x ? x : A(0);
  switch (activation) {
    case Activation::silu: {
      const A s = sigmoid_as<kFast>(x);
      return {x * s, s * (1 + x * (1 - s))};
    }
    case Activation::gelu: {
      const A cdf = A(.5) * (1 + erf_of(x * sqrt_half));
      return {x * cdf, cdf + x * (A(.5) * sqrt_2_over_pi * exp_as<kFast>(A(-.5) * x * x))};
    }
    case Activation::gelu_tanh: {  // (1 + tanh z) / 2 = sigmoid(2 z)
      const A s = sigmoid_as<kFast>(2 * sqrt_2_over_pi * x * (1 + A(.044715) * x * x));
      const A dz = 2 * sqrt_2_over_pi * (1 + A(3 * .044715) * x * x), tail = s * (1 - s);
      return {x * s, s + (tail == 0 ? A(0) : x * tail * dz)};
    }
    case Activation::relu: return {positive, x > 0 ? A(1) : x != x ? x : A(0)};
    case Activation::relu2: return {positive * positive, 2 * positive};
    case Activation::swigluoai: break;
  }
  return {A(0), A(0)};
}

/// activation(h) of one hidden unit, and its derivatives.
template <class A> struct Activated { A value, by_gate, by_up; };

struct ActivationRule {
  Activation activation;
  bool gated;
  double limit, alpha;  // of swigluoai
};

template <bool kFast, class A> MOE_DEVICE Activated<A> activate(const ActivationRule& rule, A gate, A up) {
  if (rule.activation == Activation::swigluoai) {  // (clamp(up) + 1) * min(gate) * sigmoid(alpha * min(gate))
    const A limit = A(rule.limit), alpha = A(rule.alpha);
    const A g = gate > limit ? limit : gate, u = up > limit ? limit : up < -limit ? -limit : up;
    const A s = sigmoid_as<kFast>(alpha * g);
    return {(u + 1) * g * s, gate > limit ? A(0) : (u + 1) * s * (1 + alpha * g * (1 - s)),
            up > limit || up < -limit ? A(0) : g * s};
  }
  const Sloped<A> act = activation_of<kFast>(rule.activation, gate);
  if (!rule.gated) return {act.value, act.slope, A(0)};
  return {act.value * up, act.slope * up, act.value};
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// The activations of csrc/activation.h, one hidden unit at a time.
#pragma once
#include "../activation.h"
#include "../score.h"
#include "device.h"

namespace moe::cuda {

/// What activation.h computes with: one number. kFast: exp and sigmoid of a few units in the last place of a float,
/// where the result becomes a 16-bit number anyway.
template <class Element, bool kFast> struct Number {
  using A = Element;
  using V = Element;
  static MOE_DEVICE A exp(A x) {
    if constexpr (kFast) return __expf(x);
    else return exp_of(x);
  }
  static MOE_DEVICE A sigmoid(A x) {
    if constexpr (kFast) return __fdividef(1.f, 1.f + __expf(-x));
    else return sigmoid_of(x);
  }
  static MOE_DEVICE A erf(A x) {
    if constexpr (sizeof(A) == 8) return ::erf(x);
    else return ::erff(x);
  }
};

/// activation(h) of one hidden unit, and its derivatives; `up` is not read where there is no gate.
template <class A> struct Activated { A value, by_gate, by_up; };

template <bool kFast, class A>
MOE_DEVICE Activated<A> activate(const ActivationRule& rule, bool gated, A gate, A up) {
  Activated<A> a{};
  a.value = gate_of<Number<A, kFast>, true>(rule, gate, up, gated, A(1), &a.by_gate, &a.by_up);
  return a;
}

}  // namespace moe::cuda

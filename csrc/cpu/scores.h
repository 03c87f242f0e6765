// SPDX-License-Identifier: Apache-2.0
// What a row of logits becomes before any choice is made, and back.
#pragma once
#include <cmath>
#include <limits>

#include "tile.h"

namespace moe::cpu {

/// l = softcap(logits) with NaN as -inf, which stays -inf, and +inf as the largest finite float; true where any is
/// finite.
template <class T, class A> bool clean_logits(const T* row, int64_t E, double softcap, A* l) {
  bool any = false;
  for (int64_t e = 0; e < E; ++e) {
    A v = A(row[e]);
    if (v != v) v = -std::numeric_limits<A>::infinity();
    else if (softcap > 0 && v > -std::numeric_limits<A>::infinity()) v = A(softcap) * std::tanh(v / A(softcap));
    l[e] = std::min(v, A(std::numeric_limits<float>::max()));
    any |= l[e] > -std::numeric_limits<A>::infinity();
  }
  return any;
}

template <class A> A softplus(A l) { return l > A(20) ? l + std::log1p(std::exp(-l)) : std::log1p(std::exp(l)); }

/// s = score(l) and, for softmax, the logsumexp.
template <class A> A score(Scoring scoring, const A* l, int64_t E, A* s) {
  std::copy_n(l, E, s);
  switch (scoring) {
    case Scoring::softmax: {
      const A top = math<A>().max(l, E), sum = math<A>().exp_sum(s, top, E);
      for (int64_t e = 0; e < E; ++e) s[e] /= sum;
      return top + std::log(sum);
    }
    case Scoring::sigmoid: math<A>().sigmoid(s, E); break;
    case Scoring::sqrtsoftplus:
      for (int64_t e = 0; e < E; ++e) s[e] = std::sqrt(softplus(s[e]));
  }
  return A(0);
}

/// Sum of a * b in eight lanes, which a compiler puts side by side; the order is fixed.
template <class A> A dot(const A* a, const A* b, int64_t count) {
  A lanes[8] = {}, sum = 0;
  const int64_t whole = count / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  for (int64_t i = whole; i < count; ++i) sum += a[i] * b[i];
  for (const A lane : lanes) sum += lane;
  return sum;
}

/// d score -> d logit, in place. l and s are what the two functions above made of the row; mean = sum of d * s over
/// the row, and grad_lse the gradient of the logsumexp, both for softmax only.
template <class T, class A> void score_backward(const RouteRule& rule, const T* row, const A* l, const A* s, A mean,
                                                A grad_lse, int64_t E, A* d) {
  switch (rule.scoring) {
    case Scoring::softmax:
      for (int64_t e = 0; e < E; ++e) d[e] = s[e] * (d[e] - mean + grad_lse);
      break;
    case Scoring::sigmoid:
      for (int64_t e = 0; e < E; ++e) d[e] *= s[e] * (1 - s[e]);
      break;
    case Scoring::sqrtsoftplus:
      for (int64_t e = 0; e < E; ++e) d[e] = d[e] != 0 && s[e] > 0 ? d[e] / (2 * s[e] * (1 + std::exp(-l[e]))) : A(0);
  }
  if (rule.logit_softcap > 0)
    for (int64_t e = 0; e < E; ++e) d[e] *= 1 - (l[e] / A(rule.logit_softcap)) * (l[e] / A(rule.logit_softcap));
  for (int64_t e = 0; e < E; ++e)  // nothing flows into infinities and NaN
    d[e] = std::abs(A(row[e])) <= std::numeric_limits<A>::max() ? d[e] : A(0);
}

}  // namespace moe::cpu

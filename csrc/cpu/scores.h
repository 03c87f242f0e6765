// SPDX-License-Identifier: Apache-2.0
// What a row of logits becomes before any choice is made, and back.
#pragma once
#include <cmath>
#include <limits>

#include "../score.h"
#include "tile.h"

namespace moe::cpu {

/// l = softcap(logits) with NaN as -inf, which stays -inf, and +inf as the largest finite float; true where any is
/// finite. `exps` is scratch.
template <class T, class A> bool clean_logits(const T* row, int64_t E, double softcap, A* l, A* exps) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  tile<T>().widen(row, l, E);
  math<A>().clean(l, E);
  if (softcap > 0) {
    for (int64_t e = 0; e < E; ++e) exps[e] = softcap_exponent(l[e], A(softcap));
    math<A>().exp_sum(exps, A(0), E);
    for (int64_t e = 0; e < E; ++e)
      if (l[e] > -infinity) l[e] = softcap_of(l[e], A(softcap), exps[e]);
  }
  return math<A>().max(l, E) > -infinity;
}

/// s = score(l) and, for softmax, the logsumexp.
template <class A> A score(Scoring scoring, const A* l, int64_t E, A* s) {
  std::copy_n(l, E, s);
  switch (scoring) {
    case Scoring::softmax: {
      const A top = math<A>().max(l, E), sum = math<A>().exp_sum(s, top, E);
      math<A>().divide(s, sum, E);
      return top + std::log(sum);
    }
    case Scoring::sigmoid: math<A>().sigmoid(s, E); break;
    case Scoring::sqrtsoftplus:
      for (int64_t e = 0; e < E; ++e) s[e] = sqrtsoftplus_exponent(l[e]);
      math<A>().exp_sum(s, A(0), E);
      for (int64_t e = 0; e < E; ++e) s[e] = sqrtsoftplus_of(l[e], s[e]);
  }
  return A(0);
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

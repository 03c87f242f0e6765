// SPDX-License-Identifier: Apache-2.0
// What a row of logits becomes before any choice is made, and back.
#pragma once
#include <cmath>
#include <limits>

#include "../score.h"
#include "tile.h"

namespace moe::cpu {

/// l = softcap(logits) with NaN as -inf, which stays -inf, and +inf as the largest finite float. Returns the largest:
/// -inf where none is finite. `exps` is scratch.
template <class T, class A> A clean_logits(const T* row, int64_t E, double softcap, A* l, A* exps) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  A top = tile<T>().read_clean(row, l, E);
  if (softcap > 0) {
    for (int64_t e = 0; e < E; ++e) exps[e] = softcap_exponent(l[e], A(softcap));
    math<A>().exp_sum(exps, A(0), exps, E);
    top = -infinity;
    for (int64_t e = 0; e < E; ++e) {
      if (l[e] > -infinity) l[e] = softcap_of(l[e], A(softcap), exps[e]);
      top = std::max(top, l[e]);
    }
  }
  return top;
}

/// s = score(l); of a softmax its exponentials, whose sum is returned, 1 otherwise.
template <class A> A score(Scoring scoring, const A* l, A top, int64_t E, A* s) {
  if (scoring == Scoring::softmax) return math<A>().exp_sum(l, top, s, E);
  if (scoring == Scoring::sigmoid) {
    math<A>().sigmoid(l, s, E);
  } else {
    for (int64_t e = 0; e < E; ++e) s[e] = sqrtsoftplus_exponent(l[e]);
    math<A>().exp_sum(s, A(0), s, E);
    for (int64_t e = 0; e < E; ++e) s[e] = sqrtsoftplus_of(l[e], s[e]);
  }
  return A(1);
}

/// d score -> d logit, in place, of what is no softmax.
template <class A> void unscore(Scoring scoring, const A* l, const A* s, int64_t E, A* d) {
  if (scoring == Scoring::sigmoid)
    for (int64_t e = 0; e < E; ++e) d[e] *= s[e] * (1 - s[e]);
  else
    for (int64_t e = 0; e < E; ++e) d[e] = d[e] != 0 && s[e] > 0 ? d[e] / (2 * s[e] * (1 + std::exp(-l[e]))) : A(0);
}

/// d (clean logit) -> d (raw logit), in place. top is what clean_logits returned.
template <class T, class A> void unclean(const RouteRule& rule, const T* row, const A* l, A top, int64_t E, A* d) {
  if (rule.logit_softcap > 0)
    for (int64_t e = 0; e < E; ++e) d[e] *= 1 - (l[e] / A(rule.logit_softcap)) * (l[e] / A(rule.logit_softcap));
  if (rule.logit_softcap == 0 && top < A(std::numeric_limits<float>::max())) {  // where -inf stands d is 0 already
    return;
  }
  for (int64_t e = 0; e < E; ++e)  // nothing flows into infinities and NaN
    d[e] = std::abs(A(row[e])) <= std::numeric_limits<A>::max() ? d[e] : A(0);
}

}  // namespace moe::cpu

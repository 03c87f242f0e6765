// SPDX-License-Identifier: Apache-2.0
// What a row of logits becomes before any choice is made, and back, on a GPU: a warp a row, its logits in shared
// memory.
#pragma once
#include "../moe.h"
#include "../score.h"
#include "block_copy.cuh"
#include "element.cuh"
#include "warp.cuh"

namespace moe::cuda {

/// NaN as -inf, which stays -inf, and +inf as the largest float, after the softcap.
template <class T> MOE_DEVICE acc_t<T> clean_logit(T raw, double softcap) {
  using A = acc_t<T>;
  A l = widen(raw);
  if (!(l > A(-INFINITY))) return A(-INFINITY);
  if (softcap > 0) l = softcap_of(l, A(softcap), exp_of(softcap_exponent(l, A(softcap))));
  return l < A(3.402823466e38f) ? l : A(3.402823466e38f);
}

/// What softmax needs of a row: its largest logit and the sum of exp(l - top). E counts from the lane on.
template <class A> struct RowSums { A top, sum; };

template <class T> MOE_DEVICE acc_t<T> row_top(const T* row, int E, double softcap, int lane) {
  acc_t<T> top = -INFINITY;
  for (int e = lane; e < E; e += kWarp) {
    const acc_t<T> l = clean_logit(row[e], softcap);
    top = top < l ? l : top;
  }
  return warp_max(top);
}
/// The sum of exp_at(e) over a row, each in [0, 1].
template <class A, class F> MOE_DEVICE A sum_of_exps(int E, int lane, F&& exp_at) {
  if constexpr (sizeof(A) == 8) {
    double sum = 0;
    for (int e = lane; e < E; e += kWarp) sum += exp_at(e);
    return warp_sum(sum);
  } else {
    long long sum = 0;  // in integers: the same bits whoever adds them up
    for (int e = lane; e < E; e += kWarp) sum += exact_part(exp_at(e));
    return exact_sum(warp_sum(sum));
  }
}

template <class A> MOE_DEVICE A score_of(Scoring scoring, A l, RowSums<A> sums) {
  switch (scoring) {
    case Scoring::softmax: return exp_of(l - sums.top) / sums.sum;
    case Scoring::sigmoid: return sigmoid_of(l);
    case Scoring::sqrtsoftplus: return sqrtsoftplus_of(l, exp_of(sqrtsoftplus_exponent(l)));
  }
  return A(0);
}

/// d logit / d score of one expert.
template <class A> MOE_DEVICE A slope_of(Scoring scoring, A s, A l) {
  if (scoring != Scoring::sqrtsoftplus) return scoring == Scoring::softmax ? s : s * (1 - s);
  return l < -40 ? s / 2 : s > 0 ? 1 / (2 * s * (1 + exp_of(-l))) : A(0);
}
/// d (capped logit) / d logit, and 0 where the logit is not finite.
template <class T> MOE_DEVICE acc_t<T> cap_slope(T raw, acc_t<T> l, double softcap) {
  using A = acc_t<T>;
  const A v = widen(raw);
  if (!(v > A(-INFINITY) && v < A(INFINITY))) return 0;
  const A z = softcap > 0 ? l / A(softcap) : A(0);
  return 1 - z * z;
}

/// d logit of one expert from d, that of its score. A softmax ties every logit to `all`: d lse - <d, s> over the row.
template <class T>
MOE_DEVICE acc_t<T> grad_logit(const RouteRule& rule, T raw, acc_t<T> d, acc_t<T> all, RowSums<acc_t<T>> sums) {
  const acc_t<T> l = clean_logit(raw, rule.logit_softcap), s = score_of(rule.scoring, l, sums);
  return (rule.scoring == Scoring::softmax ? d + all : d) * slope_of(rule.scoring, s, l) *
         cap_slope(raw, l, rule.logit_softcap);
}

/// The logits of a tile into shared memory; token i of it stands at i * E.
template <class T>
MOE_DEVICE T* tile_in(const void* logits, int64_t stride, int64_t first, int tokens, int E, void* space) {
  const T* from = static_cast<const T*>(logits) + first * stride;
  if (stride == E) return copy_in(from, tokens * E, space);
  T* to = static_cast<T*>(space);
  for (int i = 0; i < tokens; ++i)
    for (int e = threadIdx.x; e < E; e += blockDim.x) to[i * E + e] = from[i * stride + e];
  return to;
}

}  // namespace moe::cuda

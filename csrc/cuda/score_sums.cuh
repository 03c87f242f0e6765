// SPDX-License-Identifier: Apache-2.0
// Sums of scores over groups of tokens, forward and backward, on a GPU: what route and sum_scores share. A block takes
// runs of a group's tokens (token_runs.h). Of a round each warp puts the scores of its token into shared memory, then
// each thread adds up its experts, token after token: the order is that of the tokens, however many warps there are. A
// run's sums go to a row of their own, and add_rows_kernel adds the rows of a group.
#pragma once
#include "scores.cuh"
#include "token_runs.h"

namespace moe::cuda {

// A number as the bits that stand where keys do.
MOE_DEVICE uint32_t raw_of(float v) { return __float_as_uint(v); }
MOE_DEVICE uint64_t raw_of(double v) { return uint64_t(__double_as_longlong(v)); }
MOE_DEVICE float number_of(uint32_t raw) { return __uint_as_float(raw); }
MOE_DEVICE double number_of(uint64_t raw) { return __longlong_as_double((long long)raw); }
template <class A> using raw_t = decltype(raw_of(A(0)));

MOE_DEVICE bool divides(Scoring scoring, bool normalize) { return normalize && scoring != Scoring::softmax; }

/// raw[e] = the score of expert e in this warp's token, over their sum if `normalize`; 0 if it is not `live`.
template <class T> MOE_DEVICE void put_scores(const RouteRule& rule, bool normalize, bool live, const T* row, int E,
                                              RowSums<acc_t<T>> sums, raw_t<acc_t<T>>* raw, int lane) {
  using A = acc_t<T>;
  A total = 0;
  for (int e = lane; e < E; e += kWarp) {
    const A s = live ? score_of(rule.scoring, clean_logit(row[e], rule.logit_softcap), sums) : A(0);
    raw[e] = raw_of(s);
    total += s;
  }
  if (!divides(rule.scoring, normalize)) return;
  total = warp_sum(total);
  for (int e = lane; e < E && total > 0; e += kWarp) raw[e] = raw_of(number_of(raw[e]) / total);
}

/// sums[e] += what `count` warps put. Thread e, e + blockDim.x, ... owns sums[e].
template <class A> MOE_DEVICE void add_scores(const raw_t<A>* raw, uint32_t stride, int count, int E, A* sums) {
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    A sum = sums[e];
    for (int w = 0; w < count; ++w) sum += number_of(raw[w * int64_t(stride) + e]);
    sums[e] = sum;
  }
}

/// sums [groups, E] = the `rows` rows of each group added up. A block owns 32 experts; each of its warps adds a stretch
/// of the rows, lane by lane an expert, and the first warp adds the stretches.
template <class A>
MOE_KERNEL __launch_bounds__(1024) add_rows_kernel(int E, int64_t groups, int64_t rows, const A* parts, A* sums) {
  MOE_SHARED(A, stretches);  // [warps][32]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int e = blockIdx.x * kWarp + lane;
  const int64_t stretch = (rows + warps - 1) / warps, first = min(warp * stretch, rows);
  for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
    A sum = 0;
    for (int64_t r = first; r < min(first + stretch, rows) && e < E; ++r) sum += parts[(group * rows + r) * E + e];
    stretches[warp * kWarp + lane] = sum;
    __syncthreads();
    for (int w = 1; w < warps && warp == 0; ++w) sum += stretches[w * kWarp + lane];
    if (warp == 0 && e < E) sums[group * E + e] = sum;
    __syncthreads();
  }
}

/// How the gradient of the sums pulls on the scores of one token. `mean` is <pull, s>, which a softmax wants.
template <class A> struct SumPull {
  A shift, scale, mean;
  MOE_DEVICE A of(A grad) const { return (grad - shift) * scale; }
};

/// The pull on a live row, and in the same walk over it the sum of its softmax; sums.top is known. grad: [E], or null.
template <class T> MOE_DEVICE SumPull<acc_t<T>> pull_of(const RouteRule& rule, bool normalize, const T* row, int E,
                                                        const acc_t<T>* grad, RowSums<acc_t<T>>& sums, int lane) {
  using A = acc_t<T>;
  SumPull<A> pull{0, 1, 0};
  if (rule.scoring == Scoring::softmax) {
    A dot = 0;
    sums.sum = sum_of_exps<A>(E, lane, [&](int e) {
      const A exp = exp_of(clean_logit(row[e], rule.logit_softcap) - sums.top);
      if (grad) dot += grad[e] * exp;
      return exp;
    });
    if (grad) pull.mean = warp_sum(dot) / sums.sum;
  } else if (grad && normalize) {
    A total = 0, dot = 0;
    for (int e = lane; e < E; e += kWarp) {
      const A s = score_of(rule.scoring, clean_logit(row[e], rule.logit_softcap), sums);
      total += s, dot += grad[e] * s;
    }
    total = warp_sum(total), dot = warp_sum(dot);
    if (total > 0) pull.scale = 1 / total, pull.shift = dot / total;
  }
  return pull;
}

}  // namespace moe::cuda

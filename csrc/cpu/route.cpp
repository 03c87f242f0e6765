// SPDX-License-Identifier: Apache-2.0
// route: a task some tokens. 1. scores, 2. choice (bias, groups, K best), 3. weights. A row stays in the first-level
// cache.
#include <cmath>
#include <limits>
#include <numeric>

#include "../score.h"
#include "parallel.h"
#include "tile.h"

namespace moe::cpu {
namespace {

constexpr int64_t kTokensPerTask = 32;
constexpr int64_t kScanK = 24;  // up to here K scans for the maximum beat a partial sort

template <class A> struct Scratch {  // a worker's rows of E
  A *logits, *scores, *choice, *group_scores;
  int32_t* order;
  Scratch(void* base, int64_t E, int32_t worker) {
    Workspace space(base ? static_cast<char*>(base) + worker * bytes(E) : nullptr);
    logits = space.take<A>(E), scores = space.take<A>(E), choice = space.take<A>(E), group_scores = space.take<A>(E);
    order = space.take<int32_t>(E);
  }
  static int64_t bytes(int64_t E) {
    Workspace space(nullptr);
    for (int i = 0; i < 4; ++i) space.take<A>(E);
    space.take<int32_t>(E);
    return space.bytes();
  }
};

/// l = softcap(logits) with NaN as -inf, which stays -inf, and +inf as the largest finite float; true where any is
/// finite. `exps` is scratch.
template <class T, class A> bool clean_logits(const T* row, int64_t E, double softcap, A* l, A* exps) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  bool any = false;
  for (int64_t e = 0; e < E; ++e) {
    const A v = A(row[e]);
    l[e] = v > -infinity ? v : -infinity;
    any |= l[e] > -infinity;
  }
  if (softcap > 0) {
    for (int64_t e = 0; e < E; ++e) exps[e] = softcap_exponent(l[e], A(softcap));
    math<A>().exp_sum(exps, A(0), E);
    for (int64_t e = 0; e < E; ++e)
      if (l[e] > -infinity) l[e] = softcap_of(l[e], A(softcap), exps[e]);
  }
  for (int64_t e = 0; e < E; ++e) l[e] = std::min(l[e], A(std::numeric_limits<float>::max()));
  return any;
}

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
      for (int64_t e = 0; e < E; ++e) s[e] = sqrtsoftplus_exponent(l[e]);
      math<A>().exp_sum(s, A(0), E);
      for (int64_t e = 0; e < E; ++e) s[e] = sqrtsoftplus_of(l[e], s[e]);
  }
  return A(0);
}

/// The first index that holds the largest value and is not among the `taken` ids; values taken before are -inf.
template <class A> int32_t take_best(A* values, int64_t count, const int32_t* taken, int64_t taken_count) {
  const A best = math<A>().max(values, count);
  int64_t i = 0;
  if (best > -std::numeric_limits<A>::infinity()) {
    while (values[i] != best) ++i;
    values[i] = -std::numeric_limits<A>::infinity();
  } else {
    while (std::find(taken, taken + taken_count, int32_t(i)) != taken + taken_count) ++i;
  }
  return int32_t(i);
}

/// The `k` best of `values`, ties to the lowest index; values is used up.
template <class A> void take_k_best(A* values, int64_t count, int64_t k, int32_t* order, int32_t* best) {
  if (k <= kScanK) {
    for (int64_t i = 0; i < k; ++i) best[i] = take_best(values, count, best, i);
    return;
  }
  std::iota(order, order + count, 0);
  std::partial_sort(order, order + k, order + count,
                    [&](int32_t a, int32_t b) { return values[a] > values[b] || (values[a] == values[b] && a < b); });
  std::copy_n(order, k, best);
}

/// Masks all experts outside the topk_group groups whose group_top best choices sum highest.
template <class A> void mask_groups(const RouteArgs& args, const Scratch<A>& w) {
  const int64_t size = args.E / args.G;
  for (int64_t g = 0; g < args.G; ++g) {
    std::copy_n(w.choice + g * size, size, w.logits);  // the logits are used up by now
    A sum = 0;
    for (int64_t i = 0; i < std::min(args.group_top, size); ++i) {
      A* best = std::max_element(w.logits, w.logits + size);
      sum += *best;
      *best = -std::numeric_limits<A>::infinity();
    }
    w.group_scores[g] = sum;
  }
  int32_t* kept = w.order;
  for (int64_t i = 0; i < args.topk_group; ++i) kept[i] = take_best(w.group_scores, args.G, kept, i);
  for (int64_t g = 0; g < args.G; ++g)
    if (std::find(kept, kept + args.topk_group, int32_t(g)) == kept + args.topk_group)
      std::fill_n(w.choice + g * size, size, -std::numeric_limits<A>::infinity());
}

template <class T> void route_token(const RouteArgs& args, int64_t t, const Scratch<acc_t<T>>& w) {
  using A = acc_t<T>;
  constexpr A infinity = std::numeric_limits<A>::infinity();
  A* weights = static_cast<A*>(args.topk_weights) + t * args.K;
  int32_t* ids = args.topk_ids + t * args.K;
  A* lse = args.lse ? static_cast<A*>(args.lse) + t : nullptr;
  const bool masked = args.padding_mask && !args.padding_mask[t];
  const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
  if (masked || !clean_logits(row, args.E, args.rule.logit_softcap, w.logits, w.scores)) {
    for (int64_t k = 0; k < args.K; ++k) weights[k] = 0, ids[k] = masked ? -1 : int32_t(k);
    if (lse) *lse = 0;
    return;
  }
  // 1. scores
  const A sum_exp = score(args.rule.scoring, w.logits, args.E, w.scores);
  if (lse) *lse = sum_exp;
  // 2. choice
  const A* bias = static_cast<const A*>(args.correction_bias);
  for (int64_t e = 0; e < args.E; ++e) {
    const A choice = w.scores[e] + (bias ? bias[e] : A(0));
    w.choice[e] = w.logits[e] > -infinity && choice == choice ? choice : -infinity;
  }
  if (args.G > 1) mask_groups(args, w);
  for (int64_t e = 0; e < args.E; ++e)  // an expert out of reach weighs nothing, even if there is no other to take
    if (w.choice[e] == -infinity) w.scores[e] = 0;
  take_k_best(w.choice, args.E, args.K, w.order, ids);
  // 3. weights
  A sum = A(args.rule.renormalize_eps);
  for (int64_t k = 0; k < args.K; ++k) sum += w.scores[ids[k]];
  const A divisor = args.rule.renormalize && sum > 0 ? sum : A(1);  // divide first: K = 1 weighs exactly 1
  for (int64_t k = 0; k < args.K; ++k) weights[k] = w.scores[ids[k]] / divisor * A(args.rule.scale);
}

template <class T> void route_token_backward(const RouteBackwardArgs& args, int64_t t, const Scratch<acc_t<T>>& w) {
  using A = acc_t<T>;
  const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
  T* grad = static_cast<T*>(args.grad_logits) + t * args.E;
  const int32_t* ids = args.topk_ids + t * args.K;
  const A* grad_weights = args.grad_weights ? static_cast<const A*>(args.grad_weights) + t * args.K : nullptr;
  const A* weights = static_cast<const A*>(args.topk_weights) + t * args.K;
  std::fill_n(w.choice, args.E, A(0));  // d score, then d logit
  if (ids[0] >= 0 && clean_logits(row, args.E, args.rule.logit_softcap, w.logits, w.scores)) {
    score(args.rule.scoring, w.logits, args.E, w.scores);
    A sum = A(args.rule.renormalize_eps), dot = 0, mean = 0;
    for (int64_t k = 0; k < args.K && grad_weights; ++k) {
      if (weights[k] == 0) continue;
      sum += w.scores[ids[k]];
      dot += grad_weights[k] * w.scores[ids[k]];
    }
    for (int64_t k = 0; k < args.K && grad_weights; ++k) {
      if (weights[k] == 0) continue;
      const A g = A(args.rule.scale) * grad_weights[k];
      A& d = w.choice[ids[k]];
      if (!args.rule.renormalize) d = g;
      else if (sum > 0) d = g / sum - A(args.rule.scale) * dot / (sum * sum);
      mean += d * w.scores[ids[k]];
    }
    const A grad_lse = args.grad_lse ? static_cast<const A*>(args.grad_lse)[t] : A(0);
    for (int64_t e = 0; e < args.E; ++e) {
      const A s = w.scores[e], l = w.logits[e];
      A& d = w.choice[e];
      switch (args.rule.scoring) {
        case Scoring::softmax: d = s * (d - mean + grad_lse); break;
        case Scoring::sigmoid: d *= s * (1 - s); break;
        case Scoring::sqrtsoftplus: d = d != 0 && s > 0 ? d / (2 * s * (1 + std::exp(-l))) : A(0);
      }
      if (args.rule.logit_softcap > 0) d *= 1 - (l / A(args.rule.logit_softcap)) * (l / A(args.rule.logit_softcap));
      if (!std::isfinite(A(row[e]))) d = 0;
    }
  }
  tile<T>().narrow(w.choice, 0, grad, 0, 1, args.E);
}

template <class Args, class F> void for_tokens(const Args& args, const Workers& workers, F&& f) {
  visit_dtype(args.dtype, [&](auto tag) {
    for_chunks(workers, args.T, kTokensPerTask, [&](int32_t worker, int64_t begin, int64_t end) {
      const Scratch<acc_t<decltype(tag)>> scratch(args.workspace, args.E, worker);
      for (int64_t t = begin; t < end; ++t) f(tag, t, scratch);
    });
  });
}

}  // namespace

int64_t route_workspace_bytes(int64_t E, const Workers& workers) { return workers.count * Scratch<double>::bytes(E); }

void route(const RouteArgs& args, const Workers& workers) {
  for_tokens(args, workers,
             [&](auto tag, int64_t t, const auto& scratch) { route_token<decltype(tag)>(args, t, scratch); });
  std::fill_n(args.tokens_per_expert, args.E, 0);
  for (int64_t s = 0; s < args.T * args.K; ++s)
    if (args.topk_ids[s] >= 0) ++args.tokens_per_expert[args.topk_ids[s]];
}

void route_backward(const RouteBackwardArgs& args, const Workers& workers) {
  for_tokens(args, workers,
             [&](auto tag, int64_t t, const auto& scratch) { route_token_backward<decltype(tag)>(args, t, scratch); });
}

}  // namespace moe::cpu

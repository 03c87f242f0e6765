// SPDX-License-Identifier: Apache-2.0
// route: a task some tokens. 1. scores, 2. choice (bias, groups, K best), 3. weights. A row stays in the first-level
// cache, so that the sums of the scores (score_sums.h), where asked for, cost no second look at the logits.
#include "score_sums.h"

namespace moe::cpu {
namespace {

constexpr int64_t kTokensPerTask = 32;

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

/// The `k` best of `values`, ties to the lowest index, then what is out of reach (-inf) from the lowest index on.
/// Returns how many are in reach. values is used up.
template <class A> int64_t take_k_best(A* values, int64_t count, int64_t k, int32_t* best) {
  const int64_t found = math<A>().top_k(values, count, k, best);
  for (int64_t i = found, next = 0; i < k; ++i, ++next) {
    while (std::find(best, best + found, int32_t(next)) != best + found) ++next;
    best[i] = int32_t(next);
  }
  return found;
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
    w.group_scores[g] = sum == sum ? sum : -std::numeric_limits<A>::infinity();
  }
  int32_t* kept = w.order;
  take_k_best(w.group_scores, args.G, args.topk_group, kept);
  for (int64_t g = 0; g < args.G; ++g)
    if (std::find(kept, kept + args.topk_group, int32_t(g)) == kept + args.topk_group)
      std::fill_n(w.choice + g * size, size, -std::numeric_limits<A>::infinity());
}

/// `sums` [E] gets the token's scores added, where it is given.
template <class T> void route_token(const RouteArgs& args, int64_t t, const Scratch<acc_t<T>>& w, acc_t<T>* sums) {
  using A = acc_t<T>;
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
  if (sums) add_scores(args.rule.scoring, args.normalize_scores, w.scores, args.E, sums);
  // 2. choice
  const A* bias = static_cast<const A*>(args.correction_bias);
  math<A>().choose(w.scores, bias, w.logits, w.choice, args.E);
  if (args.G > 1) mask_groups(args, w);
  const int64_t found = take_k_best(w.choice, args.E, args.K, ids);
  // 3. weights
  A sum = A(args.rule.renormalize_eps);
  for (int64_t k = found; k < args.K; ++k) w.scores[ids[k]] = 0;  // out of reach: weighs nothing
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
  const A* grad_sums = static_cast<const A*>(args.grad_score_sums);
  if (ids[0] < 0 || !clean_logits(row, args.E, args.rule.logit_softcap, w.logits, w.scores)) {
    std::fill_n(w.choice, args.E, A(0));
  } else {
    const Scoring scoring = args.rule.scoring;
    score(scoring, w.logits, args.E, w.scores);
    A sum = A(args.rule.renormalize_eps), dot = 0, mean = 0;  // w.choice: d score, then d logit
    if (grad_sums) {
      const A* grad = grad_sums + t / (args.T / args.B) * args.E;
      mean = add_scores_backward(scoring, args.normalize_scores, grad, w.scores, args.E, w.choice);
    } else {
      std::fill_n(w.choice, args.E, A(0));
    }
    for (int64_t k = 0; k < args.K && grad_weights; ++k) {
      if (weights[k] == 0) continue;
      sum += w.scores[ids[k]];
      dot += grad_weights[k] * w.scores[ids[k]];
    }
    for (int64_t k = 0; k < args.K && grad_weights; ++k) {
      if (weights[k] == 0) continue;
      A d = A(args.rule.scale) * grad_weights[k];
      if (args.rule.renormalize) d = sum > 0 ? d / sum - A(args.rule.scale) * dot / (sum * sum) : A(0);
      w.choice[ids[k]] += d;
      mean += d * w.scores[ids[k]];
    }
    const A grad_lse = args.grad_lse ? static_cast<const A*>(args.grad_lse)[t] : A(0);
    score_backward(args.rule, row, w.logits, w.scores, mean, grad_lse, args.E, w.choice);
  }
  tile<T>().narrow(w.choice, 0, grad, 0, 1, args.E);
}

}  // namespace

int64_t route_workspace_bytes(const RouteArgs& args, const Workers& workers) {
  return workers.count * Scratch<double>::bytes(args.E) +
         (args.score_sums ? sum_rows_bytes(args.T, args.B, args.E) : 0);
}
int64_t route_backward_workspace_bytes(const RouteBackwardArgs& args, const Workers& workers) {
  return workers.count * Scratch<double>::bytes(args.E);
}

void route(const RouteArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const auto route_tokens = [&](int32_t worker, int64_t begin, int64_t end, A* sums) {
      const Scratch<A> scratch(args.workspace, args.E, worker);
      for (int64_t t = begin; t < end; ++t) route_token<T>(args, t, scratch, sums);
    };
    if (args.score_sums) {
      A* const rows =
          reinterpret_cast<A*>(static_cast<char*>(args.workspace) + workers.count * Scratch<A>::bytes(args.E));
      sum_in_blocks(workers, args.T, args.B, args.E, rows, static_cast<A*>(args.score_sums), route_tokens);
    } else {
      for_chunks(workers, args.T, kTokensPerTask,
                 [&](int32_t worker, int64_t begin, int64_t end) { route_tokens(worker, begin, end, nullptr); });
    }
  });
  std::fill_n(args.tokens_per_expert, args.E, 0);
  for (int64_t s = 0; s < args.T * args.K; ++s)
    if (args.topk_ids[s] >= 0) ++args.tokens_per_expert[args.topk_ids[s]];
}

void route_backward(const RouteBackwardArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_chunks(workers, args.T, kTokensPerTask, [&](int32_t worker, int64_t begin, int64_t end) {
      const Scratch<acc_t<T>> scratch(args.workspace, args.E, worker);
      for (int64_t t = begin; t < end; ++t) route_token_backward<T>(args, t, scratch);
    });
  });
}

}  // namespace moe::cpu

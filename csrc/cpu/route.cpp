// SPDX-License-Identifier: Apache-2.0
// route: a task some tokens. 1. scores, 2. choice (bias, groups, K best), 3. weights. A row stays in the first-level
// cache, so that the sums of the scores (score_sums.h), where asked for, cost no second look at the logits.
#include "score_sums.h"

namespace moe::cpu {
namespace {

constexpr int64_t kTokensPerTask = 32;

template <class A> struct Scratch {  // a worker's
  A *logits, *scores, *choice, *group_scores, *best;
  int32_t *order, *counts;
  void* room;  // for top_k
  Scratch(void* base, int64_t E, int64_t K, int32_t worker) {
    Workspace space(base ? static_cast<char*>(base) + worker * bytes(E, K) : nullptr);
    take(space, E, K);
  }
  static int64_t bytes(int64_t E, int64_t K) {
    Workspace space(nullptr);
    Scratch(space, E, K);
    return space.bytes();
  }

 private:
  Scratch(Workspace& space, int64_t E, int64_t K) { take(space, E, K); }
  void take(Workspace& space, int64_t E, int64_t K) {
    logits = space.take<A>(E), scores = space.take<A>(E), choice = space.take<A>(E), group_scores = space.take<A>(E);
    best = space.take<A>(E), order = space.take<int32_t>(E), counts = space.take<int32_t>(E);
    room = space.take<char>(top_k_bytes<A>(std::max(K, E)));
  }
};

/// The `k` best of `values`, ties to the lowest index, then what is out of reach (-inf) from the lowest index on.
/// Returns how many are in reach.
template <class A> int64_t take_k_best(const TopK<A>& args) {
  const int64_t found = math<A>().top_k(args);
  for (int64_t i = found, next = 0; i < args.k; ++i, ++next) {
    while (std::find(args.ids, args.ids + found, int32_t(next)) != args.ids + found) ++next;
    args.ids[i] = int32_t(next);
  }
  return found;
}

/// Masks all experts outside the topk_group groups whose group_top best choices sum highest.
template <class A> void mask_groups(const RouteArgs& args, const Scratch<A>& w) {
  const int64_t size = args.E / args.G;
  for (int64_t g = 0; g < args.G; ++g) {
    const A sum = math<A>().sum_of_best(w.choice + g * size, size, args.group_top);
    w.group_scores[g] = sum == sum ? sum : -std::numeric_limits<A>::infinity();
  }
  int32_t* kept = w.order;
  take_k_best<A>({w.group_scores, args.G, args.topk_group, A(1), w.best, kept, w.room});
  for (int64_t g = 0; g < args.G; ++g)
    if (std::find(kept, kept + args.topk_group, int32_t(g)) == kept + args.topk_group)
      std::fill_n(w.choice + g * size, size, -std::numeric_limits<A>::infinity());
}

/// The ids of a token and, as its weights, their scores. w.scores / sum are the scores.
template <class A> void choose_experts(const RouteArgs& args, const Scratch<A>& w, A sum, int32_t* ids, A* weights) {
  const A* bias = static_cast<const A*>(args.correction_bias);
  const bool softmax = args.rule.scoring == Scoring::softmax;
  if (softmax && !bias && args.G == 1) {  // exponentials sort as their scores do, and few need the division
    const int64_t found = math<A>().top_k({w.scores, args.E, args.K, sum, weights, ids, w.room});
    if (found == args.K && weights[args.K - 1] >= std::numeric_limits<A>::min()) return;
  }
  if (softmax) math<A>().divide(w.scores, sum, args.E);
  math<A>().choose(w.scores, bias, w.logits, w.choice, args.E);
  if (args.G > 1) mask_groups(args, w);
  const int64_t found = take_k_best<A>({w.choice, args.E, args.K, A(1), weights, ids, w.room});
  for (int64_t k = 0; k < args.K; ++k)
    weights[k] = k < found ? w.scores[ids[k]] : A(0);  // out of reach: weighs nothing
}

/// `sums` [E] gets the token's scores added, where it is given.
template <class T> void route_token(const RouteArgs& args, int64_t t, const Scratch<acc_t<T>>& w, acc_t<T>* sums) {
  using A = acc_t<T>;
  A* weights = static_cast<A*>(args.topk_weights) + t * args.K;
  int32_t* ids = args.topk_ids + t * args.K;
  A* lse = args.lse ? static_cast<A*>(args.lse) + t : nullptr;
  const bool masked = args.padding_mask && !args.padding_mask[t];
  const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
  constexpr A low = -std::numeric_limits<A>::infinity();
  const A top = masked ? low : clean_logits(row, args.E, args.rule.logit_softcap, w.logits, w.scores);
  if (!(top > low)) {
    for (int64_t k = 0; k < args.K; ++k) weights[k] = 0, ids[k] = masked ? -1 : int32_t(k);
    if (lse) *lse = 0;
    return;
  }
  // 1. scores
  const A sum_exp = score(args.rule.scoring, w.logits, top, args.E, w.scores);
  if (lse) *lse = top + std::log(sum_exp);
  if (sums) add_scores(args.rule.scoring, args.normalize_scores, w.scores, sum_exp, args.E, sums);
  // 2. choice
  choose_experts(args, w, sum_exp, ids, weights);
  // 3. weights
  A sum = A(args.rule.renormalize_eps);
  for (int64_t k = 0; k < args.K; ++k) sum += weights[k];
  const A divisor = args.rule.renormalize && sum > 0 ? sum : A(1);  // divide first: K = 1 weighs exactly 1
  math<A>().divide(weights, divisor, args.K);
  for (int64_t k = 0; k < args.K; ++k) weights[k] *= A(args.rule.scale);
}

/// d = d logits of a token from those of its weights, its logsumexp and the sums of its group.
template <class T> void route_token_backward(const RouteBackwardArgs& args, int64_t t, const Scratch<acc_t<T>>& w,
                                             acc_t<T>* d) {
  using A = acc_t<T>;
  const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
  const int32_t* ids = args.topk_ids + t * args.K;
  const A* grad_weights = args.grad_weights ? static_cast<const A*>(args.grad_weights) + t * args.K : nullptr;
  const A* weights = static_cast<const A*>(args.topk_weights) + t * args.K;
  const A* grad_sums = static_cast<const A*>(args.grad_score_sums);
  if (grad_sums) grad_sums += t / (args.T / args.B) * args.E;
  constexpr A low = -std::numeric_limits<A>::infinity();
  const A top = ids[0] < 0 ? low : clean_logits(row, args.E, args.rule.logit_softcap, w.logits, w.scores);
  if (!(top > low)) return void(std::fill_n(d, args.E, A(0)));
  const Scoring scoring = args.rule.scoring;
  const A sum_exp = score(scoring, w.logits, top, args.E, w.scores);
  // of the weights: w.best = d score of a slot, w.group_scores its score; a slot that weighs nothing has no part in it
  A *d_slot = w.best, *s_slot = w.group_scores, sum = A(args.rule.renormalize_eps), dot = 0, mean = 0;
  int64_t slots = 0;
  for (int64_t k = 0; k < args.K && grad_weights; ++k) {
    if (weights[k] == 0) continue;
    w.order[slots] = ids[k], d_slot[slots] = grad_weights[k], s_slot[slots] = w.scores[ids[k]] / sum_exp;
    sum += s_slot[slots], dot += d_slot[slots] * s_slot[slots], ++slots;
  }
  for (int64_t i = 0; i < slots; ++i) {
    d_slot[i] *= A(args.rule.scale);
    if (args.rule.renormalize) d_slot[i] = sum > 0 ? d_slot[i] / sum - A(args.rule.scale) * dot / (sum * sum) : A(0);
    mean += d_slot[i] * s_slot[i];
  }
  // of all scores
  if (scoring == Scoring::softmax) {
    if (grad_sums) mean += math<A>().dot(grad_sums, w.scores, args.E) / sum_exp;
    const A shift = (args.grad_lse ? static_cast<const A*>(args.grad_lse)[t] : A(0)) - mean;
    math<A>().softmax_backward(w.scores, 1 / sum_exp, grad_sums, shift, d, args.E);
    for (int64_t i = 0; i < slots; ++i)
      d[w.order[i]] = s_slot[i] * ((grad_sums ? grad_sums[w.order[i]] : A(0)) + d_slot[i] + shift);
  } else {
    add_scores_backward(args.normalize_scores, grad_sums, w.scores, args.E, d);
    for (int64_t i = 0; i < slots; ++i) d[w.order[i]] += d_slot[i];
    unscore(scoring, w.logits, w.scores, args.E, d);
  }
  unclean(args.rule, row, w.logits, top, args.E, d);
}

}  // namespace

int64_t route_workspace_bytes(const RouteArgs& args, const Workers& workers) {
  return workers.count * Scratch<double>::bytes(args.E, args.K) +
         (args.score_sums ? sum_rows_bytes(args.T, args.B, args.E) : 0);
}
int64_t route_backward_workspace_bytes(const RouteBackwardArgs& args, const Workers& workers) {
  return workers.count * Scratch<double>::bytes(args.E, args.K);
}

void route(const RouteArgs& args, const Workers& workers) {
  std::fill_n(args.tokens_per_expert, args.E, 0);
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const auto scratch_of = [&](int32_t worker) { return Scratch<A>(args.workspace, args.E, args.K, worker); };
    for (int32_t worker = 0; worker < workers.count; ++worker) std::fill_n(scratch_of(worker).counts, args.E, 0);
    const auto route_tokens = [&](int32_t worker, int64_t begin, int64_t end, A* sums) {
      const Scratch<A> scratch = scratch_of(worker);
      for (int64_t t = begin; t < end; ++t) {
        route_token<T>(args, t, scratch, sums);
        for (int64_t slot = t * args.K; slot < (t + 1) * args.K; ++slot)
          if (args.topk_ids[slot] >= 0) ++scratch.counts[args.topk_ids[slot]];
      }
    };
    if (args.score_sums) {
      A* const rows =
          reinterpret_cast<A*>(static_cast<char*>(args.workspace) + workers.count * Scratch<A>::bytes(args.E, args.K));
      sum_in_blocks(workers, args.T, args.B, args.E, rows, static_cast<A*>(args.score_sums), route_tokens);
    } else {
      for_chunks(workers, args.T, kTokensPerTask,
                 [&](int32_t worker, int64_t begin, int64_t end) { route_tokens(worker, begin, end, nullptr); });
    }
    for (int32_t worker = 0; worker < workers.count; ++worker)
      for (int64_t e = 0; e < args.E; ++e) args.tokens_per_expert[e] += scratch_of(worker).counts[e];
  });
}

void route_backward(const RouteBackwardArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_chunks(workers, args.T, kTokensPerTask, [&](int32_t worker, int64_t begin, int64_t end) {
      const Scratch<acc_t<T>> scratch(args.workspace, args.E, args.K, worker);
      for (int64_t t = begin; t < end; ++t) {
        T* grad = static_cast<T*>(args.grad_logits) + t * args.E;
        if constexpr (std::is_same_v<T, acc_t<T>>) {
          route_token_backward<T>(args, t, scratch, grad);
        } else {
          route_token_backward<T>(args, t, scratch, scratch.choice);
          tile<T>().narrow(scratch.choice, 0, grad, 0, 1, args.E);
        }
      }
    });
  });
}

}  // namespace moe::cpu

// SPDX-License-Identifier: Apache-2.0
// expert_choice: 1. a task some tokens: their scores, turned to run along the tokens; 2. a task an expert of a group:
// the least score it takes, found in its bits from the highest on; 3. a task some tokens: who took them.
#include <cstring>

#include "parallel.h"
#include "tile.h"

namespace moe::cpu {
namespace {

constexpr int64_t kTokens = kPanel;  // of a task

/// A worker's panel [E, kTokens].
template <class A> A* panel_of(const ExpertCutsArgs& args, int32_t worker) {
  return static_cast<A*>(args.workspace) + worker * kTokens * args.E;
}

/// scores[e][t] of the tokens begin .. end.
template <class T> void score_tokens(const ExpertCutsArgs& args, int32_t worker, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  A *panel = panel_of<A>(args, worker), *scores = static_cast<A*>(args.scores);
  const T* rows = static_cast<const T*>(args.logits) + begin * args.logits_stride;
  tile<T>().transpose(rows, args.logits_stride, end - begin, args.E, panel);
  math<A>().clean(panel, args.E * kTokens);
  math<A>().softmax_panel(panel, args.E);
  for (int64_t e = 0; e < args.E; ++e) std::copy_n(panel + e * kTokens, end - begin, scores + e * args.T + begin);
  for (int64_t t = begin; args.padding_mask && t < end; ++t)
    for (int64_t e = 0; e < args.E && !args.padding_mask[t]; ++e) scores[e * args.T + t] = A(-1);
}

template <class A> void cut_column(const ExpertCutsArgs& args, int64_t task) {
  const int64_t group = task / args.E, e = task % args.E, first = group * args.n;
  int64_t last;
  const A* column = static_cast<const A*>(args.scores) + e * args.T + first;
  math<A>().cut(column, args.n, args.C, static_cast<A*>(args.least) + task, &last);
  args.last[task] = last < 0 ? -1 : int32_t(first + last);
}

/// Calls f(expert, first, count, marks) for the tokens of a task: which of them the expert took.
template <class A, class Args, class F> void for_experts(const Args& args, int64_t begin, int64_t end, F&& f) {
  alignas(8) uint8_t marks[kTokens];
  for (int64_t first = begin; first < end;) {  // the tokens of a task may belong to several groups
    const int64_t group = first / args.n, count = std::min(end, (group + 1) * args.n) - first;
    for (int64_t e = 0; e < args.E; ++e) {
      const int64_t cut = group * args.E + e;
      math<A>().mark(static_cast<const A*>(args.scores) + e * args.T + first, count,
                     static_cast<const A*>(args.least)[cut], args.last[cut] - first, marks);
      f(e, first, count, marks);
    }
    first += count;
  }
}

template <class A> void count_experts(const ExpertCutsArgs& args, int64_t begin, int64_t end) {
  std::fill(args.experts_per_token + begin, args.experts_per_token + end, 0);
  for_experts<A>(args, begin, end, [&](int64_t, int64_t first, int64_t count, const uint8_t* marks) {
    for (int64_t i = 0; i < count; ++i) args.experts_per_token[first + i] += marks[i];
  });
}

/// Puts an expert into a token's slots, behind those of a higher or an equal score; what does not fit falls off the
/// end.
template <class A> void insert(A score, int32_t e, int64_t K, int64_t* filled, A* weights, int32_t* ids) {
  if (*filled == K && !(score > weights[K - 1])) return;
  int64_t at = *filled < K ? (*filled)++ : K - 1;
  for (; at > 0 && weights[at - 1] < score; --at) weights[at] = weights[at - 1], ids[at] = ids[at - 1];
  weights[at] = score, ids[at] = e;
}

template <class A> void fill_slots(const ExpertChoiceArgs& args, int64_t begin, int64_t end) {
  int64_t filled[kTokens] = {};
  A* weights = static_cast<A*>(args.topk_weights);
  std::fill(weights + begin * args.K, weights + end * args.K, A(0));
  std::fill(args.topk_ids + begin * args.K, args.topk_ids + end * args.K, -1);
  for_experts<A>(args, begin, end, [&](int64_t e, int64_t first, int64_t count, const uint8_t* marks) {
    const A* scores = static_cast<const A*>(args.scores) + e * args.T + first;
    for (int64_t at = 0; at < count; at += 8) {  // most of eight tokens are marked by nobody
      uint64_t eight;
      std::memcpy(&eight, marks + at, 8);
      for (int64_t i = at; eight != 0; ++i, eight >>= 8)
        if (eight & 1)
          insert(scores[i], int32_t(e), args.K, &filled[first - begin + i], weights + (first + i) * args.K,
                 args.topk_ids + (first + i) * args.K);
    }
  });
}

void count_tokens(const ExpertCutsArgs& args) {
  std::fill_n(args.tokens_per_expert, args.E, 0);
  for (int64_t first = 0; first < args.T; first += args.n) {
    int64_t tokens = args.n;
    if (args.padding_mask) tokens -= std::count(args.padding_mask + first, args.padding_mask + first + args.n, 0);
    for (int64_t e = 0; e < args.E; ++e) args.tokens_per_expert[e] += int32_t(std::min(tokens, args.C));
  }
}

}  // namespace

int64_t expert_cuts_workspace_bytes(const ExpertCutsArgs& args, const Workers& workers) {
  return workers.count * kTokens * args.E * int64_t(sizeof(double));
}

void expert_cuts(const ExpertCutsArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    for_chunks(workers, args.T, kTokens,
               [&](int32_t worker, int64_t begin, int64_t end) { score_tokens<T>(args, worker, begin, end); });
    for_tasks(workers, args.T / args.n * args.E, [&](int32_t, int64_t task) { cut_column<A>(args, task); });
    for_chunks(workers, args.T, kTokens,
               [&](int32_t, int64_t begin, int64_t end) { count_experts<A>(args, begin, end); });
  });
  count_tokens(args);
}

void expert_choice(const ExpertChoiceArgs& args, const Workers& workers) {
  const auto run = [&](auto tag) {
    for_chunks(workers, args.T, kTokens,
               [&](int32_t, int64_t begin, int64_t end) { fill_slots<decltype(tag)>(args, begin, end); });
  };
  if (args.dtype == DType::f64) run(double{});
  else run(float{});
}

}  // namespace moe::cpu

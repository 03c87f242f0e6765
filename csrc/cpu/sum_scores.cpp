// SPDX-License-Identifier: Apache-2.0
// sum_scores: a task a block of tokens, whose sum goes to a row of its own; then the rows of a group are added in
// order, so that the result does not depend on the threads.
#include "parallel.h"
#include "scores.h"

namespace moe::cpu {
namespace {

constexpr int64_t kTokensPerBlock = 64;

template <class A> struct Parts {
  A *sums, *rows;  // [blocks, E], and a worker's three rows of E
  Parts(void* base, const SumScoresArgs& args, int32_t worker) {
    Workspace space(base);
    sums = space.take<A>(args.B * blocks(args) * args.E);
    for (int32_t i = 0; i <= worker; ++i) rows = space.take<A>(3 * args.E);
  }
  static int64_t blocks(const SumScoresArgs& args) { return ceil_div(args.T / args.B, kTokensPerBlock); }
};

/// The scores of token t in `s`, divided by their sum where asked, and that sum; false for a token that does not count.
template <class T, class A> bool scores_of(const SumScoresArgs& args, int64_t t, A* l, A* s, A* total) {
  const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
  if (args.padding_mask && !args.padding_mask[t]) return false;
  if (!clean_logits(row, args.E, args.rule.logit_softcap, l, s)) return false;
  score(args.rule.scoring, l, args.E, s);
  *total = A(1);
  if (!args.normalize || args.rule.scoring == Scoring::softmax) return true;
  A sum = 0;
  for (int64_t e = 0; e < args.E; ++e) sum += s[e];
  *total = sum > 0 ? sum : A(1);
  return true;
}

template <class T> void sum_block(const SumScoresArgs& args, int32_t worker, int64_t task) {
  using A = acc_t<T>;
  const Parts<A> parts(args.workspace, args, worker);
  const int64_t size = args.T / args.B, blocks = parts.blocks(args), group = task / blocks;
  const int64_t begin = task % blocks * kTokensPerBlock, end = std::min(begin + kTokensPerBlock, size);
  A *l = parts.rows, *s = l + args.E, *sums = parts.sums + task * args.E;
  std::fill_n(sums, args.E, A(0));
  for (int64_t t = group * size + begin; t < group * size + end; ++t) {
    A total;
    if (!scores_of<T>(args, t, l, s, &total)) continue;
    const A scale = 1 / total;
    for (int64_t e = 0; e < args.E; ++e) sums[e] += s[e] * scale;
  }
}

template <class T> void backward_token(const SumScoresArgs& args, int32_t worker, int64_t t) {
  using A = acc_t<T>;
  const Parts<A> parts(args.workspace, args, worker);
  A *l = parts.rows, *s = l + args.E, *d = s + args.E, total;
  const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
  const A* grad = static_cast<const A*>(args.grad_sums) + t / (args.T / args.B) * args.E;
  if (!scores_of<T>(args, t, l, s, &total)) {
    std::fill_n(d, args.E, A(0));
  } else {
    const A mean = math<A>().dot(grad, s, args.E);
    const bool divided = args.normalize && args.rule.scoring != Scoring::softmax;  // d (s / sum) = (g - mean) / sum
    const A shift = divided ? mean / total : A(0), scale = divided ? 1 / total : A(1);
    for (int64_t e = 0; e < args.E; ++e) d[e] = (grad[e] - shift) * scale;
    score_backward(args.rule, row, l, s, mean, A(0), args.E, d);
  }
  tile<T>().narrow(d, 0, static_cast<T*>(args.grad_logits) + t * args.E, 0, 1, args.E);
}

}  // namespace

int64_t sum_scores_workspace_bytes(const SumScoresArgs& args, const Workers& workers) {
  return (args.B * Parts<double>::blocks(args) + 3 * workers.count) * (args.E * int64_t(sizeof(double)) + 64);
}

void sum_scores(const SumScoresArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    const Parts<A> parts(args.workspace, args, 0);
    const int64_t blocks = parts.blocks(args);
    for_tasks(workers, args.B * blocks, [&](int32_t worker, int64_t task) { sum_block<T>(args, worker, task); });
    A* sums = static_cast<A*>(args.sums);
    std::fill_n(sums, args.B * args.E, A(0));
    for (int64_t task = 0; task < args.B * blocks; ++task)
      for (int64_t e = 0; e < args.E; ++e) sums[task / blocks * args.E + e] += parts.sums[task * args.E + e];
  });
}

void sum_scores_backward(const SumScoresArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    for_chunks(workers, args.T, kTokensPerBlock, [&](int32_t worker, int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) backward_token<decltype(tag)>(args, worker, t);
    });
  });
}

}  // namespace moe::cpu

// SPDX-License-Identifier: Apache-2.0
// sum_scores: a task a block of a group's tokens (score_sums.h). A token that is masked or has no finite logit counts
// for nothing.
#include "score_sums.h"

namespace moe::cpu {
namespace {

template <class A> struct Rows {  // a worker's logits, scores and gradients
  A *l, *s, *d;
  Rows(void* base, int64_t E, int32_t worker) {
    Workspace space(base);
    for (int32_t i = 0; i <= worker; ++i) l = space.take<A>(E), s = space.take<A>(E), d = space.take<A>(E);
  }
  static int64_t bytes(int64_t E, const Workers& workers) {
    return 3 * workers.count * (E * int64_t(sizeof(double)) + 64);
  }
};

/// What clean_logits returned: -inf where the token has no scores; `sum` is what score returned.
template <class T, class Args, class A> A scores_of(const Args& args, int64_t t, const Rows<A>& rows, A* sum) {
  const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
  constexpr A low = -std::numeric_limits<A>::infinity();
  if (args.padding_mask && !args.padding_mask[t]) return low;
  const A top = clean_logits(row, args.E, args.rule.logit_softcap, rows.l, rows.s);
  if (top > low) *sum = score(args.rule.scoring, rows.l, top, args.E, rows.s);
  return top;
}

template <class T> void backward_token(const SumScoresBackwardArgs& args, int64_t t, const Rows<acc_t<T>>& rows) {
  using A = acc_t<T>;
  const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
  const A* grad = static_cast<const A*>(args.grad_sums) + t / (args.T / args.B) * args.E;
  A sum;
  const A top = scores_of<T>(args, t, rows, &sum);
  if (!(top > -std::numeric_limits<A>::infinity())) {
    std::fill_n(rows.d, args.E, A(0));
  } else if (args.rule.scoring == Scoring::softmax) {
    const A mean = math<A>().dot(grad, rows.s, args.E) / sum;
    math<A>().softmax_backward(rows.s, 1 / sum, grad, -mean, rows.d, args.E);
    unclean(args.rule, row, rows.l, top, args.E, rows.d);
  } else {
    add_scores_backward(args.normalize, grad, rows.s, args.E, rows.d);
    unscore(args.rule.scoring, rows.l, rows.s, args.E, rows.d);
    unclean(args.rule, row, rows.l, top, args.E, rows.d);
  }
  tile<T>().narrow(rows.d, 0, static_cast<T*>(args.grad_logits) + t * args.E, 0, 1, args.E);
}

}  // namespace

int64_t sum_scores_workspace_bytes(const SumScoresArgs& args, const Workers& workers) {
  return ceil_div(sum_rows_bytes(args.T, args.B, args.E), 64) * 64 + Rows<double>::bytes(args.E, workers);
}

void sum_scores(const SumScoresArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    Workspace space(args.workspace);
    A* const parts = space.take<A>(sum_rows_bytes(args.T, args.B, args.E) / int64_t(sizeof(double)));
    char* const rest = static_cast<char*>(args.workspace) + space.bytes();
    sum_in_blocks(workers, args.T, args.B, args.E, parts, static_cast<A*>(args.sums),
                  [&](int32_t worker, int64_t begin, int64_t end, A* sums) {
                    const Rows<A> rows(rest, args.E, worker);
                    A sum;
                    for (int64_t t = begin; t < end; ++t)
                      if (scores_of<T>(args, t, rows, &sum) > -std::numeric_limits<A>::infinity())
                        add_scores(args.rule.scoring, args.normalize, rows.s, sum, args.E, sums);
                  });
  });
}

int64_t sum_scores_backward_workspace_bytes(const SumScoresBackwardArgs& args, const Workers& workers) {
  return Rows<double>::bytes(args.E, workers);
}

void sum_scores_backward(const SumScoresBackwardArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using A = acc_t<decltype(tag)>;
    for_chunks(workers, args.T, SumBlocks::kTokens, [&](int32_t worker, int64_t begin, int64_t end) {
      const Rows<A> rows(args.workspace, args.E, worker);
      for (int64_t t = begin; t < end; ++t) backward_token<decltype(tag)>(args, t, rows);
    });
  });
}

}  // namespace moe::cpu

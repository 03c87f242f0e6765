// SPDX-License-Identifier: Apache-2.0
// sinkhorn: the exponentials of the logits once, in the place of the plan; then one pass over them an iteration, a task
// a tile: the factor of a token from its row, and at once what its row adds to the columns. The order of all sums is
// that of csrc/sinkhorn.h.
#include "../sinkhorn.h"

#include <cmath>

#include "parallel.h"
#include "scores.h"

namespace moe::cpu {
namespace {

using sinkhorn::kTileSums, sinkhorn::kTileTokens;

template <class A> struct Parts {
  A *tops, *rows, *columns, *next;  // [tiles], [T], [E], [E]
  A *tiles, *sums;                  // [tiles, E], [kTileSums, E]
  A *l, *s;                         // a worker's rows of E
  void* room;                       // and what top_k wants
  int32_t* live;                    // [tiles] tokens
  Parts(Workspace& space, const SinkhornArgs& args, int32_t worker) {
    const int64_t count = ceil_div(args.T, kTileTokens), E = args.E;
    tops = space.take<A>(count), rows = space.take<A>(args.T), columns = space.take<A>(E), next = space.take<A>(E);
    tiles = space.take<A>(count * E), sums = space.take<A>(kTileSums * E), live = space.take<int32_t>(count);
    for (int32_t i = 0; i <= worker; ++i)
      l = space.take<A>(E), s = space.take<A>(E), room = space.take<char>(top_k_bytes<A>(args.K));
  }
  static Parts of(const SinkhornArgs& args, int32_t worker) {
    Workspace space(args.workspace);
    return {space, args, worker};
  }
};

inline bool is_token(const SinkhornArgs& args, int64_t t) { return !args.padding_mask || args.padding_mask[t]; }

template <class T> const T* logits_of(const SinkhornArgs& args, int64_t t) {
  return static_cast<const T*>(args.logits) + t * args.logits_stride;
}
template <class T> acc_t<T>* plan_of(const SinkhornArgs& args, int64_t t) {
  return static_cast<acc_t<T>*>(args.plan) + t * args.E;
}

/// Calls f(worker, tile, begin, end) for the tokens of every tile.
template <class F> void for_tiles(const SinkhornArgs& args, const Workers& workers, F&& f) {
  for_chunks(workers, args.T, kTileTokens, [&](int32_t worker, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kTileTokens)  // without threads all comes as one chunk
      f(worker, first / kTileTokens, first, std::min(first + kTileTokens, end));
  });
}

/// Calls f(first, count) for stretches of tokens whose rows follow one another in `logits` and in the plan.
template <class F> void for_stretches(const SinkhornArgs& args, int64_t begin, int64_t end, F&& f) {
  if (!args.padding_mask && args.logits_stride == args.E) return f(begin, end - begin);
  for (int64_t t = begin; t < end; ++t)
    if (is_token(args, t)) f(t, int64_t(1));
}

/// The clean logits in the place of the plan; tops and tokens of the tiles. Returns the number of tokens.
template <class T> int64_t read_logits(const SinkhornArgs& args, const Workers& workers, acc_t<T>* top) {
  using A = acc_t<T>;
  const Parts<A> whole = Parts<A>::of(args, 0);
  for_tiles(args, workers, [&](int32_t, int64_t at, int64_t begin, int64_t end) {
    A best = -std::numeric_limits<A>::infinity();
    int32_t live = 0;
    for (int64_t t = begin; t < end; ++t)
      if (!is_token(args, t)) std::fill_n(plan_of<T>(args, t), args.E, A(0));
    for_stretches(args, begin, end, [&](int64_t first, int64_t count) {
      A* l = plan_of<T>(args, first);
      best = std::max(best, tile<T>().read_clean(logits_of<T>(args, first), l, count * args.E));
      live += int32_t(count);
    });
    whole.tops[at] = best, whole.live[at] = live;
  });
  int64_t tokens = 0;
  *top = -std::numeric_limits<A>::infinity();
  for (int64_t tile = 0; tile < ceil_div(args.T, kTileTokens); ++tile)
    *top = std::max(*top, whole.tops[tile]), tokens += whole.live[tile];
  return tokens;
}

/// One pass: the factors of the tokens, and the sums of the columns of every tile.
template <class A> void balance_rows(const SinkhornArgs& args, const Workers& workers, int64_t tokens) {
  const Parts<A> w = Parts<A>::of(args, 0);
  for_tiles(args, workers, [&](int32_t, int64_t tile, int64_t begin, int64_t end) {
    const A* cost = static_cast<const A*>(args.plan) + begin * args.E;
    const uint8_t* live = args.padding_mask ? args.padding_mask + begin : nullptr;
    math<A>().balance_tile(
        {end - begin, args.E, cost, w.columns, live, tokens, w.rows + begin, w.tiles + tile * args.E});
  });
}

/// The factors of the columns from the sums of the tiles; returns how far they moved in the mean.
template <class A> A balance_columns(const SinkhornArgs& args, const Parts<A>& w) {
  const int64_t E = args.E;
  std::fill_n(w.sums, kTileSums * E, A(0));
  for (int64_t tile = 0; tile < ceil_div(args.T, kTileTokens); ++tile) {
    A *sums = w.sums + tile % kTileSums * E, *add = w.tiles + tile * E;
    for (int64_t e = 0; e < E; ++e) sums[e] += add[e];
  }
  for (int half = kTileSums / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half * E; ++i) w.sums[i] += w.sums[i + half * E];
  A moved[sinkhorn::kRowSums] = {};
  for (int64_t e = 0; e < E; ++e) {
    w.next[e] = sinkhorn::factor_of(w.sums[e], E);
    moved[e % sinkhorn::kRowSums] += std::abs(w.next[e] - w.columns[e]);
  }
  std::copy_n(w.next, E, w.columns);
  return sinkhorn::by_halves(moved, sinkhorn::kRowSums) / A(E);
}

/// The plan of a token and its K best.
template <class T> void choose(const SinkhornArgs& args, int64_t t, const Parts<acc_t<T>>& whole, void* room) {
  using A = acc_t<T>;
  A* plan = plan_of<T>(args, t);
  int32_t* ids = args.topk_ids + t * args.K;
  if (!is_token(args, t)) return void(std::fill_n(ids, args.K, -1));
  for (int64_t e = 0; e < args.E; ++e) plan[e] = whole.rows[t] * plan[e] * whole.columns[e];
  A* best = static_cast<A*>(args.topk_weights) + t * args.K;  // which come later
  math<A>().top_k({plan, args.E, args.K, A(1), best, ids, room});
}

/// The weights of the tokens begin .. end: the sigmoid of one logit each, or a softmax of the whole row.
template <class T> void weigh(const SinkhornArgs& args, int64_t begin, int64_t end, acc_t<T>* l, acc_t<T>* s) {
  using A = acc_t<T>;
  const int64_t K = args.K;
  A* weights = static_cast<A*>(args.topk_weights);
  for (int64_t t = begin; t < end; ++t) {
    const T* row = logits_of<T>(args, t);
    const int32_t* ids = args.topk_ids + t * K;
    if (K == 1) {
      weights[t] = is_token(args, t) ? A(row[ids[0]]) : -std::numeric_limits<A>::infinity();  // its sigmoid is 0
    } else {
      const A top = is_token(args, t) ? clean_logits(row, args.E, 0, l, s) : -std::numeric_limits<A>::infinity();
      const bool any = top > -std::numeric_limits<A>::infinity();
      const A sum = any ? score(Scoring::softmax, l, top, args.E, s) : A(1);
      for (int64_t k = 0; k < K; ++k) weights[t * K + k] = any ? s[ids[k]] / sum : A(0);
    }
  }
  if (K > 1) return;
  math<A>().clean(weights + begin, end - begin);
  math<A>().sigmoid(weights + begin, weights + begin, end - begin);
}

template <class T> void run(const SinkhornArgs& args, const Workers& workers) {
  using A = acc_t<T>;
  const Parts<A> w = Parts<A>::of(args, 0);
  A top;
  const int64_t tokens = read_logits<T>(args, workers, &top);
  const A shift = sinkhorn::shift_of(top, sizeof(T) == 2);
  for_tiles(args, workers, [&](int32_t, int64_t, int64_t begin, int64_t end) {
    for_stretches(args, begin, end,
                  [&](int64_t first, int64_t count) { math<A>().exp(plan_of<T>(args, first), shift, count * args.E); });
  });
  std::fill_n(w.columns, args.E, A(1));
  int32_t iterations = 0;
  for (A moved = std::numeric_limits<A>::infinity();
       tokens > 0 && iterations < args.max_iterations && !(moved <= A(args.tol)); ++iterations) {
    balance_rows<A>(args, workers, tokens);
    moved = balance_columns<A>(args, w);
  }
  *args.iterations = iterations;
  for_tiles(args, workers, [&](int32_t worker, int64_t, int64_t begin, int64_t end) {
    const Parts<A> mine = Parts<A>::of(args, worker);
    for (int64_t t = begin; t < end; ++t) choose<T>(args, t, w, mine.room);
    weigh<T>(args, begin, end, mine.l, mine.s);
  });
}

}  // namespace

int64_t sinkhorn_workspace_bytes(const SinkhornArgs& args, const Workers& workers) {
  Workspace space(nullptr);
  Parts<double>(space, args, workers.count);
  return space.bytes();
}

void sinkhorn(const SinkhornArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) { run<decltype(tag)>(args, workers); });
  std::fill_n(args.tokens_per_expert, args.E, 0);
  for (int64_t slot = 0; slot < args.T * args.K; ++slot)
    if (args.topk_ids[slot] >= 0) ++args.tokens_per_expert[args.topk_ids[slot]];
}

}  // namespace moe::cpu

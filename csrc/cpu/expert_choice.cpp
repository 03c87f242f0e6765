// SPDX-License-Identifier: Apache-2.0
// expert_choice: 1. scores, written expert by expert; 2. a task an expert of a group: the least score it takes, by one
// histogram of the leading bits and a selection among those that share them; 3. a task some tokens: who took them.
#include "parallel.h"
#include "scores.h"

namespace moe::cpu {
namespace {

constexpr int64_t kTokens = kPanel;  // of a task; a panel is transposed at once
constexpr int kBins = 2048;

/// Bits that sort as the scores do, which are not negative; 0 for what is not a token.
inline uint32_t key_of(float score) { return score < 0 ? 0 : detail::bits_of(score) + 1; }
inline uint64_t key_of(double score) {
  uint64_t bits;
  std::memcpy(&bits, &score, 8);
  return score < 0 ? 0 : bits + 1;
}
template <class A> using key_t = decltype(key_of(A(0)));
template <class A> constexpr int kBinShift = int(sizeof(A)) * 8 - 12;  // the sign is always 0

template <class A> struct Scratch {  // of a worker
  A *rows, *panel;                   // [kTokens, E], [E, kTokens]
  key_t<A>* keys;                    // [n]
  int32_t* bins;
  Scratch(Workspace& space, const ExpertCutsArgs& args) {
    rows = space.take<A>(kTokens * args.E), panel = space.take<A>(kTokens * args.E);
    keys = space.take<key_t<A>>(args.n), bins = space.take<int32_t>(kBins);
  }
  static Scratch of(const ExpertCutsArgs& args, int32_t worker) {
    Workspace count(nullptr);
    Scratch<A>(count, args);
    Workspace space(static_cast<char*>(args.workspace) + worker * count.bytes());
    return {space, args};
  }
};

/// scores[e][t] of the tokens begin .. end.
template <class T> void score_tokens(const ExpertCutsArgs& args, int32_t worker, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const Scratch<A> w = Scratch<A>::of(args, worker);
  A* l = w.panel;  // free until the transposition
  for (int64_t t = begin; t < end; ++t) {
    A* s = w.rows + (t - begin) * args.E;
    const bool masked = args.padding_mask && !args.padding_mask[t];
    const T* row = static_cast<const T*>(args.logits) + t * args.logits_stride;
    if (masked || !clean_logits(row, args.E, 0, l, s)) std::fill_n(s, args.E, masked ? A(-1) : A(0));
    else score(Scoring::softmax, l, args.E, s);
  }
  tile<A>().transpose(w.rows, args.E, end - begin, args.E, w.panel);
  A* scores = static_cast<A*>(args.scores) + begin;
  for (int64_t e = 0; e < args.E; ++e) std::copy_n(w.panel + e * kPanel, end - begin, scores + e * args.T);
}

/// The least of the C largest keys, and how many are larger.
template <class A> key_t<A> least_key(const A* column, int64_t n, int64_t C, const Scratch<A>& w, int64_t* larger) {
  using Key = key_t<A>;
  std::fill_n(w.bins, kBins, 0);
  for (int64_t i = 0; i < n; ++i) ++w.bins[key_of(column[i]) >> kBinShift<A>];
  int bin = kBins - 1;
  int64_t above = 0;
  for (; above + w.bins[bin] < C; --bin) above += w.bins[bin];
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key key = key_of(column[i]);
    w.keys[count] = key;
    count += int(key >> kBinShift<A>) == bin;
  }
  std::nth_element(w.keys, w.keys + (C - above - 1), w.keys + count, std::greater<Key>());
  const Key least = w.keys[C - above - 1];
  *larger = above + std::count_if(w.keys, w.keys + count, [&](Key key) { return key > least; });
  return least;
}

template <class A> void cut_column(const ExpertCutsArgs& args, int32_t worker, int64_t task) {
  const int64_t group = task / args.E, e = task % args.E, first = group * args.n;
  const A* column = static_cast<const A*>(args.scores) + e * args.T + first;
  int64_t larger;
  const key_t<A> least = least_key(column, args.n, args.C, Scratch<A>::of(args, worker), &larger);
  int32_t last = -1;
  for (int64_t i = 0, room = args.C - larger; least > 0 && room > 0; ++i)
    if (key_of(column[i]) == least) last = int32_t(first + i), --room;
  A score = A(-1);
  if (const key_t<A> bits = least - 1; least > 0) std::memcpy(&score, &bits, sizeof score);
  static_cast<A*>(args.least)[task] = score, args.last[task] = last;
}

/// taken[i] = the expert took the token first + i.
template <class A> void mark(const A* scores, A least, int32_t last, int64_t first, int64_t count, uint8_t* taken) {
  for (int64_t i = 0; i < count; ++i)
    taken[i] = uint8_t(int(scores[i] > least) | (int(scores[i] == least) & int(first + i <= last)));
}

template <class A, class F> void for_groups(int64_t n, int64_t begin, int64_t end, F&& f) {
  for (int64_t t = begin; t < end;) {  // the tokens of a task may belong to several groups
    const int64_t stop = std::min(end, (t / n + 1) * n);
    f(t / n, t, stop);
    t = stop;
  }
}

template <class A> void count_experts(const ExpertCutsArgs& args, int64_t begin, int64_t end) {
  uint8_t taken[kTokens];
  std::fill(args.experts_per_token + begin, args.experts_per_token + end, 0);
  for_groups<A>(args.n, begin, end, [&](int64_t group, int64_t first, int64_t stop) {
    for (int64_t e = 0; e < args.E; ++e) {
      const int64_t cut = group * args.E + e;
      mark(static_cast<const A*>(args.scores) + e * args.T + first, static_cast<const A*>(args.least)[cut],
           args.last[cut], first, stop - first, taken);
      for (int64_t i = 0; i < stop - first; ++i) args.experts_per_token[first + i] += taken[i];
    }
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
  alignas(8) uint8_t taken[kTokens] = {};
  int64_t filled[kTokens] = {};
  A* weights = static_cast<A*>(args.topk_weights);
  std::fill(weights + begin * args.K, weights + end * args.K, A(0));
  std::fill(args.topk_ids + begin * args.K, args.topk_ids + end * args.K, -1);
  for_groups<A>(args.n, begin, end, [&](int64_t group, int64_t first, int64_t stop) {
    for (int64_t e = 0; e < args.E; ++e) {
      const int64_t cut = group * args.E + e, count = stop - first;
      const A* scores = static_cast<const A*>(args.scores) + e * args.T + first;
      mark(scores, static_cast<const A*>(args.least)[cut], args.last[cut], first, count, taken);
      std::fill(taken + count, taken + kTokens, uint8_t(0));
      for (int64_t at = 0; at < count; at += 8) {
        uint64_t eight;
        std::memcpy(&eight, taken + at, 8);
        for (int64_t i = at; eight != 0; ++i, eight >>= 8)
          if (eight & 1)
            insert(scores[i], int32_t(e), args.K, &filled[first - begin + i], weights + (first + i) * args.K,
                   args.topk_ids + (first + i) * args.K);
      }
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
  Workspace space(nullptr);
  for (int32_t i = 0; i < workers.count; ++i) Scratch<double>(space, args);
  return space.bytes();
}

void expert_cuts(const ExpertCutsArgs& args, const Workers& workers) {
  visit_dtype(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = acc_t<T>;
    for_chunks(workers, args.T, kTokens,
               [&](int32_t worker, int64_t begin, int64_t end) { score_tokens<T>(args, worker, begin, end); });
    for_tasks(workers, args.T / args.n * args.E,
              [&](int32_t worker, int64_t task) { cut_column<A>(args, worker, task); });
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

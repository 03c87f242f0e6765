// SPDX-License-Identifier: Apache-2.0
// Sums of scores over groups of tokens, forward and backward: what route and sum_scores share. A task is a block of a
// group's tokens, whose sum goes to a row of its own; the rows of a group are added in order, so that the result does
// not depend on the threads.
#pragma once
#include "parallel.h"
#include "scores.h"

namespace moe::cpu {

struct SumBlocks {
  static constexpr int64_t kTokens = 64;
  int64_t size, blocks;  // of a group
  SumBlocks(int64_t T, int64_t B) : size(T / B), blocks(ceil_div(size, kTokens)) {}
};

/// Of the rows that a group of several blocks is summed in.
inline int64_t sum_rows_bytes(int64_t T, int64_t B, int64_t E) {
  const SumBlocks cut(T, B);
  return cut.blocks > 1 ? B * cut.blocks * E * int64_t(sizeof(double)) : 0;
}

/// sums [B, E] of what add(worker, begin, end, row) adds to a row for the tokens begin .. end; rows: sum_rows_bytes.
template <class A, class F>
void sum_in_blocks(const Workers& workers, int64_t T, int64_t B, int64_t E, A* rows, A* sums, F&& add) {
  const SumBlocks cut(T, B);
  A* const parts = cut.blocks == 1 ? sums : rows;
  for_tasks(workers, B * cut.blocks, [&](int32_t worker, int64_t task) {
    const int64_t group = task / cut.blocks, begin = group * cut.size + task % cut.blocks * SumBlocks::kTokens;
    A* row = parts + task * E;
    std::fill_n(row, E, A(0));
    add(worker, begin, std::min(begin + SumBlocks::kTokens, (group + 1) * cut.size), row);
  });
  if (cut.blocks == 1) return;
  std::fill_n(sums, B * E, A(0));
  for (int64_t task = 0; task < B * cut.blocks; ++task)
    math<A>().axpy(A(1), parts + task * E, sums + task / cut.blocks * E, E);
}

/// What a token's scores are divided by: their sum where asked for and above 0. Of a softmax s are the exponentials.
template <class A> A divisor_of(Scoring scoring, bool normalize, const A* s, A sum, int64_t E) {
  if (scoring == Scoring::softmax) return sum;
  if (!normalize) return A(1);
  constexpr int64_t kLanes = 16;
  A lanes[kLanes] = {}, total = 0;
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += s[e + i];
  for (A lane : lanes) total += lane;
  for (; e < E; ++e) total += s[e];
  return total > 0 ? total : A(1);
}

/// s and sum are those of `score` (scores.h).
template <class A> void add_scores(Scoring scoring, bool normalize, const A* s, A sum, int64_t E, A* sums) {
  math<A>().axpy(1 / divisor_of(scoring, normalize, s, sum, E), s, sums, E);
}

/// d = d score from grad, that of the sums of the token's group, or 0 where there is none; not for a softmax.
template <class A> void add_scores_backward(bool normalize, const A* grad, const A* s, int64_t E, A* d) {
  if (!grad) return void(std::fill_n(d, E, A(0)));
  if (!normalize) return void(std::copy_n(grad, E, d));
  const A total = divisor_of(Scoring::sigmoid, true, s, A(1), E), scale = 1 / total;
  const A mean = math<A>().dot(grad, s, E) / total;
  for (int64_t e = 0; e < E; ++e) d[e] = (grad[e] - mean) * scale;
}

}  // namespace moe::cpu

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

/// What a token's scores are divided by: their sum where asked for and above 0. Those of a softmax add up to 1.
template <class A> A divisor_of(Scoring scoring, bool normalize, const A* s, int64_t E) {
  if (!normalize || scoring == Scoring::softmax) return A(1);
  constexpr int64_t kLanes = 16;
  A lanes[kLanes] = {}, sum = 0;
  int64_t e = 0;
  for (; e + kLanes <= E; e += kLanes)
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += s[e + i];
  for (A lane : lanes) sum += lane;
  for (; e < E; ++e) sum += s[e];
  return sum > 0 ? sum : A(1);
}

template <class A> void add_scores(Scoring scoring, bool normalize, const A* s, int64_t E, A* sums) {
  math<A>().axpy(1 / divisor_of(scoring, normalize, s, E), s, sums, E);
}

/// d = d score from grad, that of the sums of the token's group. Returns <d, s> for softmax, which score_backward
/// wants.
template <class A> A add_scores_backward(Scoring scoring, bool normalize, const A* grad, const A* s, int64_t E, A* d) {
  if (!normalize || scoring == Scoring::softmax) {
    std::copy_n(grad, E, d);
    return scoring == Scoring::softmax ? math<A>().dot(grad, s, E) : A(0);
  }
  const A total = divisor_of(scoring, normalize, s, E), mean = math<A>().dot(grad, s, E) / total, scale = 1 / total;
  for (int64_t e = 0; e < E; ++e) d[e] = (grad[e] - mean) * scale;
  return A(0);
}

}  // namespace moe::cpu

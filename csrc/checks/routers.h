// SPDX-License-Identifier: Apache-2.0
// Checks of the routers that look at more than one token: expert choice and Sinkhorn, against naive loops in double.
#pragma once
#include <algorithm>
#include <numeric>

#include "support.h"

namespace checks {

using namespace moe;

inline std::vector<double> softmax_rows(const std::vector<float>& logits, int64_t E) {
  std::vector<double> p(logits.begin(), logits.end());
  for (size_t first = 0; first < p.size(); first += E) {
    double sum = 0;
    for (int64_t e = 0; e < E; ++e) sum += p[first + e] = std::exp(p[first + e]);
    for (int64_t e = 0; e < E; ++e) p[first + e] /= sum;
  }
  return p;
}

/// T tokens in groups of n, every expert takes C of a group. Token 3 is none; tokens 1 and 5 are equal, so that of two
/// equal scores the earlier must win.
inline void check_expert_choice(const Workers& workers, int64_t T, int64_t E, int64_t n, int64_t C) {
  const int64_t K = E;
  auto logits = random<float>(T * E, 21);
  std::copy_n(&logits[E], E, &logits[5 * E]);
  std::vector<uint8_t> mask(T, 1);
  mask[3] = 0;
  auto scores = unwritten<float>(E * T), least = unwritten<float>(T / n * E), weights = unwritten<float>(T * K);
  std::vector<int32_t> last(T / n * E, -7), per_token(T, -7), counts(E, -7), ids(T * K, -7);
  ExpertCutsArgs cuts{.T = T,
                      .E = E,
                      .n = n,
                      .C = C,
                      .dtype = DType::f32,
                      .logits = logits.data(),
                      .logits_stride = E,
                      .padding_mask = mask.data(),
                      .scores = scores.data(),
                      .least = least.data(),
                      .last = last.data(),
                      .experts_per_token = per_token.data(),
                      .tokens_per_expert = counts.data()};
  const Scratch scratch(cpu::expert_cuts_workspace_bytes(cuts, workers));
  cuts.workspace = scratch.get();
  cpu::expert_cuts(cuts, workers);
  cpu::expert_choice({T, E, n, K, DType::f32, scores.data(), least.data(), last.data(), weights.data(), ids.data()},
                     workers);
  const std::vector<double> p = softmax_rows(logits, E);
  std::vector<uint8_t> taken(T * E, 0);
  std::vector<int32_t> want_counts(E, 0);
  for (int64_t first = 0; first < T; first += n)
    for (int64_t e = 0; e < E; ++e) {
      std::vector<int64_t> tokens;
      for (int64_t t = first; t < first + n; ++t)
        if (mask[t]) tokens.push_back(t);
      std::stable_sort(tokens.begin(), tokens.end(), [&](int64_t a, int64_t b) { return p[a * E + e] > p[b * E + e]; });
      for (int64_t i = 0; i < std::min<int64_t>(C, tokens.size()); ++i) taken[tokens[i] * E + e] = 1, ++want_counts[e];
    }
  expect(counts == want_counts, "expert_choice: tokens_per_expert");
  for (int64_t t = 0; t < T; ++t) {
    std::vector<int32_t> want;
    for (int64_t e = 0; e < E; ++e)
      if (taken[t * E + e]) want.push_back(int32_t(e));
    std::stable_sort(want.begin(), want.end(), [&](int32_t a, int32_t b) { return p[t * E + a] > p[t * E + b]; });
    expect(per_token[t] == int32_t(want.size()), "expert_choice: experts_per_token[", t, "]");
    for (int64_t k = 0; k < K; ++k) {
      const int32_t id = k < int64_t(want.size()) ? want[k] : -1;
      expect(ids[t * K + k] == id, "expert_choice: topk_ids[", t, ",", k, "] = ", ids[t * K + k], ", wanted ", id);
      expect_close("expert_choice: topk_weights", &weights[t * K + k], {id < 0 ? 0.0 : p[t * E + id]}, 1e-6);
    }
  }
}

inline void check_sinkhorn(const Workers& workers, int64_t T, int64_t E, int64_t K) {
  const auto logits = random<float>(T * E, 22);
  auto plan = unwritten<float>(T * E), weights = unwritten<float>(T * K);
  std::vector<int32_t> ids(T * K, -7), counts(E, -7), want_counts(E, 0);
  int32_t iterations = -7;
  SinkhornArgs args{.T = T,
                    .E = E,
                    .K = K,
                    .max_iterations = 200,
                    .tol = 1e-9,
                    .dtype = DType::f32,
                    .logits = logits.data(),
                    .logits_stride = E,
                    .plan = plan.data(),
                    .iterations = &iterations,
                    .topk_weights = weights.data(),
                    .topk_ids = ids.data(),
                    .tokens_per_expert = counts.data()};
  const Scratch scratch(cpu::sinkhorn_workspace_bytes(args, workers));
  args.workspace = scratch.get();
  cpu::sinkhorn(args, workers);
  std::vector<double> rows(T, 1.0), columns(E, 1.0);
  for (int32_t i = 0; i < iterations; ++i) {
    for (int64_t t = 0; t < T; ++t) {
      double sum = 0;
      for (int64_t e = 0; e < E; ++e) sum += std::exp(double(logits[t * E + e])) * columns[e];
      rows[t] = 1.0 / T / (sum + 1e-8);
    }
    for (int64_t e = 0; e < E; ++e) {
      double sum = 0;
      for (int64_t t = 0; t < T; ++t) sum += std::exp(double(logits[t * E + e])) * rows[t];
      columns[e] = 1.0 / E / (sum + 1e-8);
    }
  }
  expect(iterations >= 2 && iterations <= 200, "sinkhorn: ", iterations, " iterations");
  const std::vector<double> p = softmax_rows(logits, E);
  for (int64_t t = 0; t < T; ++t) {
    const float* row = &plan[t * E];
    for (int64_t e = 0; e < E; ++e) {
      const double want = rows[t] * std::exp(double(logits[t * E + e])) * columns[e];
      expect_close("sinkhorn: plan", &row[e], {want}, 1e-5 * want);
    }
    std::vector<int32_t> order(E);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    for (int64_t k = 0; k < K; ++k) {
      const double l = logits[t * E + order[k]];
      expect(ids[t * K + k] == order[k], "sinkhorn: topk_ids[", t, ",", k, "]");
      expect_close("sinkhorn: topk_weights", &weights[t * K + k],
                   {K == 1 ? 1 / (1 + std::exp(-l)) : p[t * E + order[k]]}, 1e-6);
      ++want_counts[order[k]];
    }
  }
  expect(counts == want_counts, "sinkhorn: tokens_per_expert");
}

inline void check_routers(const Workers& workers) {
  check_expert_choice(workers, 77, 5, 77, 9);
  check_expert_choice(workers, 300, 6, 100, 30);
  check_expert_choice(workers, 6, 3, 6, 6);
  for (const int64_t K : {1, 3}) check_sinkhorn(workers, 150, 37, K);
}

}  // namespace checks

// SPDX-License-Identifier: Apache-2.0
// Every CPU kernel through moe.h at small sizes, against naive loops in double; no torch, no framework. Exit 1 on a
// failure.
#include <algorithm>
#include <numeric>

#include "cpu/isa.h"
#include "experts.h"
#include "routers.h"
#include "support.h"

using namespace moe;
using namespace checks;

namespace {

void check_route(const Workers& workers) {
  constexpr int64_t T = 9, E = 37, K = 4;
  const auto logits = random<float>(T * E, 1);
  auto weights = unwritten<float>(T * K), lse = unwritten<float>(T);
  std::vector<int32_t> ids(T * K, -7), counts(E, -7), want_counts(E, 0);
  const RouteRule rule{Scoring::softmax, true, 0.0, 2.5, 0.0};
  const Scratch scratch(cpu::route_workspace_bytes({.T = T, .E = E, .K = K}, workers));
  cpu::route({.T = T,
              .E = E,
              .K = K,
              .G = 1,
              .topk_group = 1,
              .group_top = 1,
              .rule = rule,
              .dtype = DType::f32,
              .logits = logits.data(),
              .logits_stride = E,
              .topk_weights = weights.data(),
              .topk_ids = ids.data(),
              .tokens_per_expert = counts.data(),
              .lse = lse.data(),
              .workspace = scratch.get()},
             workers);
  for (int64_t t = 0; t < T; ++t) {
    const float* row = &logits[t * E];
    std::vector<int32_t> order(E);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
    double sum = 0, chosen = 0;
    for (int64_t e = 0; e < E; ++e) sum += std::exp(double(row[e]));
    for (int64_t k = 0; k < K; ++k) chosen += std::exp(double(row[order[k]]));
    expect_close("route: lse", &lse[t], {std::log(sum)}, 1e-5);
    for (int64_t k = 0; k < K; ++k) {
      expect(ids[t * K + k] == order[k], "route: topk_ids[", t, ",", k, "] = ", ids[t * K + k], ", wanted ", order[k]);
      expect_close("route: topk_weights", &weights[t * K + k], {2.5 * std::exp(double(row[order[k]])) / chosen}, 1e-5);
      ++want_counts[order[k]];
    }
  }
  expect(counts == want_counts, "route: tokens_per_expert");
}

/// The directional derivative of route's weights and lse, against differences.
void check_route_backward(const Workers& workers, Scoring scoring) {
  constexpr int64_t T = 130, E = 11, K = 3, B = 2;
  const auto logits = random<double>(T * E, 2), step = random<double>(T * E, 3);
  const auto grad_weights = random<double>(T * K, 4), grad_lse = random<double>(T, 5);
  const auto grad_sums = random<double>(B * E, 6);
  const RouteRule rule{scoring, true, 1e-20, 1.5, 3.0};
  const bool softmax = scoring == Scoring::softmax;
  std::vector<int32_t> ids(T * K), counts(E);
  std::vector<double> weights(T * K), lse(T), sums(B * E);
  const Scratch scratch(
      cpu::route_workspace_bytes({.T = T, .E = E, .K = K, .B = B, .score_sums = sums.data()}, workers));
  const auto value = [&](double h) {
    std::vector<double> moved(T * E);
    for (int64_t i = 0; i < T * E; ++i) moved[i] = logits[i] + h * step[i];
    cpu::route({.T = T,
                .E = E,
                .K = K,
                .G = 1,
                .topk_group = 1,
                .group_top = 1,
                .rule = rule,
                .dtype = DType::f64,
                .logits = moved.data(),
                .logits_stride = E,
                .topk_weights = weights.data(),
                .topk_ids = ids.data(),
                .tokens_per_expert = counts.data(),
                .lse = softmax ? lse.data() : nullptr,
                .B = B,
                .normalize_scores = true,
                .score_sums = sums.data(),
                .workspace = scratch.get()},
               workers);
    return std::inner_product(sums.begin(), sums.end(), grad_sums.begin(), 0.0) +
           std::inner_product(weights.begin(), weights.end(), grad_weights.begin(), 0.0) +
           (softmax ? std::inner_product(lse.begin(), lse.end(), grad_lse.begin(), 0.0) : 0.0);
  };
  const double h = 1e-5, want = (value(h) - value(-h)) / (2 * h);
  value(0);
  auto grad = unwritten<double>(T * E);
  cpu::route_backward({.T = T,
                       .E = E,
                       .K = K,
                       .rule = rule,
                       .dtype = DType::f64,
                       .grad_weights = grad_weights.data(),
                       .grad_lse = softmax ? grad_lse.data() : nullptr,
                       .logits = logits.data(),
                       .logits_stride = E,
                       .topk_ids = ids.data(),
                       .topk_weights = weights.data(),
                       .B = B,
                       .normalize_scores = true,
                       .grad_score_sums = grad_sums.data(),
                       .grad_logits = grad.data(),
                       .workspace = scratch.get()},
                      workers);
  const double got = std::inner_product(grad.begin(), grad.end(), step.begin(), 0.0);
  expect_close("route_backward", &got, {want}, 1e-7);
}

void check_narrow_ids() {
  const std::vector<int64_t> ids = {0, 4, 5, -1, int64_t(1) << 32, 2}, map = {1, -1, 0, 7, 2};
  std::vector<int32_t> narrow(6, -7);
  cpu::narrow_ids({.S = 6, .E = 5, .ids64 = true, .topk_ids = ids.data(), .narrow = narrow.data()});
  expect(narrow == std::vector<int32_t>{0, 4, -1, -1, -1, 2}, "narrow_ids: out of range ids are absent");
  cpu::narrow_ids({.S = 6,
                   .E = 3,
                   .map_size = 5,
                   .ids64 = true,
                   .map64 = true,
                   .topk_ids = ids.data(),
                   .expert_map = map.data(),
                   .narrow = narrow.data()});
  expect(narrow == std::vector<int32_t>{1, 2, -1, -1, -1, 0}, "narrow_ids: through the map");
}

void check_sum_scores(const Workers& workers) {
  for (const auto& [T, E, B] : {std::tuple<int64_t, int64_t, int64_t>{0, 3, 1}, {130, 5, 1}, {140, 7, 2}, {6, 33, 6}}) {
    const std::vector<float> logits = random<float>(T * E, 3), grads = random<float>(B * E, 4);
    std::vector<float> sums(B * E, 7.f), grad(T * E, 7.f);
    const RouteRule rule{.scoring = Scoring::sigmoid};
    SumScoresArgs args{.T = T,
                       .E = E,
                       .B = B,
                       .rule = rule,
                       .normalize = true,
                       .dtype = dtype_of<float>(),
                       .logits = logits.data(),
                       .logits_stride = E,
                       .sums = sums.data()};
    const Scratch scratch(cpu::sum_scores_workspace_bytes(args, workers));
    args.workspace = scratch.get();
    cpu::sum_scores(args, workers);
    SumScoresBackwardArgs back{.T = T,
                               .E = E,
                               .B = B,
                               .rule = rule,
                               .normalize = true,
                               .dtype = dtype_of<float>(),
                               .grad_sums = grads.data(),
                               .logits = logits.data(),
                               .logits_stride = E,
                               .grad_logits = grad.data()};
    const Scratch space(cpu::sum_scores_backward_workspace_bytes(back, workers));
    back.workspace = space.get();
    cpu::sum_scores_backward(back, workers);
    std::vector<double> wanted(B * E, 0.0);
    for (int64_t t = 0; t < T; ++t) {
      const int64_t b = t / (T / B);
      double total = 0, mean = 0;
      const auto s = [&](int64_t e) { return 1 / (1 + std::exp(-double(logits[t * E + e]))); };
      for (int64_t e = 0; e < E; ++e) total += s(e), mean += s(e) * grads[b * E + e];
      for (int64_t e = 0; e < E; ++e) {
        wanted[b * E + e] += s(e) / total;
        const double d = (grads[b * E + e] - mean / total) / total * s(e) * (1 - s(e));
        expect(std::abs(grad[t * E + e] - d) < 1e-5, "sum_scores: grad[", t, ", ", e, "]");
      }
    }
    for (int64_t i = 0; i < B * E; ++i) expect(std::abs(sums[i] - wanted[i]) < 1e-4, "sum_scores: sums[", i, "]");
  }
}

void check_limit_capacity(const Workers& workers) {
  constexpr int64_t T = 23, E = 6, K = 3;
  const auto ids = choose_experts(T, E, K);
  for (const int64_t group_size : {T, int64_t(7), int64_t(100)})
    for (const int64_t capacity : {1, 3, 100}) {
      std::vector<uint8_t> dropped(T * K, 7);
      LimitCapacityArgs args{T, E, K, capacity, group_size, ids.data(), dropped.data(), nullptr};
      const Scratch scratch(cpu::limit_capacity_workspace_bytes(args, workers));
      args.workspace = scratch.get();
      cpu::limit_capacity(args, workers);
      for (int64_t slot = 0; slot < T * K; ++slot) {
        int64_t earlier = 0;  // slots of the same expert and group that come first
        for (int64_t other = 0; other < T * K; ++other) {
          const int64_t t = slot / K, k = slot % K, u = other / K, j = other % K;
          earlier += ids[other] == ids[slot] && u / group_size == t / group_size && (j < k || (j == k && u < t));
        }
        expect(dropped[slot] == (ids[slot] >= 0 && earlier >= capacity), "limit_capacity: dropped[", slot,
               "] = ", int(dropped[slot]), " with ", earlier, " earlier slots and capacity ", capacity);
      }
    }
}

void check_permutation(const Workers& workers, int64_t align) {
  constexpr int64_t T = 23, E = 6, K = 3, H = 19;
  const auto ids = choose_experts(T, E, K);
  const Index index = index_of(ids, E, align);
  const int64_t P = index.row_to_slot.size();
  int64_t present = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t begin = index.expert_offsets[e], end = index.expert_offsets[e + 1];
    expect(begin % align == 0, "permute_index: expert_offsets[", e, "] = ", begin, " with align ", align);
    for (int64_t r = begin, last = -1; r < end; ++r) {
      const int64_t slot = index.row_to_slot[r];
      if (slot < 0) continue;
      expect(slot > last && ids[slot] == e && index.slot_to_row[slot] == r, "permute_index: row ", r, " has slot ",
             slot);
      last = slot, ++present;
    }
  }
  expect(present == std::count_if(ids.begin(), ids.end(), [](int32_t id) { return id >= 0; }),
         "permute_index: lost slots");

  const auto x = random<float>(T * H, 6), weights = random<float>(T * K, 7);
  auto rows = unwritten<float>(P * H);
  cpu::permute({.P = P,
                .H = H,
                .K = K,
                .dtype = DType::f32,
                .x = x.data(),
                .x_stride = H,
                .row_to_slot = index.row_to_slot.data(),
                .x_rows = rows.data()},
               workers);
  for (int64_t i = 0; i < P * H; ++i) {
    const int64_t slot = index.row_to_slot[i / H];
    expect(rows[i] == (slot < 0 ? 0.f : x[slot / K * H + i % H]), "permute: x_rows[", i / H, ",", i % H, "]");
  }

  const auto grad_y = random<float>(T * H, 8);
  auto y = unwritten<float>(T * H), grad_rows = unwritten<float>(P * H), grad_weights = unwritten<float>(T * K);
  std::vector<double> want_y(T * H), want_rows(P * H), want_weights(T * K);
  for (int64_t slot = 0; slot < T * K; ++slot) {
    if (index.slot_to_row[slot] < 0) continue;
    for (int64_t h = 0; h < H; ++h) {
      const int64_t at = slot / K * H + h, r = int64_t(index.slot_to_row[slot]) * H + h;
      want_y[at] += double(weights[slot]) * rows[r];
      want_rows[r] = double(weights[slot]) * grad_y[at];
      want_weights[slot] += double(rows[r]) * grad_y[at];
    }
  }
  cpu::unpermute({.T = T,
                  .H = H,
                  .K = K,
                  .P = P,
                  .dtype = DType::f32,
                  .rows = rows.data(),
                  .rows_stride = H,
                  .slot_to_row = index.slot_to_row.data(),
                  .topk_weights = weights.data(),
                  .y = y.data()},
                 workers);
  expect_close("unpermute", y.data(), want_y, 1e-5);
  cpu::unpermute_backward({.T = T,
                           .H = H,
                           .K = K,
                           .P = P,
                           .dtype = DType::f32,
                           .grad_y = grad_y.data(),
                           .rows = rows.data(),
                           .grad_y_stride = H,
                           .rows_stride = H,
                           .slot_to_row = index.slot_to_row.data(),
                           .topk_weights = weights.data(),
                           .grad_rows = grad_rows.data(),
                           .grad_weights = grad_weights.data()},
                          workers);
  expect_close("unpermute_backward: rows", grad_rows.data(), want_rows, 1e-5);
  expect_close("unpermute_backward: weights", grad_weights.data(), want_weights, 1e-5);
}

template <class Type> void check_grouped_gemm(const Workers& workers) {
  constexpr int64_t G = 4, M = 29, N = 41, K = 35;
  const auto a = random<Type>(M * K, 9), b = random<Type>(G * N * K, 10);
  const std::vector<int32_t> offs = {13, 13, 20, 27};  // one empty group, two rows of none
  std::vector<double> want(M * N);
  for (int64_t m = 0, g = 0; m < 27; ++m) {
    while (m >= offs[g]) ++g;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k) want[m * N + n] += double(a[m * K + k]) * double(b[(g * N + n) * K + k]);
  }
  auto out = unwritten<Type>(M * N);
  GroupedGemmArgs args{.G = G,
                       .M = M,
                       .N = N,
                       .K = K,
                       .grouped = Grouped::rows,
                       .dtype = dtype_of<Type>(),
                       .out_dtype = dtype_of<Type>(),
                       .a = a.data(),
                       .a_row = K,
                       .a_col = 1,
                       .b = {b.data(), N * K, K, 1, kPanel * K, false},
                       .offs = offs.data(),
                       .out = out.data()};
  const Scratch scratch(cpu::grouped_gemm_workspace_bytes(args, workers));
  args.workspace = scratch.get();
  cpu::grouped_gemm(args, workers);
  expect_close("grouped_gemm", out.data(), want, K * std::max(rounding<Type>(), 0x1p-53));
}

}  // namespace

int main() {
  std::cout << "level " << cpu::isa_name(cpu::active_isa()) << "\n";
  check_narrow_ids();
  for (const Workers& workers : kPools) {
    check_route(workers);
    for (const Scoring scoring : {Scoring::softmax, Scoring::sigmoid, Scoring::sqrtsoftplus})
      check_route_backward(workers, scoring);
    check_sum_scores(workers);
    check_routers(workers);
    check_limit_capacity(workers);
    for (const int64_t align : {1, 8}) check_permutation(workers, align);
    check_grouped_gemm<double>(workers);
    check_grouped_gemm<float>(workers);
    check_grouped_gemm<bf16>(workers);
    check_grouped_gemm<f16>(workers);
    check_experts(workers);
  }
  std::cout << (failures() ? "checks failed: " : "all checks passed: ") << failures() << " failures\n";
  return failures() != 0;
}

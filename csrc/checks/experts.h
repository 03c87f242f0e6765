// SPDX-License-Identifier: Apache-2.0
// Checks of fused_experts, its backward and pack_experts against the definition, written as loops over slots.
#pragma once
#include <algorithm>
#include <numeric>
#include <string>

#include "support.h"

namespace checks {

using namespace moe;

/// One expert MLP: sizes, choices, and all inputs as double.
struct Experts {
  int64_t T, H, I, E, K;
  bool gated, interleaved, weight_on_input;
  std::vector<int32_t> ids;
  std::vector<double> x, w13, w2, weights, w13_bias, w2_bias;

  int64_t rows13() const { return gated ? 2 * I : I; }
  std::string name() const {
    return std::string(gated ? "silu gated" : "relu2") + (interleaved ? " interleaved" : "") +
           (weight_on_input ? " weight_on_input" : "");
  }

  /// The definition.
  std::vector<double> forward() const {
    std::vector<double> y(T * H), a(I), h(rows13());
    for (int64_t slot = 0; slot < T * K; ++slot) {
      const int64_t e = ids[slot];
      if (e < 0) continue;
      const double *row = &x[slot / K * H], s = weight_on_input ? weights[slot] : 1,
                   w = weight_on_input ? 1 : weights[slot];
      for (int64_t n = 0; n < rows13(); ++n) {
        const double* weight = &w13[(e * rows13() + n) * H];
        h[n] = s * std::inner_product(row, row + H, weight, 0.0) + w13_bias[e * rows13() + n];
      }
      for (int64_t i = 0; i < I; ++i) {
        const double gate = h[interleaved ? 2 * i : i], relu = std::max(gate, 0.0);
        a[i] = gated ? gate / (1 + std::exp(-gate)) * h[interleaved ? 2 * i + 1 : I + i] : relu * relu;
      }
      for (int64_t n = 0; n < H; ++n) {
        const double product = std::inner_product(a.begin(), a.end(), &w2[(e * H + n) * I], 0.0);
        y[slot / K * H + n] += w * (product + w2_bias[e * H + n]);
      }
    }
    return y;
  }
};

/// Inputs that the type holds exactly, so that kernel and definition start from the same numbers.
template <class Type> Experts make_experts(int64_t T, bool gated, bool interleaved, bool weight_on_input) {
  Experts c{T, 37, 45, 5, 2, gated, interleaved, weight_on_input, {}, {}, {}, {}, {}, {}, {}};
  c.ids = choose_experts(c.T, c.E, c.K);
  c.x = as_double(random<Type>(c.T * c.H, 11)), c.weights = as_double(random<float>(c.T * c.K, 14));
  c.w13 = as_double(random<Type>(c.E * c.rows13() * c.H, 12)), c.w2 = as_double(random<Type>(c.E * c.H * c.I, 13));
  c.w13_bias = as_double(random<Type>(c.E * c.rows13(), 15)), c.w2_bias = as_double(random<Type>(c.E * c.H, 16));
  return c;
}

/// The same in the kernel's types, with the index and the argument struct that points into it.
template <class Type> struct Arguments {
  using A = acc_t<Type>;
  std::vector<Type> x, w13, w2, w13_bias, w2_bias;
  std::vector<A> weights;
  Index index;
  ExpertMlp mlp{};

  explicit Arguments(const Experts& c)
      : x(c.x.begin(), c.x.end()),
        w13(c.w13.begin(), c.w13.end()),
        w2(c.w2.begin(), c.w2.end()),
        w13_bias(c.w13_bias.begin(), c.w13_bias.end()),
        w2_bias(c.w2_bias.begin(), c.w2_bias.end()),
        weights(c.weights.begin(), c.weights.end()),
        index(index_of(c.ids, c.E, 1)) {
    mlp.T = c.T, mlp.H = c.H, mlp.I = c.I, mlp.E = c.E, mlp.K = c.K;
    mlp.dtype = mlp.weight_dtype = dtype_of<Type>();
    mlp.activation = c.gated ? Activation::silu : Activation::relu2;
    mlp.gated = c.gated, mlp.interleaved = c.interleaved, mlp.weight_on_input = c.weight_on_input;
    mlp.limit = 7, mlp.alpha = 1.702;
    mlp.x = x.data(), mlp.x_stride = c.H;
    mlp.w13 = {w13.data(), c.rows13() * c.H, c.H, 1, kPanel * c.H, false};
    mlp.w2 = {w2.data(), c.H * c.I, c.I, 1, kPanel * c.I, false};
    mlp.w13_bias = w13_bias.data(), mlp.w2_bias = w2_bias.data();
    mlp.topk_weights = weights.data(), mlp.hidden_mask = nullptr;
    mlp.row_to_slot = index.row_to_slot.data(), mlp.expert_offsets = index.expert_offsets.data();
  }
};

template <class Type> std::vector<Type> run_experts(const ExpertMlp& mlp, Type* hidden, const Workers& workers) {
  auto y = unwritten<Type>(mlp.T * mlp.H);
  FusedExpertsArgs args{.mlp = mlp, .hidden = hidden, .y = y.data()};
  const Scratch scratch(cpu::fused_experts_workspace_bytes(args, workers));
  args.workspace = scratch.get();
  cpu::fused_experts(args, workers);
  return y;
}

/// Sums of H and of I terms and one rounding of the result.
template <class Type> double forward_bound(const Experts& c, const std::vector<double>& y) {
  double largest = 0;
  for (const double value : y) largest = std::max(largest, std::abs(value));
  return largest * (rounding<Type>() + double(c.H + c.I) * rounding<acc_t<Type>>());
}

template <class Type> void check_forward(const Experts& c, const Workers& workers) {
  const Arguments<Type> arguments(c);
  const auto want = c.forward();
  const auto y = run_experts<Type>(arguments.mlp, nullptr, workers);
  expect_close(("fused_experts " + c.name()).c_str(), y.data(), want, forward_bound<Type>(c, want));
}

/// Both weights into panels, and the same result from them.
template <class Type> void check_packed(const Experts& c, const Workers& workers) {
  Arguments<Type> arguments(c);
  ExpertMlp& mlp = arguments.mlp;
  const int64_t panels13 = (c.I + kPanel - 1) / kPanel, panels2 = (c.H + kPanel - 1) / kPanel, parts = c.gated ? 2 : 1;
  const int64_t size13 = c.H * kPanel, size2 = c.I * kPanel;
  auto packed13 = unwritten<Type>(c.E * panels13 * parts * size13), packed2 = unwritten<Type>(c.E * panels2 * size2);
  for (int64_t part = 0; part < parts; ++part) {
    Weight half = mlp.w13;
    half.data = arguments.w13.data() + part * c.I * c.H;
    cpu::pack_experts({.E = c.E,
                       .N = c.I,
                       .K = c.H,
                       .dtype = mlp.dtype,
                       .packed_dtype = mlp.dtype,
                       .w = half,
                       .packed = packed13.data() + part * size13,
                       .packed_expert_stride = panels13 * parts * size13,
                       .packed_panel_stride = parts * size13},
                      workers);
  }
  cpu::pack_experts({.E = c.E,
                     .N = c.H,
                     .K = c.I,
                     .dtype = mlp.dtype,
                     .packed_dtype = mlp.dtype,
                     .w = mlp.w2,
                     .packed = packed2.data(),
                     .packed_expert_stride = panels2 * size2,
                     .packed_panel_stride = size2},
                    workers);
  mlp.w13 = {packed13.data(), panels13 * parts * size13, 1, kPanel, size13, true};
  mlp.w2 = {packed2.data(), panels2 * size2, 1, kPanel, size2, true};
  const auto want = c.forward();
  const auto y = run_experts<Type>(mlp, nullptr, workers);
  expect_close(("packed fused_experts " + c.name()).c_str(), y.data(), want, forward_bound<Type>(c, want));
}

/// Each gradient along one random direction, against differences of the definition.
inline void check_backward(const Experts& c, bool keep_hidden, const Workers& workers) {
  const Arguments<double> arguments(c);
  const ExpertMlp& mlp = arguments.mlp;
  const auto grad_y = random<double>(c.T * c.H, 17);
  auto hidden = unwritten<double>(c.T * c.K * c.rows13());
  run_experts<double>(mlp, keep_hidden ? hidden.data() : nullptr, workers);
  auto x = unwritten<double>(c.x.size()), w13 = unwritten<double>(c.w13.size()), w2 = unwritten<double>(c.w2.size()),
       weights = std::vector<double>(c.weights.size()), w13_bias = unwritten<double>(c.w13_bias.size()),
       w2_bias = unwritten<double>(c.w2_bias.size());
  FusedExpertsBackwardArgs args{.mlp = mlp,
                                .grad_y = grad_y.data(),
                                .grad_y_stride = c.H,
                                .hidden = keep_hidden ? hidden.data() : nullptr,
                                .grad_x = x.data(),
                                .grad_w13 = w13.data(),
                                .grad_w2 = w2.data(),
                                .grad_topk_weights = weights.data(),
                                .grad_w13_bias = w13_bias.data(),
                                .grad_w2_bias = w2_bias.data(),
                                .w13_out = mlp.w13,
                                .w2_out = mlp.w2};
  args.w13_out.data = w13.data(), args.w2_out.data = w2.data();
  const Scratch scratch(cpu::fused_experts_backward_workspace_bytes(args, workers));
  args.workspace = scratch.get();
  cpu::fused_experts_backward(args, workers);

  const auto compare = [&](const char* name, std::vector<double> Experts::* input, const std::vector<double>& grad) {
    const auto step = random<double>(grad.size(), 18);
    const auto value = [&](double h) {
      Experts moved = c;
      for (size_t i = 0; i < step.size(); ++i) (moved.*input)[i] += h * step[i];
      const auto y = moved.forward();
      return std::inner_product(y.begin(), y.end(), grad_y.begin(), 0.0);
    };
    const double h = 1e-5, want = (value(h) - value(-h)) / (2 * h),
                 got = std::inner_product(grad.begin(), grad.end(), step.begin(), 0.0);
    const std::string what = "fused_experts_backward " + c.name() + (keep_hidden ? " hidden" : "") + " " + name;
    expect_close(what.c_str(), &got, {want}, 1e-6 * (1 + std::abs(want)));
  };
  compare("x", &Experts::x, x);
  compare("w13", &Experts::w13, w13);
  compare("w2", &Experts::w2, w2);
  compare("topk_weights", &Experts::weights, weights);
  compare("w13_bias", &Experts::w13_bias, w13_bias);
  compare("w2_bias", &Experts::w2_bias, w2_bias);
}

inline void check_experts(const Workers& workers) {
  for (const int64_t T : {0, 1, 11, 150})
    for (const bool gated : {true, false})
      for (const bool weight_on_input : {false, true})
        for (const bool interleaved : {false, true}) {
          if (interleaved && !gated) continue;
          check_forward<double>(make_experts<double>(T, gated, interleaved, weight_on_input), workers);
          check_forward<float>(make_experts<float>(T, gated, interleaved, weight_on_input), workers);
          check_forward<bf16>(make_experts<bf16>(T, gated, interleaved, weight_on_input), workers);
          check_forward<f16>(make_experts<f16>(T, gated, interleaved, weight_on_input), workers);
          if (!interleaved) check_packed<float>(make_experts<float>(T, gated, false, weight_on_input), workers);
          if (!interleaved) check_packed<bf16>(make_experts<bf16>(T, gated, false, weight_on_input), workers);
          const Experts wide = make_experts<double>(T, gated, interleaved, weight_on_input);
          for (const bool keep_hidden : {true, false}) check_backward(wide, keep_hidden, workers);
        }
}

}  // namespace checks

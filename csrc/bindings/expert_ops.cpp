// SPDX-License-Identifier: Apache-2.0
// The expert MLP as ops: fused_experts with its backward, and on CPUs its packed form for inference. Compiled once a
// backend, as ops.cpp.
#include "backend.h"

namespace moe::binding {
namespace {

/// What all expert ops share. Holds the tensors that the struct points to.
struct Mlp {
  Tensor x, weights, ids, row_to_slot, slot_to_row, expert_offsets;
  MaybeTensor w13_bias, w2_bias, hidden_mask;
  ExpertMlp args{};

  Mlp(const char* op, const Tensor& x_, int64_t E, int64_t I, DType weight_dtype, const Tensor& topk_weights,
      const Tensor& topk_ids, const MaybeTensor& w13_bias_, const MaybeTensor& w2_bias_, const MaybeTensor& expert_map,
      const MaybeTensor& hidden_mask_, int64_t activation, bool gated, bool weight_on_input, double limit, double alpha,
      bool allow_tf32 = false)
      : x(with_contiguous_rows(x_)) {
    const DType dtype = dtype_of(op, "x", x);
    const ScalarType acc = acc_of(dtype);
    require(acc == acc_of(weight_dtype), op, ": x and the weights must both be float64, or neither");
    require(!kOnDevice || dtype == weight_dtype, op, ": x and the weights must have one dtype on a GPU");
    require(x.dim() == 2 && topk_ids.dim() == 2, op, ": x must be [T, H] and topk_ids [T, K]");
    require(activation >= 0 && activation <= 5, op, ": no activation ", activation);
    const int64_t T = x.size(0), H = x.size(1), K = topk_ids.size(1), S = T * K;
    want(op, "topk_ids", topk_ids, {T, K});
    want(op, "topk_weights", topk_weights, {T, K});
    if (w13_bias_) want(op, "w13_bias", *w13_bias_, {E, gated ? 2 * I : I});
    if (w2_bias_) want(op, "w2_bias", *w2_bias_, {E, H});
    if (hidden_mask_) want(op, "hidden_mask", *hidden_mask_, {T, K, I});
    weights = to_type(topk_weights, acc), hidden_mask = to_type(hidden_mask_, acc);
    w13_bias = to_type(w13_bias_, scalar_of(weight_dtype)), w2_bias = to_type(w2_bias_, scalar_of(weight_dtype));
    ids = narrow_ids([](const Tensor& like, const NarrowIdsArgs& a) { run(like, a); }, op, topk_ids, E, expert_map);
    row_to_slot = empty(x, {S}, ScalarType::Int), expert_offsets = empty(x, {E + 1}, ScalarType::Int);
    if (kOnDevice) slot_to_row = empty(x, {S}, ScalarType::Int);
    int32_t* const to_row = kOnDevice ? slot_to_row.mutable_data_ptr<int32_t>() : nullptr;
    PermuteIndexArgs index{S,
                           E,
                           S,
                           1,
                           ids.const_data_ptr<int32_t>(),
                           expert_offsets.mutable_data_ptr<int32_t>(),
                           row_to_slot.mutable_data_ptr<int32_t>(),
                           to_row,
                           nullptr};
    run(x, index);
    args.T = T, args.H = H, args.I = I, args.E = E, args.K = K, args.dtype = dtype, args.weight_dtype = weight_dtype;
    args.activation = Activation(activation), args.gated = gated, args.weight_on_input = weight_on_input;
    args.limit = limit, args.alpha = alpha, args.allow_tf32 = allow_tf32, args.x = x.const_data_ptr(),
    args.x_stride = T ? x.stride(0) : H;
    args.w13_bias = data_of(w13_bias), args.w2_bias = data_of(w2_bias), args.topk_weights = weights.const_data_ptr();
    args.hidden_mask = data_of(hidden_mask), args.row_to_slot = row_to_slot.const_data_ptr<int32_t>();
    args.slot_to_row = to_row, args.expert_offsets = expert_offsets.const_data_ptr<int32_t>();
  }

  void set_weights(const char* op, const Tensor& w13, const Tensor& w2, bool interleaved, bool transposed) {
    const int64_t rows = args.gated ? 2 * args.I : args.I;
    if (transposed) want(op, "w13", w13, {args.E, args.H, rows}), want(op, "w2", w2, {args.E, args.I, args.H});
    else want(op, "w13", w13, {args.E, rows, args.H}), want(op, "w2", w2, {args.E, args.H, args.I});
    require(w2.scalar_type() == w13.scalar_type(), op, ": w13 and w2 must have one dtype");
    require(args.gated || !interleaved, op, ": interleaved needs gated weights");
    args.interleaved = interleaved, args.w13 = weight_of(w13, transposed), args.w2 = weight_of(w2, transposed);
  }
};

std::tuple<Tensor, Tensor> fused_experts(const Tensor& x, const Tensor& w13, const Tensor& w2,
                                         const Tensor& topk_weights, const Tensor& topk_ids,
                                         const MaybeTensor& w13_bias, const MaybeTensor& w2_bias,
                                         const MaybeTensor& expert_map, const MaybeTensor& hidden_mask,
                                         int64_t activation, bool gated, bool interleaved, bool transposed,
                                         bool weight_on_input, double limit, double alpha, bool allow_tf32,
                                         const MaybeTensor& /*w13_main_grad*/, const MaybeTensor& /*w2_main_grad*/,
                                         bool save_hidden) {  // main gradients: for the backward
  require(w13.dim() == 3 && w2.dim() == 3, "fused_experts: w13 and w2 must be 3-D");
  Mlp mlp("fused_experts", x, w13.size(0), w2.size(transposed ? 1 : 2), dtype_of("fused_experts", "w13", w13),
          topk_weights, topk_ids, w13_bias, w2_bias, expert_map, hidden_mask, activation, gated, weight_on_input, limit,
          alpha, allow_tf32);
  mlp.set_weights("fused_experts", w13, w2, interleaved, transposed);
  const ExpertMlp& p = mlp.args;
  Tensor y = empty(mlp.x, {p.T, p.H}, x.scalar_type());
  Tensor hidden = save_hidden ? empty(mlp.x, {p.T * p.K, gated ? 2 * p.I : p.I}, x.scalar_type())
                              : empty(mlp.x, {0}, x.scalar_type());
  FusedExpertsArgs args{p, save_hidden ? hidden.mutable_data_ptr() : nullptr, y.mutable_data_ptr(), nullptr};
  run(mlp.x, args);
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_experts_backward(
    const Tensor& grad_y_, const Tensor& hidden, const Tensor& x, const Tensor& w13, const Tensor& w2,
    const Tensor& topk_weights, const Tensor& topk_ids, const MaybeTensor& w13_bias, const MaybeTensor& w2_bias,
    const MaybeTensor& expert_map, const MaybeTensor& hidden_mask, int64_t activation, bool gated, bool interleaved,
    bool transposed, bool weight_on_input, double limit, double alpha, bool allow_tf32,
    const MaybeTensor& w13_main_grad, const MaybeTensor& w2_main_grad, int64_t needs) {
  constexpr const char* op = "fused_experts_backward";
  require(w13.dim() == 3 && w2.dim() == 3, op, ": w13 and w2 must be 3-D");
  Mlp mlp(op, x, w13.size(0), w2.size(transposed ? 1 : 2), dtype_of(op, "w13", w13), topk_weights, topk_ids, w13_bias,
          w2_bias, expert_map, hidden_mask, activation, gated, weight_on_input, limit, alpha, allow_tf32);
  mlp.set_weights(op, w13, w2, interleaved, transposed);
  const ExpertMlp& p = mlp.args;
  const int64_t rows = gated ? 2 * p.I : p.I;
  const Tensor grad_y = with_contiguous_rows(to_type(grad_y_, x.scalar_type()));
  want(op, "grad_y", grad_y, {p.T, p.H});
  if (hidden.numel() > 0) want(op, "hidden", hidden, {p.T * p.K, rows});
  const Tensor saved = dense(hidden);
  const auto result = [&](int bit, std::vector<int64_t> sizes, ScalarType type) {
    return empty(mlp.x, needs >> bit & 1 ? sizes : std::vector<int64_t>{0}, type);
  };
  const auto sizes_of = [](const Tensor& t) { return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()); };
  const ScalarType weight_type = w13.scalar_type();
  const auto of_weight = [&](int bit, const Tensor& w, const MaybeTensor& main, const char* name) {
    if (!main) return result(bit, sizes_of(w), weight_type);
    want(op, name, *main, sizes_of(w));
    require(main->scalar_type() == acc_of(p.weight_dtype) && main->is_contiguous(), op, ": ", name,
            " must be contiguous and of the dtype of the sums");
    return *main;
  };
  Tensor grad_x = result(0, {p.T, p.H}, x.scalar_type());
  Tensor grad_w13 = of_weight(1, w13, w13_main_grad, "w13_main_grad");
  Tensor grad_w2 = of_weight(2, w2, w2_main_grad, "w2_main_grad");
  Tensor grad_weights = result(3, {p.T, p.K}, acc_of(p.dtype));
  Tensor grad_b13 = result(4, {p.E, rows}, weight_type), grad_b2 = result(5, {p.E, p.H}, weight_type);
  if (!kOnDevice) {
    ask_for_huge_pages(grad_w13, grad_w13.numel() * int64_t(grad_w13.element_size()));
    ask_for_huge_pages(grad_w2, grad_w2.numel() * int64_t(grad_w2.element_size()));
  }
  const auto out = [&](int bit, Tensor& t) { return needs >> bit & 1 ? t.mutable_data_ptr() : nullptr; };
  if (needs >> 3 & 1) torch::stable::zero_(grad_weights);  // of absent slots
  FusedExpertsBackwardArgs args{p,
                                grad_y.const_data_ptr(),
                                p.T ? grad_y.stride(0) : p.H,
                                saved.numel() ? saved.const_data_ptr() : nullptr,
                                out(0, grad_x),
                                out(1, grad_w13),
                                out(2, grad_w2),
                                out(3, grad_weights),
                                out(4, grad_b13),
                                out(5, grad_b2),
                                {},
                                {},
                                w13_main_grad.has_value(),
                                w2_main_grad.has_value(),
                                nullptr};
  if (needs >> 1 & 1) args.w13_out = weight_of(grad_w13, transposed);
  if (needs >> 2 & 1) args.w2_out = weight_of(grad_w2, transposed);
  run(mlp.x, args);
  if (w13_main_grad) grad_w13 = empty(mlp.x, {0}, weight_type);  // added to the main gradient, not returned
  if (w2_main_grad) grad_w2 = empty(mlp.x, {0}, weight_type);
  return {grad_x, grad_w13, grad_w2, to_type(grad_weights, topk_weights.scalar_type()), grad_b13, grad_b2};
}

#if defined(MOE_SIMT) || defined(MOE_CUDA_OPS)
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MOE_LIBRARY, MOE_KEY, m) {
  m.impl("fused_experts", boxed<&fused_experts>);
  m.impl("fused_experts_backward", boxed<&fused_experts_backward>);
}
#else

/// One of the two packed tensors: parts matrices (gate and up, or one) of N rows an expert, first at rows 0, 1 or I of
/// w.
Tensor pack(const Tensor& w, bool transposed, int64_t parts, bool interleaved, DType dtype) {
  const Weight whole = weight_of(w, transposed);
  const int64_t E = w.size(0), N = w.size(transposed ? 2 : 1) / parts, K = w.size(transposed ? 1 : 2);
  const int64_t panels = (N + kPanel - 1) / kPanel, size = K * kPanel;
  Tensor packed = empty(w, {E, panels, parts, K, kPanel}, scalar_of(dtype));
  ask_for_huge_pages(packed, packed.numel() * dtype_bytes(dtype));
  for (int64_t part = 0; part < parts; ++part) {
    Weight one = whole;
    const int64_t first = interleaved ? part : part * N;
    one.data =
        static_cast<const char*>(one.data) + first * whole.row_stride * dtype_bytes(dtype_of("pack_experts", "w", w));
    if (interleaved) one.row_stride *= parts;
    cpu::pack_experts({E, N, K, dtype_of("pack_experts", "w", w), dtype, one,
                       static_cast<char*>(packed.mutable_data_ptr()) + part * size * dtype_bytes(dtype),
                       panels * parts * size, parts * size},
                      torch_workers());
  }
  return packed;
}
std::tuple<Tensor, Tensor> pack_experts(const Tensor& w13, const Tensor& w2, bool gated, bool interleaved,
                                        bool transposed, int64_t dtype) {
  require(w13.dim() == 3 && w2.dim() == 3 && dtype >= 0 && dtype <= 3, "pack_experts: w13 and w2 must be 3-D");
  Tensor second = pack(w2, transposed, 1, false, DType(dtype));
  return {pack(w13, transposed, gated ? 2 : 1, interleaved, DType(dtype)),
          torch::stable::view(second, {second.size(0), second.size(1), second.size(3), second.size(4)})};
}

Tensor fused_experts_packed(const Tensor& x, const Tensor& packed13, const Tensor& packed2, int64_t I,
                            const Tensor& topk_weights, const Tensor& topk_ids, const MaybeTensor& w13_bias,
                            const MaybeTensor& w2_bias, const MaybeTensor& expert_map, const MaybeTensor& hidden_mask,
                            int64_t activation, bool gated, bool weight_on_input, double limit, double alpha,
                            const MaybeTensor& w13, const MaybeTensor& w2) {
  constexpr const char* op = "fused_experts_packed";
  require(packed13.dim() == 5 && packed2.dim() == 4 && packed13.is_contiguous() && packed2.is_contiguous(), op,
          ": the weights must come from pack_experts");
  const int64_t E = packed13.size(0), W = kPanel;
  Mlp mlp(op, x, E, I, dtype_of(op, "packed13", packed13), topk_weights, topk_ids, w13_bias, w2_bias, expert_map,
          hidden_mask, activation, gated, weight_on_input, limit, alpha);
  ExpertMlp& p = mlp.args;
  want(op, "packed13", packed13, {E, (I + W - 1) / W, gated ? 2 : 1, p.H, W});
  want(op, "packed2", packed2, {E, (p.H + W - 1) / W, I, W});
  require(packed2.scalar_type() == packed13.scalar_type(), op, ": packed13 and packed2 must have one dtype");
  require(w13.has_value() == w2.has_value(), op, ": w13 and w2 must be given both or neither");
  if (w13) {
    require(w13->scalar_type() == packed13.scalar_type(), op, ": w13 and packed13 must have one dtype");
    mlp.set_weights(op, *w13, *w2, false, false);
    p.plain13 = p.w13, p.plain2 = p.w2;
  }
  p.w13 = {packed13.const_data_ptr(), packed13.stride(0), 1, W, p.H * W, true};
  p.w2 = {packed2.const_data_ptr(), packed2.stride(0), 1, W, I * W, true};
  Tensor y = empty(mlp.x, {p.T, p.H}, x.scalar_type());
  FusedExpertsArgs args{p, nullptr, y.mutable_data_ptr(), nullptr};
  run(mlp.x, args);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("fused_experts", boxed<&fused_experts>);
  m.impl("fused_experts_backward", boxed<&fused_experts_backward>);
  m.impl("pack_experts", boxed<&pack_experts>);
  m.impl("fused_experts_packed", boxed<&fused_experts_packed>);
}
#endif

}  // namespace moe::binding

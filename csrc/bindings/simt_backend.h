// SPDX-License-Identifier: Apache-2.0
// The CUDA stages on CPU tensors, by the emulator. Every buffer of a call is registered with its exact extent, so that
// an access beside it is a fault; what a kernel has to write counts as never written. For ops.cpp,
// gemm_ops.cpp and expert_ops.cpp under MOE_SIMT.
#pragma once
#include <deque>

#include "queue.h"

#define MOE_LIBRARY moe_kernels_simt
#define MOE_KEY CPU

namespace moe::binding {
namespace {

class Buffers {
 public:
  void in(const char* name, const void* p, int64_t bytes) { add(name, p, bytes, true); }
  void out(const char* name, const void* p, int64_t bytes) { add(name, p, bytes, false); }

 private:
  void add(const char* name, const void* p, int64_t bytes, bool written) {
    if (p && bytes > 0) buffers_.emplace_back(p, size_t(bytes), name, written);
  }
  std::deque<simt::Registered> buffers_;
};

inline int64_t extent(int64_t rows, int64_t columns, int64_t stride, int64_t bytes) {  // of a matrix with strided rows
  return rows > 0 ? ((rows - 1) * stride + columns) * bytes : 0;
}
inline int64_t acc_bytes(DType t) { return t == DType::f64 ? 8 : 4; }

inline void declare(Buffers& buffers, const Tensor&, const RouteArgs& a) {
  const int64_t acc = acc_bytes(a.dtype);
  buffers.in("logits", a.logits, extent(a.T, a.E, a.logits_stride, dtype_bytes(a.dtype)));
  buffers.in("correction_bias", a.correction_bias, a.E * acc), buffers.in("padding_mask", a.padding_mask, a.T);
  buffers.out("topk_weights", a.topk_weights, a.T * a.K * acc), buffers.out("topk_ids", a.topk_ids, a.T * a.K * 4);
  buffers.out("tokens_per_expert", a.tokens_per_expert, a.E * 4), buffers.out("lse", a.lse, a.T * acc);
  buffers.out("score_sums", a.score_sums, a.B * a.E * acc), buffers.out("workspace", a.workspace, device_bytes(a));
}
inline void declare(Buffers& buffers, const Tensor&, const RouteBackwardArgs& a) {
  const int64_t acc = acc_bytes(a.dtype), S = a.T * a.K;
  buffers.in("grad_weights", a.grad_weights, S * acc), buffers.in("grad_lse", a.grad_lse, a.T * acc);
  buffers.in("logits", a.logits, extent(a.T, a.E, a.logits_stride, dtype_bytes(a.dtype)));
  buffers.in("topk_ids", a.topk_ids, S * 4), buffers.in("topk_weights", a.topk_weights, S * acc);
  buffers.in("grad_score_sums", a.grad_score_sums, a.B * a.E * acc);
  buffers.out("grad_logits", a.grad_logits, a.T * a.E * dtype_bytes(a.dtype));
}
inline void declare(Buffers& buffers, const Tensor&, const ExpertCutsArgs& a) {
  const int64_t acc = acc_bytes(a.dtype), cuts = a.T / a.n * a.E;
  buffers.in("logits", a.logits, extent(a.T, a.E, a.logits_stride, dtype_bytes(a.dtype)));
  buffers.in("padding_mask", a.padding_mask, a.T), buffers.out("scores", a.scores, a.T * a.E * acc);
  buffers.out("least", a.least, cuts * acc), buffers.out("last", a.last, cuts * 4);
  buffers.out("experts_per_token", a.experts_per_token, a.T * 4);
  buffers.out("tokens_per_expert", a.tokens_per_expert, a.E * 4);
}
inline void declare(Buffers& buffers, const Tensor&, const ExpertChoiceArgs& a) {
  const int64_t acc = acc_bytes(a.dtype), cuts = a.T / a.n * a.E;
  buffers.in("scores", a.scores, a.T * a.E * acc), buffers.in("least", a.least, cuts * acc);
  buffers.in("last", a.last, cuts * 4), buffers.out("topk_weights", a.topk_weights, a.T * a.K * acc);
  buffers.out("topk_ids", a.topk_ids, a.T * a.K * 4);
}
inline void declare(Buffers& buffers, const Tensor&, const SinkhornArgs& a) {
  const int64_t acc = acc_bytes(a.dtype);
  buffers.in("logits", a.logits, extent(a.T, a.E, a.logits_stride, dtype_bytes(a.dtype)));
  buffers.in("padding_mask", a.padding_mask, a.T), buffers.out("plan", a.plan, a.T * a.E * acc);
  buffers.out("iterations", a.iterations, 4), buffers.out("topk_weights", a.topk_weights, a.T * a.K * acc);
  buffers.out("topk_ids", a.topk_ids, a.T * a.K * 4);
  buffers.out("tokens_per_expert", a.tokens_per_expert, a.E * 4),
      buffers.out("workspace", a.workspace, device_bytes(a));
}
inline void declare(Buffers& buffers, const Tensor&, const SumScoresArgs& a) {
  buffers.in("logits", a.logits, extent(a.T, a.E, a.logits_stride, dtype_bytes(a.dtype)));
  buffers.in("padding_mask", a.padding_mask, a.T), buffers.out("sums", a.sums, a.B * a.E * acc_bytes(a.dtype));
  buffers.out("workspace", a.workspace, device_bytes(a));
}
inline void declare(Buffers& buffers, const Tensor&, const SumScoresBackwardArgs& a) {
  buffers.in("grad_sums", a.grad_sums, a.B * a.E * acc_bytes(a.dtype));
  buffers.in("logits", a.logits, extent(a.T, a.E, a.logits_stride, dtype_bytes(a.dtype)));
  buffers.in("padding_mask", a.padding_mask, a.T);
  buffers.out("grad_logits", a.grad_logits, a.T * a.E * dtype_bytes(a.dtype));
}
inline void declare(Buffers& buffers, const Tensor&, const LimitCapacityArgs& a) {
  buffers.in("topk_ids", a.topk_ids, a.T * a.K * 4), buffers.out("dropped", a.dropped, a.T * a.K);
  buffers.out("workspace", a.workspace, device_bytes(a));
}
inline void declare(Buffers& buffers, const Tensor&, const NarrowIdsArgs& a) {
  buffers.in("topk_ids", a.topk_ids, a.S * (a.ids64 ? 8 : 4));
  buffers.in("expert_map", a.expert_map, a.map_size * (a.map64 ? 8 : 4)), buffers.out("narrow", a.narrow, a.S * 4);
}
inline void declare(Buffers& buffers, const Tensor&, const PermuteIndexArgs& a) {
  buffers.in("topk_ids", a.topk_ids, a.S * 4), buffers.out("expert_offsets", a.expert_offsets, (a.E + 1) * 4);
  buffers.out("row_to_slot", a.row_to_slot, a.P * 4), buffers.out("slot_to_row", a.slot_to_row, a.S * 4);
  buffers.out("workspace", a.workspace, device_bytes(a));
}
inline void declare(Buffers& buffers, const Tensor& x, const PermuteArgs& a) {
  const int64_t bytes = dtype_bytes(a.dtype);
  buffers.in("x", a.x, extent(x.size(0), a.H, a.x_stride, bytes));
  buffers.in("row_to_slot", a.row_to_slot, a.P * 4), buffers.out("x_rows", a.x_rows, a.P * a.H * bytes);
}
inline void declare(Buffers& buffers, const Tensor&, const UnpermuteArgs& a) {
  const int64_t bytes = dtype_bytes(a.dtype), S = a.T * a.K;
  buffers.in("rows", a.rows, extent(a.P, a.H, a.rows_stride, bytes));
  buffers.in("slot_to_row", a.slot_to_row, S * 4), buffers.in("topk_weights", a.topk_weights, S * acc_bytes(a.dtype));
  buffers.out("y", a.y, a.T * a.H * bytes);
}
inline void declare(Buffers& buffers, const Tensor&, const UnpermuteBackwardArgs& a) {
  const int64_t bytes = dtype_bytes(a.dtype), S = a.T * a.K, acc = acc_bytes(a.dtype);
  buffers.in("grad_y", a.grad_y, extent(a.T, a.H, a.grad_y_stride, bytes));
  buffers.in("rows", a.rows, extent(a.P, a.H, a.rows_stride, bytes)), buffers.in("slot_to_row", a.slot_to_row, S * 4);
  buffers.in("topk_weights", a.topk_weights, S * acc), buffers.out("grad_rows", a.grad_rows, a.P * a.H * bytes);
  buffers.out("grad_weights", a.grad_weights, S * acc), buffers.out("workspace", a.workspace, device_bytes(a));
}

inline int64_t extent(const Weight& w, int64_t E, int64_t n, int64_t k, int64_t bytes) {
  return ((E - 1) * w.expert_stride + (n - 1) * w.row_stride + (k - 1) * w.col_stride + 1) * bytes;
}
inline void declare(Buffers& buffers, const Tensor&, const GroupedGemmArgs& a) {
  const int64_t bytes = dtype_bytes(a.dtype), groups = a.grouped == Grouped::none ? a.G : 1;
  const int64_t outputs = a.grouped == Grouped::rows ? 1 : a.G, out = outputs * a.M * a.N * dtype_bytes(a.out_dtype);
  if (a.M * a.K > 0)
    buffers.in("a", a.a, ((groups - 1) * a.a_group + (a.M - 1) * a.a_row + (a.K - 1) * a.a_col + 1) * bytes);
  const int64_t weights = a.grouped == Grouped::contraction ? 1 : a.G;
  if (weights * a.N * a.K > 0) buffers.in("b", a.b.data, extent(a.b, weights, a.N, a.K, bytes));
  buffers.in("offs", a.offs, a.G * 4), buffers.in("bias", a.bias, a.G * a.N * bytes);
  const bool added = a.accumulate || (a.bias && a.grouped == Grouped::contraction);  // to what is there
  buffers.out("workspace", a.workspace, device_bytes(a));
  if (added) buffers.in("out", a.out, out);
  else buffers.out("out", a.out, out);
}
inline void declare(Buffers& buffers, const ExpertMlp& p) {
  const int64_t bytes = dtype_bytes(p.dtype), of_weight = dtype_bytes(p.weight_dtype), acc = acc_bytes(p.dtype);
  const int64_t S = p.T * p.K, rows = p.gated ? 2 * p.I : p.I;
  buffers.in("x", p.x, extent(p.T, p.H, p.x_stride, bytes));
  buffers.in("w13", p.w13.data, extent(p.w13, p.E, rows, p.H, of_weight));
  buffers.in("w2", p.w2.data, extent(p.w2, p.E, p.H, p.I, of_weight));
  buffers.in("w13_bias", p.w13_bias, p.E * rows * of_weight), buffers.in("w2_bias", p.w2_bias, p.E * p.H * of_weight);
  buffers.in("topk_weights", p.topk_weights, S * acc), buffers.in("hidden_mask", p.hidden_mask, S * p.I * acc);
  buffers.in("row_to_slot", p.row_to_slot, S * 4), buffers.in("slot_to_row", p.slot_to_row, S * 4);
  buffers.in("expert_offsets", p.expert_offsets, (p.E + 1) * 4);
}
inline void declare(Buffers& buffers, const Tensor&, const FusedExpertsArgs& a) {
  const ExpertMlp& p = a.mlp;
  const int64_t bytes = dtype_bytes(p.dtype);
  declare(buffers, p);
  buffers.out("hidden", a.hidden, p.T * p.K * (p.gated ? 2 * p.I : p.I) * bytes);
  buffers.out("y", a.y, p.T * p.H * bytes), buffers.out("workspace", a.workspace, device_bytes(a));
}
inline void declare(Buffers& buffers, const Tensor&, const FusedExpertsBackwardArgs& a) {
  const ExpertMlp& p = a.mlp;
  const int64_t bytes = dtype_bytes(p.dtype), of_weight = dtype_bytes(p.weight_dtype), S = p.T * p.K;
  const int64_t acc = acc_bytes(p.dtype), rows = p.gated ? 2 * p.I : p.I;
  declare(buffers, p);
  buffers.in("grad_y", a.grad_y, extent(p.T, p.H, a.grad_y_stride, bytes));
  buffers.in("hidden", a.hidden, S * rows * bytes), buffers.out("grad_x", a.grad_x, p.T * p.H * bytes);
  const auto gradient = [&](const char* name, void* to, int64_t count, bool main) {
    if (main) buffers.in(name, to, count * acc);
    else buffers.out(name, to, count * of_weight);
  };
  gradient("grad_w13", a.grad_w13, p.E * rows * p.H, a.w13_main);
  gradient("grad_w2", a.grad_w2, p.E * p.H * p.I, a.w2_main);
  buffers.in("grad_topk_weights", a.grad_topk_weights, S * acc);  // zeroed by the binding
  buffers.out("grad_w13_bias", a.grad_w13_bias, p.E * rows * of_weight);
  buffers.out("grad_w2_bias", a.grad_w2_bias, p.E * p.H * of_weight);
  buffers.out("workspace", a.workspace, device_bytes(a));
}

template <class Args> void run(const Tensor& like, Args&& args) {
  const Tensor space = device_workspace(like, args);
  Buffers buffers;
  declare(buffers, like, args);
  queue(args, nullptr);
}

}  // namespace
}  // namespace moe::binding

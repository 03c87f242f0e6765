// SPDX-License-Identifier: Apache-2.0
// The expert MLP as a queue of launches; no wait, every size is a bound that the host knows.
//   forward    x W13^T with activation -> act W2^T -> combine (unpermute). Few slots: decode.
//   backward   grad_y W2 with the activation's backward -> grad_h W13 -> combine; two weight gradients; bias sums
// Kept for the backward: x and the first product. Recomputing runs the first product again.
#include "fused_experts.cuh"

#include <algorithm>

#include "decode.h"
#include "grouped_gemm.h"
#include "grouped_wgrad.h"
#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

int64_t rows13(const ExpertMlp& p) { return p.gated ? 2 * p.I : p.I; }
int64_t slots(const ExpertMlp& p) { return p.T * p.K; }
int64_t acc_bytes(DType t) { return t == DType::f64 ? 8 : 4; }
const int32_t* ends_of(const ExpertMlp& p) { return p.expert_offsets + 1; }

/// The weight contracted over its rows.
Weight turned(const Weight& w) { return {w.data, w.expert_stride, w.col_stride, w.row_stride, 0, false}; }

/// Cuts the workspace into arrays of 256-byte alignment; with a null workspace only counts.
class Space {
 public:
  explicit Space(void* at) : begin_(static_cast<char*>(at)) {}
  void* take(int64_t bytes) {
    void* p = begin_ ? begin_ + used_ : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return p;
  }
  int64_t bytes() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

// ---------------------------------------------------------------- products

/// The first product with its activation.
GroupedRows up_product(const ExpertMlp& p, void* hidden, void* act) {
  GroupedRows g{};
  g.E = p.E, g.S = slots(p), g.N = rows13(p), g.K = p.H, g.dtype = p.dtype, g.allow_tf32 = p.allow_tf32;
  g.a = p.x, g.a_stride = p.x_stride, g.gather = p.row_to_slot, g.per_token = p.K;
  g.b = p.w13, g.ends = ends_of(p);
  RowsEpilogue& e = g.epilogue;
  e.kind = Epilogue::activation, e.row_to_slot = p.row_to_slot, e.topk_weights = p.topk_weights, e.bias = p.w13_bias;
  e.activation = p.activation, e.gated = p.gated, e.interleaved = p.interleaved, e.weight_on_input = p.weight_on_input;
  e.limit = p.limit, e.alpha = p.alpha, e.hidden_mask = p.hidden_mask, e.hidden = hidden, e.act = act;
  return g;
}

/// rows [S, n] in row order -> out [S, N].
GroupedRows row_product(const ExpertMlp& p, const void* rows, int64_t K, const Weight& w, const void* bias, int64_t N,
                        void* out) {
  GroupedRows g{};
  g.E = p.E, g.S = slots(p), g.N = N, g.K = K, g.dtype = p.dtype, g.allow_tf32 = p.allow_tf32;
  g.a = rows, g.a_stride = K, g.b = w, g.ends = ends_of(p);
  g.epilogue.kind = Epilogue::plain, g.epilogue.bias = bias;
  g.epilogue.out = out, g.epilogue.out_stride = N, g.epilogue.out_dtype = p.dtype;
  return g;
}

/// y[t] = sum over the slots of t, ascending, of weight * rows. Null weights: all 1.
cudaError_t combine(const ExpertMlp& p, const void* rows, const void* weights, void* y, cudaStream_t stream) {
  return unpermute({p.T, p.H, p.K, slots(p), p.dtype, rows, p.H, p.slot_to_row, weights, y}, stream);
}

// ---------------------------------------------------------------- backward

/// Where a weight gradient goes.
struct WgradOut {
  const Weight& layout;
  void* data;  // null: nobody wants it
  bool main;   // of acc, added to
};
GroupedWgradArgs wgrad(const ExpertMlp& p, const WgradSide& n_side, int64_t N, const WgradSide& k_side, int64_t K,
                       const WgradOut& out) {
  GroupedWgradArgs w{};
  w.E = p.E, w.S = slots(p), w.N = N, w.K = K, w.dtype = w.out_dtype = p.dtype, w.allow_tf32 = p.allow_tf32;
  if (out.main) w.accumulate = true, w.out_dtype = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  w.n_side = n_side, w.k_side = k_side, w.ends = ends_of(p), w.out = out.data;
  w.out_expert = out.layout.expert_stride, w.out_row = out.layout.row_stride, w.out_col = out.layout.col_stride;
  w.parts = out.data ? grouped_wgrad_parts(w) : 1;
  return w;
}

/// What the backward keeps between its launches.
struct Buffers {
  void *hidden, *grad_hidden, *grad_biased, *act, *parts, *rows;
  GroupedRows down;  // grad_y W2 with the activation's backward
  int64_t parts_count;
  GroupedWgradArgs w13, w2;  // share the memory of their parts: one after the other

  Buffers(const FusedExpertsBackwardArgs& a, Space& space) {
    const ExpertMlp& p = a.mlp;
    const int64_t S = slots(p), size = dtype_bytes(p.dtype), wide = S * rows13(p) * size;
    hidden = a.hidden ? const_cast<void*>(a.hidden) : space.take(wide);
    grad_hidden = space.take(wide);
    grad_biased = p.weight_on_input && a.grad_w13_bias ? space.take(wide) : nullptr;
    act = a.grad_w2 || !a.hidden ? space.take(S * p.I * size) : nullptr;
    rows = a.grad_x ? space.take(S * p.H * size) : nullptr;
    down = up_product(p, hidden, nullptr);
    down.N = p.I, down.K = p.H, down.a = a.grad_y, down.a_stride = a.grad_y_stride, down.b = turned(p.w2);
    RowsEpilogue& e = down.epilogue;
    e.kind = Epilogue::activation_backward, e.grad_hidden = grad_hidden, e.grad_biased = grad_biased;
    e.weighted_act = a.grad_w2 ? act : nullptr;
    parts_count = a.grad_topk_weights ? weight_part_count(down) : 0;
    parts = a.grad_topk_weights ? space.take(parts_count * S * acc_bytes(p.dtype)) : nullptr;
    e.weight_parts = parts;
    const WgradSide by_row{grad_hidden, rows13(p), 1, nullptr, 0}, by_unit{act, p.I, 1, nullptr, 0};
    const WgradSide x{p.x, p.x_stride, 1, p.row_to_slot, p.K};
    const WgradSide grad_y{a.grad_y, a.grad_y_stride, 1, p.row_to_slot, p.K};
    w13 = wgrad(p, by_row, rows13(p), x, p.H, {a.w13_out, a.grad_w13, a.w13_main});
    w2 = wgrad(p, grad_y, p.H, by_unit, p.I, {a.w2_out, a.grad_w2, a.w2_main});
    w13.partial = w2.partial = space.take(std::max(grouped_wgrad_partial_bytes(w13), grouped_wgrad_partial_bytes(w2)));
  }
};

/// The backward of one call: launches until one fails.
class Backward {
 public:
  Backward(const FusedExpertsBackwardArgs& args, cudaStream_t stream)
      : a_(args), p_(args.mlp), stream_(stream), space_(args.workspace), b_(args, space_) {}

  cudaError_t run() {
    const bool first = a_.grad_x || a_.grad_w13 || a_.grad_w2 || a_.grad_topk_weights || a_.grad_w13_bias;
    if (first && !a_.hidden) then([&] { return grouped_rows(up_product(p_, b_.hidden, b_.act), stream_); });
    if (first) then([&] { return grouped_rows(b_.down, stream_); });
    if (a_.grad_topk_weights) then([&] { return weights(); });
    if (a_.grad_x) {
      then([&] {
        const Weight w = turned(p_.w13);
        return grouped_rows(row_product(p_, b_.grad_hidden, rows13(p_), w, nullptr, p_.H, b_.rows), stream_);
      });
      then([&] { return combine(p_, b_.rows, nullptr, a_.grad_x, stream_); });
    }
    if (a_.grad_w13) then([&] { return grouped_wgrad(b_.w13, stream_); });
    if (a_.grad_w2) then([&] { return grouped_wgrad(b_.w2, stream_); });
    if (a_.grad_w13_bias) then([&] { return w13_bias(); });
    if (a_.grad_w2_bias) then([&] { return w2_bias(); });
    return error_;
  }

 private:
  template <class F> void then(F&& launch_next) {
    if (error_ == cudaSuccess) error_ = launch_next();
  }

  cudaError_t weights() {
    const WeightGradient w{p_.E,
                           slots(p_),
                           p_.H,
                           p_.K,
                           b_.parts_count,
                           b_.parts,
                           p_.row_to_slot,
                           p_.expert_offsets,
                           a_.grad_y,
                           a_.grad_y_stride,
                           p_.weight_on_input ? nullptr : p_.w2_bias,
                           a_.grad_topk_weights};
    cudaError_t result = cudaSuccess;
    visit_dtype(p_.dtype, [&](auto tag) {
      const dim3 grid(unsigned((w.S + 7) / 8));
      result = launch<weight_gradient_kernel<decltype(tag)>>({grid, dim3(8 * kWarp)}, stream_, w);
    });
    return result;
  }

  cudaError_t w13_bias() {
    const void* rows = b_.grad_biased ? b_.grad_biased : b_.grad_hidden;
    return sums({p_.E, rows13(p_), rows13(p_), p_.K, rows, nullptr, nullptr, p_.expert_offsets, a_.grad_w13_bias});
  }
  cudaError_t w2_bias() {
    const void* weights = p_.weight_on_input ? nullptr : p_.topk_weights;
    return sums(
        {p_.E, p_.H, a_.grad_y_stride, p_.K, a_.grad_y, p_.row_to_slot, weights, p_.expert_offsets, a_.grad_w2_bias});
  }
  cudaError_t sums(const ExpertSums& s) {
    cudaError_t result = cudaSuccess;
    visit_dtype(p_.dtype, [&](auto tag) {
      using T = decltype(tag);
      const dim3 grid(unsigned((s.N + kWarp - 1) / kWarp), unsigned(s.E < 65535 ? s.E : 65535));
      const uint32_t bytes = kSumLanes * kWarp * uint32_t(sizeof(acc_t<T>));
      result = launch<expert_sums_kernel<T>>({grid, dim3(kSumLanes * kWarp), bytes}, stream_, s);
    });
    return result;
  }

  const FusedExpertsBackwardArgs& a_;
  const ExpertMlp& p_;
  cudaStream_t stream_;
  Space space_;
  Buffers b_;
  cudaError_t error_ = cudaSuccess;
};

/// A few tokens whose first product nobody wants to keep: time is what reading the weights takes.
bool decodes(const FusedExpertsArgs& args) {
  return !args.hidden && args.mlp.T <= kFewTokens && decode_takes(args.mlp);
}

/// act and rows of the forward.
int64_t act_bytes(const ExpertMlp& p) { return (slots(p) * p.I * dtype_bytes(p.dtype) + 255) / 256 * 256; }

}  // namespace

int64_t fused_experts_workspace_bytes(const FusedExpertsArgs& args) {
  if (decodes(args)) return decode_workspace_bytes(args.mlp);
  return act_bytes(args.mlp) + slots(args.mlp) * args.mlp.H * dtype_bytes(args.mlp.dtype);
}

cudaError_t fused_experts(const FusedExpertsArgs& args, cudaStream_t stream) {
  const ExpertMlp& p = args.mlp;
  if (decodes(args)) return decode({p, args.y, args.workspace}, stream);
  char *act = static_cast<char*>(args.workspace), *rows = act + act_bytes(p);
  cudaError_t error = grouped_rows(up_product(p, args.hidden, act), stream);
  if (error != cudaSuccess) return error;
  error = grouped_rows(row_product(p, act, p.I, p.w2, p.w2_bias, p.H, rows), stream);
  if (error != cudaSuccess) return error;
  return combine(p, rows, p.weight_on_input ? nullptr : p.topk_weights, args.y, stream);
}

int64_t fused_experts_backward_workspace_bytes(const FusedExpertsBackwardArgs& args) {
  Space space(nullptr);
  Buffers(args, space);
  return space.bytes();
}

cudaError_t fused_experts_backward(const FusedExpertsBackwardArgs& args, cudaStream_t stream) {
  return Backward(args, stream).run();
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// fused_experts_backward, from x, the first product and grad_y. With u = grad_y W2 and a = mask * act(h):
//   1. a task an (expert, 32 hidden units): u, then grad_h = weight * u * mask * act'(h), and the share of <u, a> in
//   the
//      gradient of the routing weight (which needs no slot output); 2. grad_x, the forward's combine on grad_h and W13;
//   3. grad W = left^T right over an expert's rows. Sums run over rows in ascending order; empty experts get exact
//   zeros.
#include <cstring>

#include "expert_mlp.h"

namespace moe::cpu {
namespace {

constexpr int64_t kWgradRows = 96;     // rows of a weight gradient a task owns
constexpr int64_t kWgradDepth = 1024;  // token rows packed at a time

template <class A> struct Buffers {
  int32_t* row_to_token;  // [S]
  A *x, *grad_y;          // [T, H] where they are not acc
  A* grad_h;              // [S, 2I | I] in the row order of w13, times s
  A* weighted_act;        // [S, I], a times the weight at the output
  A* weight_parts;        // [ceil(I/32), S] shares of the gradient of the routing weights
  A* right;               // [ceil(k/64), S, 64] the right side of a weight gradient, panel by panel
  A *panel, *c, *u, *y;   // a worker's packed panels, products, output columns
  int64_t panel_size, c_size = kRowBlock * kPair, u_size = kRowBlock * kPair, y_size;

  Buffers(const FusedExpertsBackwardArgs& args, int32_t workers, Workspace& space) {
    const ExpertMlp& p = args.mlp;
    const int64_t S = p.T * p.K, copy = is_acc<A>(p.dtype) ? 0 : p.T * p.H;
    const int64_t packed = (kWgradDepth + kPair) * kWgradRows;
    const int64_t widest = !args.grad_w13 && !args.grad_w2 ? 0 : std::max(p.H, rows13(p));
    panel_size = std::max({kPackedSize<A>, packed, p.H}), y_size = std::max(combine_size(p, workers), p.H);
    row_to_token = space.take<int32_t>(S);
    x = space.take<A>(copy), grad_y = space.take<A>(copy);
    grad_h = space.take<A>(S * rows13(p)), weighted_act = space.take<A>(args.grad_w2 ? S * p.I : 0);
    weight_parts = space.take<A>(args.grad_topk_weights ? ceil_div(p.I, kPanel) * S : 0);
    right = space.take<A>(ceil_div(widest, kPair) * kPair * S);
    panel = space.take<A>(workers * panel_size), c = space.take<A>(workers * c_size);
    u = space.take<A>(workers * u_size), y = space.take<A>(workers * y_size);
  }
};

template <class W> class Backward {
  using A = acc_t<W>;

 public:
  Backward(const FusedExpertsBackwardArgs& args, const Workers& workers)
      : args_(args),
        p_(args.mlp),
        workers_(workers),
        space_(args.workspace),
        buffers_(args, workers.count, space_),
        rows_{p_, buffers_.row_to_token},
        weights_(static_cast<const A*>(p_.topk_weights)) {}

  void run() {
    fill_row_to_token(p_, buffers_.row_to_token);
    x_ = rows_as_acc(p_.dtype, p_.x, p_.T, p_.H, p_.x_stride, buffers_.x, workers_);
    grad_y_ = rows_as_acc(p_.dtype, args_.grad_y, p_.T, p_.H, args_.grad_y_stride, buffers_.grad_y, workers_);
    const int64_t blocks = ceil_div(p_.I, kPair);
    if (args_.grad_x || args_.grad_w13 || args_.grad_w2 || args_.grad_topk_weights || args_.grad_w13_bias)
      for_tasks(workers_, p_.E * blocks,
                [&](int32_t worker, int64_t task) { hidden(worker, task / blocks, task % blocks * 2); });
    if (args_.grad_topk_weights || args_.grad_w2_bias)
      for_tasks(workers_, p_.E, [&](int32_t worker, int64_t e) { weights_and_bias(worker, e); });
    if (args_.grad_x) {
      const int64_t k = rows13(p_), columns = combine_panels(p_, workers_.count) * kPair;
      const Combine<W> combine{rows_, {buffers_.grad_h, k}, turned(p_.w13), nullptr, k, args_.grad_x, columns};
      for_tasks(workers_, combine.tasks(), [&](int32_t worker, int64_t task) {
        const Scratch<A> scratch{panel(worker), buffers_.c + worker * buffers_.c_size, y(worker)};
        combine.run(task, [](int64_t) { return A(1); }, scratch);
      });
    }
    const Left<A> by_token_x{x_.data, x_.stride, rows_.row_to_token},
        by_token_y{grad_y_.data, grad_y_.stride, rows_.row_to_token};
    if (args_.grad_w13)
      weight_gradient({buffers_.grad_h, rows13(p_)}, rows13(p_), by_token_x, p_.H, args_.w13_out, args_.grad_w13,
                      args_.w13_main);
    if (args_.grad_w2)
      weight_gradient(by_token_y, p_.H, {buffers_.weighted_act, p_.I}, p_.I, args_.w2_out, args_.grad_w2,
                      args_.w2_main);
  }

 private:
  A* panel(int32_t worker) const { return buffers_.panel + worker * buffers_.panel_size; }
  /// The weight contracted over its rows.
  static Weight turned(Weight w) {
    std::swap(w.row_stride, w.col_stride), w.panel_stride = kPanel * w.row_stride;
    return w;
  }
  A* y(int32_t worker) const { return buffers_.y + worker * buffers_.y_size; }

  /// Step 1 for expert e and hidden units [32 * index, +64).
  void hidden(int32_t worker, int64_t e, int64_t index) const {
    const int64_t count = rows_.end(e) - rows_.begin(e), first = index * kPanel;
    const int64_t units = std::min(kPair, p_.I - first);
    A bias_sum[2][kPair] = {};
    A *c = buffers_.c + worker * buffers_.c_size, *u = buffers_.u + worker * buffers_.u_size;
    const Panel<W> down = Panel<W>::columns(turned(p_.w2), e, index, units, p_.H, count);
    for_row_blocks(rows_.begin(e), rows_.end(e), [&](int64_t r0, int64_t block) {
      const int32_t* tokens = rows_.row_to_token + r0;
      down.product({grad_y_.data, grad_y_.stride, tokens}, block, u, kPair, panel(worker));
      for (int64_t half = 0; half * kPanel < units; ++half) {
        const int64_t at = first + half * kPanel;
        const FirstProduct<W> product(p_, e, at, std::min(kPanel, p_.I - at), count);
        if (args_.hidden) load_hidden(r0, block, product, c);
        else product.raw({x_.data, x_.stride, tokens}, block, c, panel(worker));
        for (int64_t m = 0; m < block; ++m)
          row(r0 + m, index + half, product, c + m * kPair, u + m * kPair + half * kPanel, bias_sum[half]);
      }
    });
    if (!args_.grad_w13_bias) return;
    W* bias = static_cast<W*>(args_.grad_w13_bias) + e * rows13(p_);
    for (int64_t j = 0; j < units; ++j) {
      const A* sum = bias_sum[j / kPanel];
      bias[gate_row(p_, first + j)] = W(sum[j % kPanel]);
      if (p_.gated) bias[up_row(p_, first + j)] = W(sum[kPanel + j % kPanel]);
    }
  }

  void load_hidden(int64_t r0, int64_t block, const FirstProduct<W>& product, A* c) const {
    for (int64_t m = 0; m < block; ++m) {
      const int64_t from = (r0 + m) * rows13(p_) + product.first();
      widen(p_.dtype, args_.hidden, from, c + m * kPair, product.units());
      if (p_.gated) widen(p_.dtype, args_.hidden, from + p_.I, c + m * kPair + kPanel, product.units());
    }
  }

  /// One row: c holds x W13^T, u holds grad_y W2.
  void row(int64_t r, int64_t index, const FirstProduct<W>& product, A* c, A* u, A* bias_sum) const {
    const int64_t slot = p_.row_to_slot[r], units = product.units(), first = product.first();
    const A* mask = p_.hidden_mask ? static_cast<const A*>(p_.hidden_mask) + slot * p_.I + first : nullptr;
    const A out_weight = p_.weight_on_input ? A(1) : weights_[slot];
    A raw[kPair], act[kPanel], grad[kPair];
    if (p_.weight_on_input) std::copy_n(c, kPair, raw);
    product.add_bias(slot, c);
    for (int64_t j = 0; mask && j < units; ++j) u[j] *= mask[j];
    math<A>().activate_backward(rule_of(p_), out_weight, c, p_.gated ? c + kPanel : nullptr, u, grad, grad + kPanel,
                                act, units);
    if (args_.grad_topk_weights) {
      A share;
      if (!p_.weight_on_input) share = math<A>().dot(u, act, units);
      else
        share = math<A>().dot(grad, raw, units) + (p_.gated ? math<A>().dot(grad + kPanel, raw + kPanel, units) : A(0));
      buffers_.weight_parts[index * p_.T * p_.K + r] = share;
    }
    if (args_.grad_w13_bias) math<A>().axpy(A(1), grad, bias_sum, units);
    if (args_.grad_w13_bias && p_.gated) math<A>().axpy(A(1), grad + kPanel, bias_sum + kPanel, units);
    store_grad_h(r, first, units, p_.weight_on_input ? weights_[slot] : A(1), grad);
    if (!args_.grad_w2) return;
    A* out = buffers_.weighted_act + r * p_.I + first;
    for (int64_t j = 0; j < units; ++j) out[j] = out_weight * act[j];
    for (int64_t j = 0; mask && j < units; ++j) out[j] *= mask[j];
  }

  void store_grad_h(int64_t r, int64_t first, int64_t units, A scale, const A* grad) const {
    A* row = buffers_.grad_h + r * rows13(p_);
    if (p_.interleaved) {
      for (int64_t j = 0; j < units; ++j)
        row[2 * (first + j)] = scale * grad[j], row[2 * (first + j) + 1] = scale * grad[kPanel + j];
      return;
    }
    for (int64_t j = 0; j < units; ++j) row[first + j] = scale * grad[j];
    for (int64_t j = 0; p_.gated && j < units; ++j) row[p_.I + first + j] = scale * grad[kPanel + j];
  }

  /// The shares of grad_topk_weights in ascending order of panels, and grad_w2_bias, for the rows of expert e.
  void weights_and_bias(int32_t worker, int64_t e) const {
    A *sum = y(worker), *bias = panel(worker);
    const W* w2_bias = p_.w2_bias ? static_cast<const W*>(p_.w2_bias) + e * p_.H : nullptr;
    if (w2_bias) tile<W>().widen(w2_bias, bias, p_.H);
    std::fill_n(sum, p_.H, A(0));
    for (int64_t r = rows_.begin(e); r < rows_.end(e); ++r) {
      const int64_t slot = p_.row_to_slot[r];
      const A* grad_y = grad_y_.data + rows_.row_to_token[r] * grad_y_.stride;
      if (args_.grad_topk_weights) {
        A share = 0;
        for (int64_t i = 0; i < ceil_div(p_.I, kPanel); ++i) share += buffers_.weight_parts[i * p_.T * p_.K + r];
        if (w2_bias && !p_.weight_on_input) share += math<A>().dot(grad_y, bias, p_.H);
        static_cast<A*>(args_.grad_topk_weights)[slot] = share;
      }
      if (args_.grad_w2_bias) math<A>().axpy(p_.weight_on_input ? A(1) : weights_[slot], grad_y, sum, p_.H);
    }
    if (args_.grad_w2_bias) tile<W>().narrow(sum, 0, static_cast<W*>(args_.grad_w2_bias) + e * p_.H, 0, 1, p_.H);
  }

  /// grad[e][n][k] = sum over the rows r of e of n_side[r][n] * k_side[r][k]. The contiguous index of the output takes
  /// the vectors; the other one is cut into tasks.
  void weight_gradient(Left<A> n_side, int64_t n_size, Left<A> k_side, int64_t k_size, const Weight& out, void* grad,
                       bool main) const {
    if (out.col_stride != 1) std::swap(n_side, k_side), std::swap(n_size, k_size);
    const int64_t blocks = ceil_div(n_size, kWgradRows), rows = p_.expert_offsets[p_.E];
    for_tasks(workers_, ceil_div(k_size, kPair), [&](int32_t, int64_t panel) {
      pack_columns(k_side, 0, rows, panel * kPair, std::min(kPair, k_size - panel * kPair),
                   buffers_.right + panel * rows * kPair, kPair);
    });
    for_tasks(workers_, p_.E * blocks, [&](int32_t worker, int64_t task) {
      const int64_t e = task / blocks, n0 = task % blocks * kWgradRows, n = std::min(kWgradRows, n_size - n0);
      const int64_t at = e * out.expert_stride + n0 * k_size;
      W* block = static_cast<W*>(grad) + at;
      A* sums = main ? static_cast<A*>(grad) + at : nullptr;
      if (rows_.begin(e) < rows_.end(e)) weight_gradient_block(worker, e, n_side, n0, n, k_size, block, sums);
      else if (!main) std::memset(static_cast<void*>(block), 0, n * k_size * sizeof(W));
    });
  }

  /// main: the sums are added to it, else they become block.
  void weight_gradient_block(int32_t worker, int64_t e, const Left<A>& n_side, int64_t n0, int64_t n, int64_t k_size,
                             W* block, A* main) const {
    A *left = panel(worker), *sum = left + kWgradDepth * kWgradRows;
    const int64_t rows = p_.expert_offsets[p_.E];
    const bool once = rows_.end(e) - rows_.begin(e) <= kWgradDepth;  // the left side stays packed over all of k
    for (int64_t k0 = 0; k0 < k_size; k0 += kPair) {
      const int64_t k = std::min(kPair, k_size - k0), width = k > kPanel ? kPair : kPanel;
      const bool in_place = !main && std::is_same_v<W, A> && k == width;  // the sums go straight to the gradient
      A* c = in_place ? reinterpret_cast<A*>(block + k0) : sum;
      for (int64_t r0 = rows_.begin(e); r0 < rows_.end(e); r0 += kWgradDepth) {
        const int64_t depth = std::min(kWgradDepth, rows_.end(e) - r0);
        if (k0 == 0 || !once) pack_columns(n_side, r0, depth, n0, n, left, kWgradRows);
        const A* right = buffers_.right + k0 * rows + r0 * kPair;
        const Left<A> columns{left, kWgradRows, nullptr, true};
        tile<A>().outer({columns, right, kPair, c, in_place ? k_size : kPair, n, width, depth, r0 > rows_.begin(e),
                         kPanel, in_place && once});
      }
      for (int64_t i = 0; main && i < n; ++i) math<A>().axpy(A(1), sum + i * kPair, main + i * k_size + k0, k);
      if (!main && !in_place) tile<W>().narrow(sum, kPair, block + k0, k_size, n, k);
    }
  }

  static void pack_columns(const Left<A>& side, int64_t r0, int64_t depth, int64_t first, int64_t n, A* to,
                           int64_t width) {
    const A* from = side.data + first + (side.index ? 0 : r0 * side.stride);
    tile<A>().gather(from, side.stride, side.index ? side.index + r0 : nullptr, n, depth, to, width);
  }

  const FusedExpertsBackwardArgs& args_;
  const ExpertMlp& p_;
  const Workers& workers_;
  Workspace space_;
  Buffers<A> buffers_;
  ExpertRows rows_;
  const A* weights_;
  Left<A> x_{}, grad_y_{};
};

}  // namespace

int64_t fused_experts_backward_workspace_bytes(const FusedExpertsBackwardArgs& args, const Workers& workers) {
  Workspace space(nullptr);
  if (args.mlp.dtype == DType::f64) Buffers<double>(args, workers.count, space);
  else Buffers<float>(args, workers.count, space);
  return space.bytes();
}

void fused_experts_backward(const FusedExpertsBackwardArgs& args, const Workers& workers) {
  visit_dtype(args.mlp.weight_dtype, [&](auto tag) { Backward<decltype(tag)>(args, workers).run(); });
}

}  // namespace moe::cpu

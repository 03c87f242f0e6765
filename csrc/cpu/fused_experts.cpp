// SPDX-License-Identifier: Apache-2.0
// fused_experts: the whole expert MLP. 1. first product and activation, a task an (expert, 32 hidden units, or 64
// without gate): rows of x are read through the index, no gathered copy. 2. second product and combine, a task some
// panels of 64 output columns. Reads each weight of the experts hit once; keeps S*I activations and, for the backward,
// the first product.
#include "expert_mlp.h"

namespace moe::cpu {
namespace {

template <class A> struct Buffers {
  int32_t* row_to_token;  // [S]
  A* x;                   // [T, H] where x is not acc
  A* act;                 // [S, I]
  Scratch<A> all;         // of all workers
  int64_t c_size = kRowBlock * kPair, y_size;

  Buffers(const ExpertMlp& p, int32_t workers, Workspace& space) {
    y_size = combine_size(p, workers);
    row_to_token = space.take<int32_t>(p.T * p.K);
    x = space.take<A>(is_acc<A>(p.dtype) ? 0 : p.T * p.H);
    act = space.take<A>(p.T * p.K * p.I);
    all = {space.take<A>(workers * kPackedSize<A>), space.take<A>(workers * c_size), space.take<A>(workers * y_size)};
  }
  Scratch<A> of(int32_t worker) const {
    return {all.packed + worker * kPackedSize<A>, all.c + worker * c_size, all.y + worker * y_size};
  }
};

template <class W> void run(const FusedExpertsArgs& args, const Workers& workers) {
  using A = acc_t<W>;
  const ExpertMlp& p = args.mlp;
  Workspace space(args.workspace);
  const Buffers<A> buffers(p, workers.count, space);
  fill_row_to_token(p, buffers.row_to_token);
  const ExpertRows rows{p, buffers.row_to_token};
  Left<A> x = rows_as_acc(p.dtype, p.x, p.T, p.H, p.x_stride, buffers.x, workers);
  const auto* weights = static_cast<const A*>(p.topk_weights);
  const auto* mask = static_cast<const A*>(p.hidden_mask);
  const int64_t units = unit_block(p), panels = ceil_div(p.I, units);

  // 1. hidden = x W13^T, act = activation(hidden)
  const auto product_of = [&](int64_t task) {
    const int64_t e = task / panels, first = task % panels * units;
    return FirstProduct<W>(p, e, first, std::min(units, p.I - first), rows.end(e) - rows.begin(e));
  };
  for_tasks_ahead(workers, p.E * panels, [&](int32_t worker, int64_t task, int64_t next_task) {
    const int64_t e = task / panels, count = rows.end(e) - rows.begin(e);
    if (count == 0) return;
    const Scratch<A> scratch = buffers.of(worker);
    const FirstProduct<W> product = product_of(task), next = product_of(std::min(next_task, p.E * panels - 1));
    for_row_blocks(rows.begin(e), rows.end(e), [&](int64_t r0, int64_t block) {
      product.raw({x.data, x.stride, rows.row_to_token + r0}, block, scratch.c, scratch.packed, &next);
      if (args.hidden) {
        const int64_t at = r0 * rows13(p) + product.first();
        narrow(p.dtype, scratch.c, kPair, args.hidden, at, rows13(p), block, product.units());
        if (p.gated)
          narrow(p.dtype, scratch.c + kPanel, kPair, args.hidden, at + p.I, rows13(p), block, product.units());
      }
      for (int64_t m = 0; m < block; ++m) {
        A *h = scratch.c + m * kPair, *out = buffers.act + (r0 + m) * p.I + product.first();
        const int64_t slot = p.row_to_slot[r0 + m];
        product.add_bias(slot, h);
        math<A>().activate(rule_of(p), h, p.gated ? h + kPanel : nullptr, out, product.units());
        for (int64_t j = 0; mask && j < product.units(); ++j) out[j] *= mask[slot * p.I + product.first() + j];
      }
    });
  });

  // 2. y = sum over slots of weight * (act W2^T + bias)
  const auto scale = [&](int64_t row) { return p.weight_on_input ? A(1) : weights[p.row_to_slot[row]]; };
  const int64_t columns = combine_panels(p, workers.count) * kPair;
  const Combine<W> combine{rows, {buffers.act, p.I}, p.w2, p.w2_bias, p.I, args.y, columns, p.plain2};
  for_tasks(workers, combine.tasks(),
            [&](int32_t worker, int64_t task) { combine.run(task, scale, buffers.of(worker)); });
}

}  // namespace

int64_t fused_experts_workspace_bytes(const FusedExpertsArgs& args, const Workers& workers) {
  Workspace space(nullptr);
  if (args.mlp.dtype == DType::f64) Buffers<double>(args.mlp, workers.count, space);
  else Buffers<float>(args.mlp, workers.count, space);
  return space.bytes();
}

void fused_experts(const FusedExpertsArgs& args, const Workers& workers) {
  visit_dtype(args.mlp.weight_dtype, [&](auto tag) { run<decltype(tag)>(args, workers); });
}

}  // namespace moe::cpu

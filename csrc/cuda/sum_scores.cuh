// SPDX-License-Identifier: Apache-2.0
// sum_scores on a GPU: what route does for its sums (score_sums.cuh), of scores that nobody chooses from.
#pragma once
#include "score_sums.cuh"

namespace moe::cuda {

template <class T> MOE_KERNEL __launch_bounds__(256, sizeof(T) == 8 ? 2 : 4)
    sum_scores_kernel(SumScoresArgs args, RouteTile tile, TokenRuns runs) {
  using A = acc_t<T>;
  MOE_SHARED(unsigned char, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int E = int(args.E);
  auto* scores = reinterpret_cast<raw_t<A>*>(shared + tile.keys);
  A* sums = reinterpret_cast<A*>(shared + tile.sums);
  A* parts = static_cast<A*>(runs.per_group == 1 ? args.sums : args.workspace);
  const double softcap = args.rule.logit_softcap;
  for (int64_t run = blockIdx.x; run < runs.count; run += gridDim.x) {
    const int64_t end = runs.end(run);
    for (int e = threadIdx.x; e < E; e += blockDim.x) sums[e] = 0;
    for (int64_t first = runs.begin(run); first < end; first += tile.tokens) {
      const int tokens = int(min(int64_t(tile.tokens), end - first));
      const T* rows = tile_in<T>(args.logits, args.logits_stride, first, tokens, E, shared);
      land();
      __syncthreads();
      for (int round = 0; round < tokens; round += warps) {
        const int i = round + warp;
        if (i < tokens) {
          const T* row = rows + i * E;
          RowSums<A> of_row{row_top(row, E, softcap, lane), 1};
          const bool live = of_row.top > A(-INFINITY) && (!args.padding_mask || args.padding_mask[first + i]);
          if (live) pull_of<T>(args.rule, false, row, E, nullptr, of_row, lane);
          put_scores(args.rule, args.normalize, live, row, E, of_row, scores + int64_t(warp) * tile.keys_stride, lane);
        }
        __syncthreads();
        add_scores(scores, tile.keys_stride, min(warps, tokens - round), E, sums);
        __syncthreads();
      }
    }
    for (int e = threadIdx.x; e < E; e += blockDim.x) parts[run * E + e] = sums[e];
  }
}

template <class T> MOE_KERNEL __launch_bounds__(256, 4)
    sum_scores_backward_kernel(SumScoresBackwardArgs args, RouteTile tile, TokenRuns runs) {
  using A = acc_t<T>;
  MOE_SHARED(unsigned char, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int E = int(args.E);
  for (int64_t run = blockIdx.x; run < runs.count; run += gridDim.x) {
    const int64_t end = runs.end(run);
    const A* grad = copy_in(static_cast<const A*>(args.grad_sums) + runs.group_of(run) * E, E, shared + tile.sums);
    for (int64_t first = runs.begin(run); first < end; first += tile.tokens) {
      const int tokens = int(min(int64_t(tile.tokens), end - first));
      T* rows = tile_in<T>(args.logits, args.logits_stride, first, tokens, E, shared);
      land();
      __syncthreads();
      for (int i = warp; i < tokens; i += warps) {
        T* row = rows + i * E;
        RowSums<A> sums{row_top(row, E, args.rule.logit_softcap, lane), 1};
        const bool live = sums.top > A(-INFINITY) && (!args.padding_mask || args.padding_mask[first + i]);
        SumPull<A> pull{0, 1, 0};
        if (live) pull = pull_of(args.rule, args.normalize, row, E, grad, sums, lane);
        for (int e = lane; e < E; e += kWarp)
          row[e] = narrow<T>(live ? grad_logit(args.rule, row[e], pull.of(grad[e]), -pull.mean, sums) : A(0));
      }
      __syncthreads();
      copy_out(static_cast<T*>(args.grad_logits) + first * E, rows, tokens * E);
      __syncthreads();
    }
  }
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// sinkhorn on a GPU: one launch whose blocks stay until the plan is balanced, at most one on each processor. A block
// owns every gridDim-th tile of tokens; it alone touches their rows of the plan, which hold exponentials until the end.
// Twice an iteration all blocks wait for each other: for the sums of the tiles, and for the factors of the columns.
// Whether to stop each block finds out by itself, from the same numbers. csrc/sinkhorn.h fixes the order of all sums.
#pragma once
#include "../sinkhorn.h"
#include "route.cuh"

namespace moe::cuda {

constexpr int kSinkhornWarps = 8;
static_assert(kSinkhornWarps == sinkhorn::kTileSums && kWarp == sinkhorn::kRowSums, "a warp a sum, a lane a sum");

/// The workspace, in bytes; one answer for the launcher and the kernel.
struct SinkhornSpace {
  int64_t tokens, rows, tiles, columns, arrived, bytes;  // after the tops [tiles]: [tiles], [T], [tiles, E], [E], [1]
};
MOE_BOTH SinkhornSpace sinkhorn_space(int64_t T, int64_t E, int64_t acc_bytes) {
  const int64_t count = (T + sinkhorn::kTileTokens - 1) / sinkhorn::kTileTokens;
  SinkhornSpace space{};
  space.tokens = count * acc_bytes;
  space.rows = (space.tokens + count * 4 + 15) / 16 * 16;
  space.tiles = space.rows + T * acc_bytes;
  space.columns = space.tiles + count * E * acc_bytes;
  space.arrived = space.columns + E * acc_bytes;
  space.bytes = space.arrived + 8;
  return space;
}

/// Waits until all blocks have come as often as this one.
MOE_DEVICE void meet(uint32_t* arrived, uint32_t& turns) {
  __syncthreads();
  if (threadIdx.x == 0) {
    ++turns;
    atom_add_acq_rel_gpu(arrived, 1u);
    while (ld_acquire_gpu(arrived) < turns * gridDim.x) __nanosleep(20);
  }
  __syncthreads();
}

/// Calls f(tile, first, tokens) for every tile of the block.
template <class F> MOE_DEVICE void for_tiles(int64_t T, F&& f) {
  constexpr int size = sinkhorn::kTileTokens;
  for (int64_t tile = blockIdx.x; tile * size < T; tile += gridDim.x)
    f(tile, tile * size, int(min(int64_t(size), T - tile * size)));
}
MOE_DEVICE bool is_token(const SinkhornArgs& args, int64_t t) { return !args.padding_mask || args.padding_mask[t]; }

template <class T> MOE_DEVICE acc_t<T> logit_of(const SinkhornArgs& args, int64_t t, int e) {
  return clean_logit((static_cast<const T*>(args.logits) + t * args.logits_stride)[e], 0.);
}

/// The largest logit and the number of tokens of every tile.
template <class T> MOE_DEVICE void survey(const SinkhornArgs& args, acc_t<T>* tops, int32_t* tokens,
                                          acc_t<T>* scratch) {
  using A = acc_t<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = int(args.E);
  for_tiles(args.T, [&](int64_t tile, int64_t first, int count) {
    A top = -INFINITY, live = 0;
    for (int i = warp; i < count; i += kSinkhornWarps) {
      if (!is_token(args, first + i)) continue;
      for (int e = lane; e < E; e += kWarp) top = max(top, logit_of<T>(args, first + i, e));
      live += 1;
    }
    top = warp_max(top);
    if (lane == 0) scratch[warp] = top, scratch[kSinkhornWarps + warp] = live;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kSinkhornWarps; ++w) top = max(top, scratch[w]), live += scratch[kSinkhornWarps + w];
      tops[tile] = top, tokens[tile] = int32_t(live);
    }
    __syncthreads();
  });
}

/// The largest logit and the number of tokens of all tiles, for every thread.
template <class A>
MOE_DEVICE int64_t gather(const SinkhornArgs& args, const A* tops, const int32_t* tokens, A* top) {
  const int lane = threadIdx.x % kWarp, tiles = int((args.T + sinkhorn::kTileTokens - 1) / sinkhorn::kTileTokens);
  A best = -INFINITY;
  int32_t live = 0;
  for (int tile = lane; tile < tiles; tile += kWarp) best = max(best, tops[tile]), live += tokens[tile];
  *top = warp_max(best);
  return __reduce_add_sync(kFullWarp, live);
}

/// The factors of the tokens of the block's tiles and the sums of their columns.
template <class A>
MOE_DEVICE void balance_rows(const SinkhornArgs& args, int64_t tokens, const A* columns, A* rows, A* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = int(args.E);
  const A* plan = static_cast<const A*>(args.plan);
  for_tiles(args.T, [&](int64_t tile, int64_t first, int count) {
    for (int i = warp; i < count; i += kSinkhornWarps) {
      const A* row = plan + (first + i) * E;
      A dot = 0;
      for (int e = lane; e < E; e += kWarp) dot = sinkhorn::fused(row[e], columns[e], dot);
      dot = warp_sum(dot);
      if (lane == 0) rows[first + i] = is_token(args, first + i) ? sinkhorn::factor_of(dot, tokens) : A(0);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
      A sum = 0;
      for (int i = 0; i < count; ++i) sum = sinkhorn::fused(rows[first + i], plan[(first + i) * E + e], sum);
      sums[tile * E + e] = sum;
    }
  });
}

/// The factors of the columns: a block 32 of them, a warp one of the sums over the tiles.
template <class A> MOE_DEVICE void balance_columns(const SinkhornArgs& args, const A* sums, A* columns, A* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = int(args.E);
  const int64_t tiles = (args.T + sinkhorn::kTileTokens - 1) / sinkhorn::kTileTokens;
  for (int base = blockIdx.x * kWarp; base < E; base += gridDim.x * kWarp) {
    const int e = base + lane;
    A sum = 0;
    for (int64_t tile = warp; tile < tiles && e < E; tile += kSinkhornWarps) sum += sums[tile * E + e];
    scratch[warp * kWarp + lane] = sum;
    __syncthreads();
    if (warp == 0 && e < E) {
      A all[kSinkhornWarps];
      for (int w = 0; w < kSinkhornWarps; ++w) all[w] = scratch[w * kWarp + lane];
      columns[e] = sinkhorn::factor_of(sinkhorn::by_halves(all, kSinkhornWarps), E);
    }
    __syncthreads();
  }
}

/// Takes the new factors of the columns; how far they moved in the mean, the same in every thread of the grid.
template <class A> MOE_DEVICE A take_columns(int E, const A* columns, A* own, A* scratch) {
  A moved = 0;
  if (threadIdx.x < kWarp) {
    for (int e = threadIdx.x; e < E; e += kWarp) {
      const A was = own[e], is = columns[e];
      own[e] = is;
      moved += was < is ? is - was : was - is;
    }
    moved = warp_sum(moved) / A(E);
    if (threadIdx.x == 0) scratch[0] = moved;
  }
  __syncthreads();
  return scratch[0];  // not written again before all blocks have met
}

/// The K best of a row of the plan, by a warp: the next one is the largest that is not ahead of the last.
template <class T> MOE_DEVICE void choose(const SinkhornArgs& args, int64_t t, const acc_t<T>* plan, int lane) {
  using A = acc_t<T>;
  using Key = key_t<A>;
  const int E = int(args.E), K = int(args.K);
  RowSums<A> sums{-INFINITY, 1};
  for (int e = lane; e < E; e += kWarp) sums.top = max(sums.top, logit_of<T>(args, t, e));
  sums.top = warp_max(sums.top);
  const bool finite = sums.top > A(-INFINITY);
  if (finite && K > 1)
    sums.sum = sum_of_exps<A>(E, lane, [&](int e) { return exp_of(logit_of<T>(args, t, e) - sums.top); });
  A* weights = static_cast<A*>(args.topk_weights) + t * K;
  Key last = ~Key(0);
  uint32_t at = 0;
  for (int k = 0; k < K; ++k) {
    Best<Key> best{0, 0xffffffffu};
    for (int e = lane; e < E; e += kWarp) {
      const Key key = key_of(plan[e]);
      if ((key < last || (key == last && uint32_t(e) > at)) && key > best.key) best = {key, uint32_t(e)};
    }
    last = warp_max(best.key);
    at = __reduce_min_sync(kFullWarp, best.key == last ? best.at : 0xffffffffu);
    if (lane != 0) continue;
    const A l = logit_of<T>(args, t, int(at));
    args.topk_ids[t * K + k] = int32_t(at);
    weights[k] = finite ? score_of(K == 1 ? Scoring::sigmoid : Scoring::softmax, l, sums) : A(0);
    atomicAdd(&args.tokens_per_expert[at], 1);
  }
}

/// The plan, the ids and the weights of the block's tokens.
template <class T> MOE_DEVICE void finish(const SinkhornArgs& args, const acc_t<T>* rows, const acc_t<T>* columns) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = int(args.E), K = int(args.K);
  for_tiles(args.T, [&](int64_t, int64_t first, int count) {
    for (int i = warp; i < count; i += kSinkhornWarps) {
      const int64_t t = first + i;
      acc_t<T>* plan = static_cast<acc_t<T>*>(args.plan) + t * E;
      if (is_token(args, t)) {
        for (int e = lane; e < E; e += kWarp) plan[e] = rows[t] * plan[e] * columns[e];
        choose<T>(args, t, plan, lane);
      } else {
        for (int k = lane; k < K; k += kWarp)
          args.topk_ids[t * K + k] = -1, static_cast<acc_t<T>*>(args.topk_weights)[t * K + k] = 0;
      }
    }
  });
}

template <class T> MOE_KERNEL __launch_bounds__(kSinkhornWarps* kWarp, 1) sinkhorn_kernel(SinkhornArgs args) {
  using A = acc_t<T>;
  MOE_SHARED(A, own);  // [E] factors of the columns, then scratch
  const int E = int(args.E);
  A* const scratch = own + E;
  const SinkhornSpace space = sinkhorn_space(args.T, E, sizeof(A));
  unsigned char* const base = static_cast<unsigned char*>(args.workspace);
  auto* arrived = reinterpret_cast<uint32_t*>(base + space.arrived);
  auto* tokens_of = reinterpret_cast<int32_t*>(base + space.tokens);
  A *tops = reinterpret_cast<A*>(base), *rows = reinterpret_cast<A*>(base + space.rows);
  A *sums = reinterpret_cast<A*>(base + space.tiles), *columns = reinterpret_cast<A*>(base + space.columns);
  uint32_t turns = 0;

  survey<T>(args, tops, tokens_of, scratch);
  meet(arrived, turns);
  A top;
  const int64_t tokens = gather(args, tops, tokens_of, &top);
  const A shift = sinkhorn::shift_of(top, sizeof(T) == 2);
  for_tiles(args.T, [&](int64_t, int64_t first, int count) {
    for (int64_t at = threadIdx.x; at < int64_t(count) * E; at += blockDim.x) {
      const int64_t t = first + at / E;
      static_cast<A*>(args.plan)[first * E + at] =
          is_token(args, t) ? exp_of(logit_of<T>(args, t, int(at % E)) - shift) : A(0);
    }
  });
  for (int e = threadIdx.x; e < E; e += blockDim.x) own[e] = 1;
  __syncthreads();
  int32_t iterations = 0;
  for (bool go = tokens > 0; go && iterations < args.max_iterations; ++iterations) {
    balance_rows(args, tokens, own, rows, sums);
    meet(arrived, turns);
    balance_columns(args, sums, columns, scratch);
    meet(arrived, turns);
    go = !(take_columns(E, columns, own, scratch) <= A(args.tol));
  }
  finish<T>(args, rows, own);
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.iterations = iterations;
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// route on a GPU. A block takes tiles of consecutive tokens: their logits come in as one stretch, each warp routes
// token after token in shared memory, the results leave as one stretch. Nothing is read or written twice, the sums of
// the scores (score_sums.cuh) included.
// Choices are kept as unsigned keys that order as the numbers do; key 0 is an expert already taken.
#pragma once
#include "score_sums.cuh"

namespace moe::cuda {

MOE_DEVICE uint32_t key_of(float v) {
  const uint32_t bits = __float_as_uint(v + 0.f);  // -0 is +0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
MOE_DEVICE uint64_t key_of(double v) {
  const uint64_t bits = uint64_t(__double_as_longlong(v + 0.));
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}
MOE_DEVICE float value_of(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }
MOE_DEVICE double value_of(uint64_t key) {
  return __longlong_as_double((long long)(key >> 63 ? key & ~(uint64_t(1) << 63) : ~key));
}
template <class A> using key_t = decltype(key_of(A(0)));
template <class A> MOE_DEVICE key_t<A> out_of_reach() { return key_of(A(-INFINITY)); }

/// The best of the lane's keys. Lane l holds the keys l, l + 32, ...
template <class Key> struct Best {
  Key key;
  uint32_t at;
};
template <class Key> MOE_DEVICE Best<Key> lane_best(const Key* keys, int count, int lane) {
  Best<Key> best{0, 0xffffffffu};
  for (int i = lane; i < count; i += kWarp)
    if (keys[i] > best.key) best = {keys[i], uint32_t(i)};
  return best;
}
/// Takes the largest key of the warp, the first of equals, out of `keys`; the lane that held it looks for its next.
template <class Key> MOE_DEVICE Best<Key> take_best(Key* keys, int count, Best<Key>& mine, int lane) {
  Best<Key> best;
  best.key = warp_max(mine.key);
  best.at = __reduce_min_sync(kFullWarp, mine.key == best.key ? mine.at : 0xffffffffu);
  if (mine.at == best.at) {
    keys[best.at] = 0;
    mine = lane_best(keys, count, lane);
  }
  return best;
}

/// The sum of the group_top largest choices of a group, largest first.
template <class A> MOE_DEVICE A group_score(const key_t<A>* keys, int size, int group_top, int lane) {
  using Key = key_t<A>;
  A sum = 0;
  Key below = ~Key(0);
  for (int left = min(group_top, size); left > 0;) {
    Key best = 0;
    for (int i = lane; i < size; i += kWarp)
      if (keys[i] < below && keys[i] > best) best = keys[i];
    best = warp_max(best);
    int equal = 0;
    for (int i = lane; i < size; i += kWarp) equal += keys[i] == best;
    equal = min(left, __reduce_add_sync(kFullWarp, equal));
    for (int i = 0; i < equal; ++i) sum += value_of(best);
    left -= equal, below = best;
  }
  return sum;
}

/// Puts the experts outside the topk_group best groups out of reach.
template <class A> MOE_DEVICE void mask_groups(const RouteArgs& args, key_t<A>* keys, key_t<A>* group_keys, int lane) {
  const int E = int(args.E), G = int(args.G), size = E / G;
  __syncwarp();
  for (int g = 0; g < G; ++g) {
    const A score = group_score<A>(keys + g * size, size, int(args.group_top), lane);
    if (lane == g % kWarp) group_keys[g] = score == score ? key_of(score) : out_of_reach<A>();
  }
  Best<key_t<A>> mine = lane_best(group_keys, G, lane);
  for (int i = 0; i < args.topk_group; ++i) take_best(group_keys, G, mine, lane);
  __syncwarp();
  for (int e = lane; e < E; e += kWarp)
    if (group_keys[e / size] != 0) keys[e] = out_of_reach<A>();
}

/// One token of a tile, by one warp: row, weights, ids and lse are its places in shared memory.
template <class T> struct TokenResult {
  acc_t<T>* weights;
  int32_t* ids;
  acc_t<T>* lse;
};

/// Returns what softmax made of the row; top is -inf for a token that is masked or has no expert.
template <class T>
MOE_DEVICE RowSums<acc_t<T>> route_token(const RouteArgs& args, bool masked, const T* row, key_t<acc_t<T>>* keys,
                                         TokenResult<T> out, int32_t* counts, int lane) {
  using A = acc_t<T>;
  const int E = int(args.E), K = int(args.K);
  const double softcap = args.rule.logit_softcap;
  A top = -INFINITY;
  for (int e = lane; e < E; e += kWarp) {  // a lane's places in `keys` hold its logits, then exps, then keys
    const A l = clean_logit(row[e], softcap);
    keys[e] = raw_of(l);
    top = top < l ? l : top;
  }
  top = warp_max(top);
  if (masked || !(top > A(-INFINITY))) {
    for (int k = lane; k < K; k += kWarp) {
      out.weights[k] = 0, out.ids[k] = masked ? -1 : k;
      if (!masked) atomicAdd(&counts[k], 1);
    }
    if (lane == 0) *out.lse = 0;
    return {A(-INFINITY), 1};
  }
  RowSums<A> sums{top, 1};
  const bool softmax = args.rule.scoring == Scoring::softmax;
  if (softmax)
    sums.sum = sum_of_exps<A>(E, lane, [&](int e) {
      const A l = number_of(keys[e]), exp = exp_of(l - top);
      keys[e] = raw_of(l > A(-INFINITY) ? exp : A(-INFINITY));
      return exp;
    });
  const A* bias = static_cast<const A*>(args.correction_bias);
  for (int e = lane; e < E; e += kWarp) {
    const A v = number_of(keys[e]);
    const A choice = (softmax ? v / sums.sum : score_of(args.rule.scoring, v, sums)) + (bias ? bias[e] : A(0));
    keys[e] = v > A(-INFINITY) && choice == choice ? key_of(choice) : out_of_reach<A>();
  }
  if (args.G > 1) mask_groups<A>(args, keys, keys + E, lane);
  Best<key_t<A>> mine = lane_best(keys, E, lane);
  for (int k = 0; k < K; ++k) {
    const Best<key_t<A>> best = take_best(keys, E, mine, lane);
    if (lane == k % kWarp) out.ids[k] = int32_t(best.at), out.weights[k] = best.key != out_of_reach<A>();
  }
  A sum = 0;
  for (int k = lane; k < K; k += kWarp) {  // an expert out of reach weighs nothing, even if there is no other to take
    const A l = clean_logit(row[out.ids[k]], softcap);
    out.weights[k] = out.weights[k] != 0 ? score_of(args.rule.scoring, l, sums) : A(0);
    sum += out.weights[k];
    atomicAdd(&counts[out.ids[k]], 1);
  }
  sum = warp_sum(sum) + A(args.rule.renormalize_eps);
  const A divisor = args.rule.renormalize && sum > 0 ? sum : A(1);  // divide first: K = 1 weighs exactly 1
  for (int k = lane; k < K; k += kWarp) out.weights[k] = out.weights[k] / divisor * A(args.rule.scale);
  if (lane == 0) *out.lse = softmax ? top + log(sums.sum) : A(0);
  return sums;
}

template <class T> MOE_KERNEL __launch_bounds__(256, sizeof(T) == 8 ? 2 : 4)
    route_kernel(RouteArgs args, RouteTile tile, TokenRuns runs) {
  using A = acc_t<T>;
  MOE_SHARED(unsigned char, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int E = int(args.E), K = int(args.K);
  auto* all_keys = reinterpret_cast<key_t<A>*>(shared + tile.keys);
  auto* keys = all_keys + int64_t(warp) * tile.keys_stride;
  auto* weights = reinterpret_cast<A*>(shared + tile.weights);
  auto* ids = reinterpret_cast<int32_t*>(shared + tile.ids);
  auto* lse = reinterpret_cast<A*>(shared + tile.lse);
  auto* counts = reinterpret_cast<int32_t*>(shared + tile.counts);
  A* sums = args.score_sums ? reinterpret_cast<A*>(shared + tile.sums) : nullptr;
  A* parts = static_cast<A*>(runs.per_group == 1 ? args.score_sums : args.workspace);
  for (int e = threadIdx.x; e < E; e += blockDim.x) counts[e] = 0;
  for (int64_t run = blockIdx.x; run < runs.count; run += gridDim.x) {
    const int64_t end = runs.end(run);
    for (int e = threadIdx.x; e < E && sums; e += blockDim.x) sums[e] = 0;
    for (int64_t first = runs.begin(run); first < end; first += tile.tokens) {
      const int tokens = int(min(int64_t(tile.tokens), end - first));
      const T* rows = tile_in<T>(args.logits, args.logits_stride, first, tokens, E, shared);
      land();
      __syncthreads();
      for (int round = 0; round < tokens; round += warps) {
        const int i = round + warp;
        if (i < tokens) {
          const bool masked = args.padding_mask && !args.padding_mask[first + i];
          const RowSums<A> row =
              route_token<T>(args, masked, rows + i * E, keys, {weights + i * K, ids + i * K, lse + i}, counts, lane);
          if (sums)
            put_scores(args.rule, args.normalize_scores, row.top > A(-INFINITY), rows + i * E, E, row, keys, lane);
        }
        if (sums) {
          __syncthreads();
          add_scores(all_keys, tile.keys_stride, min(warps, tokens - round), E, sums);
          __syncthreads();
        }
      }
      __syncthreads();
      copy_out(static_cast<A*>(args.topk_weights) + first * K, weights, tokens * K);
      copy_out(args.topk_ids + first * K, ids, tokens * K);
      if (args.lse) copy_out(static_cast<A*>(args.lse) + first, lse, tokens);
      // No barrier here: the next tile's rows go where nothing is read any more, its results wait for the barrier
      // above.
    }
    for (int e = threadIdx.x; e < E && sums; e += blockDim.x) parts[run * E + e] = sums[e];
  }
  for (int e = threadIdx.x; e < E; e += blockDim.x)
    if (counts[e] != 0) atomicAdd(&args.tokens_per_expert[e], counts[e]);
}

/// One token of the backward: turns its logits, in place, into their gradients. `pulls` holds d topk_weights; it and
/// `weights` are used up. grad_sums: d score_sums of its group, or null.
template <class T>
MOE_DEVICE void route_token_backward(const RouteBackwardArgs& args, T* row, const int32_t* ids, acc_t<T>* weights,
                                     acc_t<T>* pulls, acc_t<T> grad_lse, const acc_t<T>* grad_sums, int lane) {
  using A = acc_t<T>;
  const int E = int(args.E), K = args.grad_weights ? int(args.K) : 0;
  const RouteRule& rule = args.rule;
  const A top = row_top(row, E, rule.logit_softcap, lane);
  const bool live = ids[0] >= 0 && ids[0] < E && top > A(-INFINITY);
  RowSums<A> sums{top, 1};
  SumPull<A> aux{0, 1, 0};
  if (live) aux = pull_of(rule, args.normalize_scores, row, E, grad_sums, sums, lane);
  A sum = 0, dot = 0, mean = 0;
  for (int k = lane; k < K && live; k += kWarp) {
    if (ids[k] < 0 || ids[k] >= E) weights[k] = 0;
    if (weights[k] == 0) continue;  // was out of reach
    const A s = score_of(rule.scoring, clean_logit(row[ids[k]], rule.logit_softcap), sums);
    weights[k] = s;  // from here on
    sum += s, dot += pulls[k] * s;
  }
  sum = warp_sum(sum) + A(rule.renormalize_eps), dot = warp_sum(dot);
  for (int k = lane; k < K && live; k += kWarp) {  // d score; the sum is never squared: it may be 1e-20
    const bool counts = weights[k] != 0 && (!rule.renormalize || sum > 0);
    const A pull = rule.renormalize && counts ? (pulls[k] - dot / sum) / sum : pulls[k];
    pulls[k] = counts ? A(rule.scale) * pull : A(0);
    mean += pulls[k] * weights[k];
  }
  const A all = grad_lse - warp_sum(mean) - aux.mean;
  for (int k = lane; k < K && live; k += kWarp) {  // d logit of the chosen, before the row is overwritten
    if (weights[k] == 0) continue;
    const A of_sums = grad_sums ? aux.of(grad_sums[ids[k]]) : A(0);
    pulls[k] = grad_logit(rule, row[ids[k]], pulls[k] + of_sums, all, sums);
  }
  __syncwarp();
  const bool dense = live && (rule.scoring == Scoring::softmax || grad_sums);  // the rest of the row
  for (int e = lane; e < E; e += kWarp) {
    const A of_sums = grad_sums ? aux.of(grad_sums[e]) : A(0);
    row[e] = narrow<T>(dense ? grad_logit(rule, row[e], of_sums, all, sums) : A(0));
  }
  __syncwarp();
  for (int k = lane; k < K && live; k += kWarp)
    if (weights[k] != 0) row[ids[k]] = narrow<T>(pulls[k]);
}

template <class T>
MOE_KERNEL __launch_bounds__(256, 4) route_backward_kernel(RouteBackwardArgs args, RouteTile tile, TokenRuns runs) {
  using A = acc_t<T>;
  MOE_SHARED(unsigned char, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int E = int(args.E), K = int(args.K);
  const A *grad_lse = static_cast<const A*>(args.grad_lse), *grad_sums = static_cast<const A*>(args.grad_score_sums);
  for (int64_t run = blockIdx.x; run < runs.count; run += gridDim.x) {
    const int64_t end = runs.end(run);
    const A* of_group = nullptr;
    if (grad_sums) of_group = copy_in(grad_sums + runs.group_of(run) * E, E, shared + tile.sums);
    for (int64_t first = runs.begin(run); first < end; first += tile.tokens) {
      const int tokens = int(min(int64_t(tile.tokens), end - first));
      T* rows = tile_in<T>(args.logits, args.logits_stride, first, tokens, E, shared);
      int32_t* ids = copy_in(args.topk_ids + first * K, tokens * K, shared + tile.ids);
      A* weights = copy_in(static_cast<const A*>(args.topk_weights) + first * K, tokens * K, shared + tile.weights);
      A* pulls = reinterpret_cast<A*>(shared + tile.pulls);
      if (args.grad_weights) pulls = copy_in(static_cast<const A*>(args.grad_weights) + first * K, tokens * K, pulls);
      const A* lse = reinterpret_cast<A*>(shared + tile.lse);
      if (grad_lse) lse = copy_in(grad_lse + first, tokens, shared + tile.lse);
      land();
      __syncthreads();
      for (int i = warp; i < tokens; i += warps)
        route_token_backward<T>(args, rows + i * E, ids + i * K, weights + i * K, pulls + i * K,
                                grad_lse ? lse[i] : A(0), of_group, lane);
      __syncthreads();
      copy_out(static_cast<T*>(args.grad_logits) + first * E, rows, tokens * E);
      __syncthreads();
    }
  }
}

}  // namespace moe::cuda

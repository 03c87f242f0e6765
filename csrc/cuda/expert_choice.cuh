// SPDX-License-Identifier: Apache-2.0
// expert_choice on a GPU.
//   scores  a block takes a tile of tokens, a warp a token; the scores leave expert by expert
//   cuts    a block an expert of a group: its C-th largest score, eight bits of the key a pass over the column, counted
//   in
//           shared memory; one more pass, in token order, finds the last token of just that score
//   slots   a warp a token: the experts that took it, best first
// All that is added up is integers, so no order can change a result.
#pragma once
#include "expert_choice_tile.h"
#include "route.cuh"

namespace moe::cuda {

/// One row of logits to its softmax, in `row` [E]: 0 where the logit is -inf, everywhere if all are.
template <class T> MOE_DEVICE void softmax_row(const T* logits, int E, acc_t<T>* row, int lane) {
  using A = acc_t<T>;
  A top = -INFINITY;
  for (int e = lane; e < E; e += kWarp) {
    const A l = clean_logit(logits[e], 0.);
    row[e] = l;
    top = top < l ? l : top;
  }
  top = warp_max(top);
  const bool finite = top > A(-INFINITY);
  A sum = 1;
  if (finite)
    sum = sum_of_exps<A>(E, lane, [&](int e) {
      row[e] = exp_of(row[e] - top);
      return row[e];
    });
  for (int e = lane; e < E; e += kWarp) row[e] = finite ? row[e] / sum : A(0);
}

template <class T> MOE_KERNEL __launch_bounds__(256) expert_scores_kernel(ExpertCutsArgs args, ChoiceTile tile) {
  using A = acc_t<T>;
  MOE_SHARED(A, rows);  // [tile.tokens][tile.stride]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = int(args.E);
  A* scores = static_cast<A*>(args.scores);
  for (int64_t first = int64_t(blockIdx.x) * tile.tokens; first < args.T; first += int64_t(gridDim.x) * tile.tokens) {
    const int tokens = int(min(int64_t(tile.tokens), args.T - first));
    for (int i = warp; i < tokens; i += kChoiceWarps) {
      const int64_t t = first + i;
      A* row = rows + i * tile.stride;
      if (args.padding_mask && !args.padding_mask[t]) {
        for (int e = lane; e < E; e += kWarp) row[e] = -1;
      } else {
        softmax_row(static_cast<const T*>(args.logits) + t * args.logits_stride, E, row, lane);
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < E * tile.tokens; at += blockDim.x) {
      const int i = at % tile.tokens, e = at / tile.tokens;
      if (i < tokens) scores[int64_t(e) * args.T + first + i] = rows[i * tile.stride + e];
    }
    __syncthreads();
  }
}

/// Where `left` falls among the counts of the bins, from the highest on: the bin, and how many lie above it. By a warp,
/// a lane eight neighbouring bins.
MOE_DEVICE void find_bin(const int32_t* bins, int32_t left, int lane, int32_t* bin, int32_t* above) {
  constexpr int kOfLane = kCutBins / kWarp;
  int32_t sum = 0;
  for (int i = 0; i < kOfLane; ++i) sum += bins[kCutBins - 1 - lane * kOfLane - i];
  int32_t before = warp_prefix(sum, lane);
  if (before >= left || before + sum < left) return;
  for (int at = kCutBins - 1 - lane * kOfLane;; --at) {  // ends: the sum reaches left
    if (before + bins[at] >= left) {
      *bin = at, *above = before;
      return;
    }
    before += bins[at];
  }
}

/// The least key that an expert takes, and how many tokens of just this key. `bins` has kCutBins + 2 numbers.
template <class A>
MOE_DEVICE key_t<A> least_key(const A* column, int64_t n, int32_t C, int32_t* bins, int32_t* room) {
  using Key = key_t<A>;
  int32_t *bin = bins + kCutBins, *above = bin + 1, left = C;
  Key found = 0;
  for (int shift = int(sizeof(Key)) * 8 - 8; shift >= 0; shift -= 8) {
    bins[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const Key key = key_of(column[i]) >> shift;
      if (key >> 8 == found) atomicAdd(&bins[int(key & 255)], 1);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) find_bin(bins, left, threadIdx.x, bin, above);
    __syncthreads();
    found = found << 8 | Key(*bin), left -= *above;  // two barriers lie before the next bin is found
  }
  *room = left;
  return found;
}

template <class A> MOE_KERNEL __launch_bounds__(kCutBins) expert_cuts_kernel(ExpertCutsArgs args) {
  MOE_SHARED(int32_t, bins);  // [kCutBins + 2]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t group = blockIdx.x / args.E, e = blockIdx.x % args.E, first = group * args.n;
  const A* column = static_cast<const A*>(args.scores) + e * args.T + first;
  int32_t room;
  const key_t<A> least = least_key(column, args.n, int32_t(args.C), bins, &room);
  if (value_of(least) < 0) room = 0;  // fewer tokens than C: all of them, and nothing that is none
  int32_t seen = 0, taken = 0;        // tokens of the least score so far, and all that were taken
  for (int64_t base = 0; base < args.n; base += blockDim.x) {
    const int64_t i = base + threadIdx.x;
    const key_t<A> key = i < args.n ? key_of(column[i]) : key_t<A>(0);
    const uint32_t equal = __ballot_sync(kFullWarp, key == least);
    if (lane == 0) bins[warp] = __popc(equal);
    __syncthreads();
    int32_t at = seen + __popc(equal & ((1u << lane) - 1)), whole = seen;
    for (int w = 0; w < kChoiceWarps; ++w) {
      at += w < warp ? bins[w] : 0;
      whole += bins[w];
    }
    seen = whole;
    const bool mine = key > least || (key == least && at < room);
    if (mine) atomicAdd(&args.experts_per_token[first + i], 1);
    if (key == least && at == room - 1) args.last[blockIdx.x] = int32_t(first + i);
    taken += __popc(__ballot_sync(kFullWarp, mine));
    __syncthreads();
  }
  if (lane == 0) atomicAdd(&args.tokens_per_expert[e], taken);
  if (threadIdx.x == 0) {
    static_cast<A*>(args.least)[blockIdx.x] = value_of(least) < 0 ? A(-1) : value_of(least);
    if (room == 0) args.last[blockIdx.x] = -1;
  }
}

template <class A> MOE_KERNEL __launch_bounds__(256) expert_slots_kernel(ExpertChoiceArgs args, ChoiceTile tile) {
  using Key = key_t<A>;
  MOE_SHARED(Key, keys);  // [tile.tokens][tile.stride], 0 where the expert did not take the token
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, E = int(args.E), K = int(args.K);
  for (int64_t first = int64_t(blockIdx.x) * tile.tokens; first < args.T; first += int64_t(gridDim.x) * tile.tokens) {
    const int tokens = int(min(int64_t(tile.tokens), args.T - first));
    for (int at = threadIdx.x; at < E * tile.tokens; at += blockDim.x) {
      const int i = at % tile.tokens, e = at / tile.tokens;
      const int64_t t = first + i;
      if (i >= tokens) continue;
      const int64_t cut = t / args.n * E + e;
      const A score = static_cast<const A*>(args.scores)[int64_t(e) * args.T + t];
      const A least = static_cast<const A*>(args.least)[cut];
      const bool taken = score > least || (score == least && t <= args.last[cut]);
      keys[i * tile.stride + e] = taken ? key_of(score) : Key(0);
    }
    __syncthreads();
    for (int i = warp; i < tokens; i += kChoiceWarps) {
      Key* mine = keys + i * tile.stride;
      A* weights = static_cast<A*>(args.topk_weights) + (first + i) * K;
      int32_t* ids = args.topk_ids + (first + i) * K;
      Best<Key> own = lane_best(mine, E, lane);
      for (int base = 0; base < K; base += kWarp) {
        Best<Key> kept{0, 0};
        for (int k = base; k < min(base + kWarp, K); ++k) {
          if (!__any_sync(kFullWarp, own.key != 0)) break;
          const Best<Key> best = take_best(mine, E, own, lane);
          if (lane == k - base) kept = best;
        }
        if (base + lane < K) {
          weights[base + lane] = kept.key ? value_of(kept.key) : A(0);
          ids[base + lane] = kept.key ? int32_t(kept.at) : -1;
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace moe::cuda

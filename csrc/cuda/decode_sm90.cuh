// SPDX-License-Identifier: Apache-2.0
// decode on the tensor cores of sm_90a: 64 weight rows are the rows of a product (m64), the tokens of an expert its N
// columns, 8 or 32. Weights come by TMA through a ring of stages deep enough to keep the memory busy; the tokens' part
// of a slice of 64 along the sum is copied beside it, zeros past an expert's rows.
//
//   producer    one warpgroup; it runs ahead of the products, over experts too
//   consumers   two warpgroups, every other slice each: the sum is split in one fixed way
//   decode_w13  the two sums are added before the activation
//   decode_w2   four blocks of a cluster split the sum once more. Each adds all eight sums of a quarter of the 64
//               columns of y, in one order, out of the others' shared memory
// What a token gets does not depend on the tokens beside it, only on whether they are more than eight.
#pragma once
#include "decode.cuh"
#include "tensor_map.h"
#include "wgmma_tile.cuh"

namespace moe::cuda {

constexpr int kDecodeCluster = 4, kDecodeConsumers = 2, kDecodeBoxRows = 32;
constexpr int kDecodeColumns = 64 / kDecodeCluster;  // of y that a block adds up

template <int N> struct DecodeWgmma {
  static constexpr int kStages = N == 8 ? 10 : 8, kLag = 3, kThreads = (1 + kDecodeConsumers) * kWarpgroup;
  static constexpr int kStageBytes = kBoxBytes + N * kSliceBytes;
  static constexpr uint32_t kRingBytes = kAtomBytes + kStages * (kStageBytes + 16);
  // Sums of a row: [consumer][64 weight rows]. Four floats between rows keep lanes in different banks.
  static constexpr int kPitch = kDecodeConsumers * 64 + 4;
  using RingOf = Ring<kStages, kStageBytes>;
  using Place = typename RingOf::Place;
  static_assert(kStages > kLag && N % 8 == 0);
};

/// Which 64 rows of a weight: two boxes of 32, behind each other or of gate and up.
struct DecodeRows { int32_t expert, row, second_row, second_half; };

// ---------------------------------------------------------------- the producer

template <int N> struct DecodeFeed {
  using D = DecodeWgmma<N>;
  static constexpr int kChunks = kSliceBytes / 16, kRowsAtOnce = kWarpgroup / kChunks;
  static constexpr int kCopies = (N + kRowsAtOnce - 1) / kRowsAtOnce;
  const typename D::RingOf& ring;
  int thread;
  typename D::Place place = {}, landed = {};
  int flying = 0;  // slices whose copies this thread has not announced

  MOE_DEVICE void land() {
    fence_proxy_async();
    mbarrier_arrive(ring.full(landed));
    landed.next(), --flying;
  }
  MOE_DEVICE void drain() {
    cp_async_wait_group<0>();
    while (flying > 0) land();
  }
  /// Slices first, first + step, ... of a sum of length K; token(row) is where the tokens' row begins.
  template <class F> MOE_DEVICE void pass(const TensorMap& map, const DecodeRows& weights, int64_t K, int first,
                                          int step, int rows, F&& token) {
    const int row = thread / kChunks, chunk = thread % kChunks;
    const unsigned char* from[kCopies];
    bool there[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      there[i] = row + i * kRowsAtOnce < rows;
      from[i] = reinterpret_cast<const unsigned char*>(token(there[i] ? row + i * kRowsAtOnce : 0)) + chunk * 16;
    }
    for (int s = first; int64_t(s) * kSliceElements < K; s += step, place.next()) {
      ring.wait_empty(place);
      const uint32_t stage = ring.stage(place), full = ring.full(place);
      const int32_t k = s * kSliceElements;
      if (thread == 0) {
        mbarrier_arrive_expect_tx(full, kBoxBytes);
        tma_load<4>(stage, &map, {k, weights.row, 0, weights.expert}, full);
        tma_load<4>(stage + kBoxBytes / 2, &map, {k, weights.second_row, weights.second_half, weights.expert}, full);
      }
      const uint32_t to = stage + kBoxBytes + swizzled_chunk(row, chunk);
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        if (row + i * kRowsAtOnce < N)
          cp_async_cg_16(to + i * kRowsAtOnce * kSliceBytes, from[i] + int64_t(s) * kSliceBytes,
                         there[i] && k + chunk * 8 < K ? 16 : 0);
      cp_async_commit_group();
      if (++flying <= D::kLag) continue;
      cp_async_wait_group<D::kLag>();
      land();
    }
  }
};

// ---------------------------------------------------------------- the consumers

/// sum += the products of this consumer's slices, every other one of `slices`.
template <class T, int N>
MOE_DEVICE void decode_multiply(const typename DecodeWgmma<N>::RingOf& ring, typename DecodeWgmma<N>::Place& place,
                                int slices, int consumer, int lane, float (&sum)[N / 2]) {
  const Operand a = operand_at<false>(ring.at), b = operand_at<false>(ring.at + kBoxBytes);
  for (int i = 0; i < slices; ++i, place.next()) {
    if (i % kDecodeConsumers != consumer) continue;
    ring.wait_full(place);
    const Operand weight = ring.in_stage(place, a), token = ring.in_stage(place, b);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSliceElements / kStepElements; ++step)
      wgmma<T, N>(sum, weight.moved(step * kStepBytes<false>).word(), token.moved(step * kStepBytes<false>).word(),
                  true);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    wgmma_fence_operands(sum);
    if (lane == 0) mbarrier_arrive(ring.empty(place));
  }
}

/// Into [row][consumer][weight row]; `warp` of the consumer.
template <int N>
MOE_DEVICE void decode_put(float* parts, const float (&sum)[N / 2], int rows, int consumer, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < rows) parts[row * DecodeWgmma<N>::kPitch + consumer * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8] = sum[i];
  }
}

/// act of 32 units (64 without a gate) of one expert for all its rows. blockIdx.y counts the experts that have rows.
template <class T, int N>
MOE_KERNEL __launch_bounds__(MOE_SM90A ? DecodeWgmma<N>::kThreads : 32, MOE_SM90A ? 2 : 1)
    decode_w13_sm90_kernel(const MOE_GRID_CONSTANT TensorMap map, ExpertMlp p, RowsEpilogue epilogue) {
#if MOE_SM90A
  using D = DecodeWgmma<N>;
  MOE_SHARED(unsigned char, memory);
  const typename D::RingOf ring(cvta_to_shared(memory));
  auto* const parts = reinterpret_cast<float*>(memory + D::kRingBytes);
  const int lane = int(threadIdx.x) % kWarp, warp = __shfl_sync(kFullWarp, int(threadIdx.x) / kWarp, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&map);
    ring.start(kWarpgroup + 1, 4);
    fence_mbarrier_init();
  }
  __syncthreads();
  griddepcontrol_wait();  // blocks without work too: what comes after decode_w2 may count on it
  griddepcontrol_launch_dependents();
  const ActiveExpert active = active_expert(p.expert_offsets + 1, p.E, p.T * p.K, int(blockIdx.y));
  if (active.expert < 0) return;
  const int units = p.gated ? 32 : 64, slices = int((p.H + kSliceElements - 1) / kSliceElements);
  const int64_t first = int64_t(blockIdx.x) * units;
  if (warp < 4) {
    const bool halves = p.gated && !p.interleaved;
    const int32_t row = int32_t(first) * (p.gated && p.interleaved ? 2 : 1);
    const DecodeRows weights{active.expert, row, halves ? row : row + kDecodeBoxRows, halves};
    DecodeFeed<N> feed{ring, int(threadIdx.x)};
    for (int32_t r0 = active.begin; r0 < active.end; r0 += N)
      feed.pass(map, weights, p.H, 0, 1, min(N, active.end - r0),
                [&](int row) { return static_cast<const T*>(p.x) + p.row_to_slot[r0 + row] / p.K * p.x_stride; });
    feed.drain();
    return;
  }
  typename D::Place place;
  const int consumer = warp / 4 - 1, thread = int(threadIdx.x) - kWarpgroup;
  constexpr int threads = kDecodeConsumers * kWarpgroup;
  for (int32_t r0 = active.begin; r0 < active.end; r0 += N) {
    const int rows = min(N, active.end - r0);
    float sum[N / 2] = {};
    decode_multiply<T, N>(ring, place, slices, consumer, lane, sum);
    decode_put<N>(parts, sum, rows, consumer, warp % 4, lane);
    bar_sync(1, threads);
    for (int i = thread; i < rows * units; i += threads) {
      const int row = i / units, unit = i % units;
      if (first + unit >= p.I) continue;
      const float* of_row = parts + row * D::kPitch;
      const auto get = [&](int weight_row) { return of_row[weight_row] + of_row[64 + weight_row]; };
      const bool pairs = p.gated && p.interleaved;
      float gate[1] = {get(pairs ? 2 * unit : unit)}, up[1] = {};
      if (p.gated) up[0] = get(pairs ? 2 * unit + 1 : 32 + unit);
      const EpilogueRow<float> at = epilogue_row<float>(epilogue, r0 + row, active.expert);
      finish_activation<T, 1>(epilogue, at, p.I, first + unit, gate, up);
    }
    bar_sync(1, threads);
  }
#endif
}

/// What a block of decode_w2 keeps behind its ring and two buffers of parts; offsets in bytes from there.
struct DecodeClusterLayout { uint32_t count, sums, bytes; };

/// y[:, 64 columns], a cluster: its blocks take every fourth slice each, of every expert.
template <class T, int N>
MOE_KERNEL __launch_bounds__(MOE_SM90A ? DecodeWgmma<N>::kThreads : 32, 1)
    decode_w2_sm90_kernel(const MOE_GRID_CONSTANT TensorMap map, ExpertMlp p, DecodeClusterLayout layout, const T* act,
                          T* y) {
#if MOE_SM90A
  using D = DecodeWgmma<N>;
  constexpr int buffer_floats = kDecodeTokens * D::kPitch, threads = kDecodeConsumers * kWarpgroup;
  MOE_SHARED(unsigned char, memory);
  const typename D::RingOf ring(cvta_to_shared(memory));
  auto* const parts = reinterpret_cast<float*>(memory + D::kRingBytes);
  unsigned char* const kept = memory + D::kRingBytes + 2 * buffer_floats * 4;
  auto* const list = reinterpret_cast<ActiveExpert*>(kept);
  auto* const count = reinterpret_cast<int*>(kept + layout.count);
  auto* const sums = reinterpret_cast<float*>(kept + layout.sums);
  const int lane = int(threadIdx.x) % kWarp, warp = __shfl_sync(kFullWarp, int(threadIdx.x) / kWarp, 0);
  const int rank = int(cluster_ctarank());
  const int64_t h0 = int64_t(blockIdx.x / kDecodeCluster) * 64, own = h0 + rank * kDecodeColumns, S = p.T * p.K;
  for (int64_t i = threadIdx.x; i < S * kDecodeColumns; i += blockDim.x) sums[i] = 0;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&map);
    ring.start(kWarpgroup + 1, 4);
    fence_mbarrier_init();
  }
  griddepcontrol_wait();
  if (warp == 0) {
    const int found = active_experts(p.expert_offsets + 1, p.E, S, list);
    if (lane == 0) *count = found;
  }
  __syncthreads();

  const int all = int((p.I + kSliceElements - 1) / kSliceElements);
  // Passes of all experts, and where the rows gathered so far are added up: before they are more than kDecodeTokens.
  const auto walk = [&](auto&& pass, auto&& flush) {
    int32_t base = 0;
    for (int a = 0; a < *count; ++a)
      for (int32_t r0 = list[a].begin; r0 < list[a].end; r0 += N) {
        const int rows = min(N, list[a].end - r0);
        if (r0 + rows - base > kDecodeTokens) flush(base, r0), base = r0;
        pass(list[a].expert, r0, rows, base);
      }
    if (*count > 0) flush(base, list[*count - 1].end);
  };
  if (warp < 4) {
    DecodeFeed<N> feed{ring, int(threadIdx.x)};
    bool arrived = false;
    walk(
        [&](int32_t expert, int32_t r0, int rows, int32_t) {
          const DecodeRows weights{expert, int32_t(h0), int32_t(h0) + kDecodeBoxRows, 0};
          feed.pass(map, weights, p.I, rank, kDecodeCluster, rows, [&](int row) { return act + (r0 + row) * p.I; });
        },
        [&](int32_t, int32_t) {  // the consumers' barrier; this warpgroup has nothing to say and goes on meanwhile
          feed.drain();
          if (arrived) cluster_wait();
          cluster_arrive();
          arrived = true;
        });
    if (arrived) cluster_wait();
  } else {
    typename D::Place place;
    const int consumer = warp / 4 - 1, thread = int(threadIdx.x) - kWarpgroup;
    const int slices = all > rank ? (all - rank + kDecodeCluster - 1) / kDecodeCluster : 0;
    int buffer = 0;
    walk(
        [&](int32_t, int32_t r0, int rows, int32_t base) {
          float sum[N / 2] = {};
          decode_multiply<T, N>(ring, place, slices, consumer, lane, sum);
          decode_put<N>(parts + buffer * buffer_floats + (r0 - base) * D::kPitch, sum, rows, consumer, warp % 4, lane);
        },
        [&](int32_t base, int32_t end) {
          cluster_arrive(), cluster_wait();
          const uint32_t at = cvta_to_shared(parts) + uint32_t(buffer * buffer_floats) * 4;
          for (int i = thread; i < (end - base) * kDecodeColumns; i += threads) {
            const int row = i / kDecodeColumns, column = i % kDecodeColumns;
            if (own + column >= p.H) continue;
            float sum = 0;
#pragma unroll
            for (int part = 0; part < kDecodeCluster * kDecodeConsumers; ++part) {
              const int place_of = row * D::kPitch + part % 2 * 64 + rank * kDecodeColumns + column;
              sum += __uint_as_float(ld_shared_cluster(mapa(at + place_of * 4, uint32_t(part / 2))));
            }
            int e = 0;  // of this row: the list is short
            while (list[e].end <= base + row) ++e;
            const int32_t slot = p.row_to_slot[base + row];
            sums[slot * kDecodeColumns + column] = weighted_sum<T>(p, slot, list[e].expert, own + column, sum);
          }
          buffer ^= 1;  // the other one was read before all came to this barrier
        });
  }
  cluster_arrive(), cluster_wait();  // nobody ends while its shared memory is read
  combine<T>(p, sums, kDecodeColumns, own, y);
#endif
}

}  // namespace moe::cuda

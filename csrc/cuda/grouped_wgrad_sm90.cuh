// SPDX-License-Identifier: Apache-2.0
// grouped_wgrad on the tensor cores of sm_90a. Blocks stay and go round the tiles of all experts: 128 x kColumns
// elements of one expert's gradient, summed over the expert's rows from the first to the last, 64 rows a slice. Both
// sides lie as tokens come, a row a token, which is how wgmma reads operands across the sum: nothing is turned.
//
//   producer    one warpgroup. A side whose rows lie one after another comes by TMA, a box of 64 rows and 64 columns; a
//               gathered one by cp.async of all threads. The last slice of an expert is copied by the threads on both
//               sides, whatever the side, with zeros past the expert's end: 0 times a neighbour's NaN would be NaN
//   consumers   two warpgroups, each 64 of the tile's 128 rows
//
// A thread's copies have landed kLag slices later; then wgmma may see them, and the thread arrives at the slice's
// barrier.
#pragma once
#include "element.cuh"
#include "expert_rows.cuh"
#include "grouped_wgrad.h"
#include "tensor_map.h"
#include "wgmma_tile.cuh"

namespace moe::cuda {

template <int kColumns> struct WgradWgmma {
  static constexpr int kRows = 128, kStages = kColumns == 256 ? 4 : 6, kThreads = 3 * kWarpgroup;
  static constexpr int kLag = 2;  // slices that fly while the producer starts the next one
  static constexpr int kRowBoxes = kRows / 64, kColumnBoxes = kColumns / 64;
  static constexpr int kStageBytes = (kRowBoxes + kColumnBoxes) * kBoxBytes;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static constexpr uint32_t kBytes = kAtomBytes + kStages * (kStageBytes + 16);
  using RingOf = Ring<kStages, kStageBytes>;
  using Place = typename RingOf::Place;
  static_assert(kStages > kLag && kBytes <= 227 * 1024);
};

/// What the host adds to the arguments. A side that is gathered has no map.
struct WgradPlan {
  Quotient n_token, k_token;
  uint32_t n_tiles, k_tiles, tiles;
};
struct WgradMaps { TensorMap n, k; };

struct WgradWgmmaTile {
  int64_t expert, n, k;
  RowRange rows;
  int slices;
};
template <int kColumns>
MOE_DEVICE WgradWgmmaTile wgrad_tile(const GroupedWgradArgs& args, const WgradPlan& plan, uint32_t index) {
  const uint32_t of_expert = plan.n_tiles * plan.k_tiles, e = index / of_expert, in = index % of_expert;
  const RowRange rows = rows_of(args.ends, e, args.S);
  return {int64_t(e), int64_t(in / plan.k_tiles) * WgradWgmma<kColumns>::kRows, int64_t(in % plan.k_tiles) * kColumns,
          rows, (rows.end - rows.begin + kSliceElements - 1) / kSliceElements};
}

/// One side in the producer. A thread copies one chunk of four rows, 16 apart, of every box.
template <int kBoxes> struct WgradWgmmaSide {
  static constexpr int kChunks = kSliceBytes / 16, kRowsAtOnce = kWarpgroup / kChunks;
  static constexpr int kCopies = kSliceElements / kRowsAtOnce;
  const unsigned char* column;
  uint32_t there;         // a bit a box: this thread's chunk is part of the side; others are zeros
  int32_t rows[kCopies];  // of the next slice that is copied: what gather says, -1 past the end

  MOE_DEVICE void start(const WgradSide& side, int64_t first, int64_t width, int thread) {
    const int64_t at = first + thread % kChunks * 8;
    there = 0;
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) there |= uint32_t(at + box * 64 < width) << box;
    column = static_cast<const unsigned char*>(side.data) + at * 2;
  }
  MOE_DEVICE void look_up(const int32_t* gather, int32_t r, int32_t end, int thread) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int32_t row = r + thread / kChunks + i * kRowsAtOnce;
      rows[i] = row >= end ? -1 : gather ? __ldg(gather + row) : row;
    }
  }
  MOE_DEVICE void copy(uint32_t to, uint32_t stride, Quotient token, int thread) const {
    to += swizzled_chunk(thread / kChunks, thread % kChunks);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const unsigned char* from = column + uint64_t(token(max(rows[i], 0))) * stride;
#pragma unroll
      for (int box = 0; box < kBoxes; ++box)
        cp_async_cg_16(to + box * kBoxBytes + i * kRowsAtOnce * kSliceBytes, from + box * kSliceBytes,
                       rows[i] >= 0 && there >> box & 1 ? 16 : 0);
    }
  }
};

/// The boxes of a side by its map; one thread.
template <int kBoxes>
MOE_DEVICE void copy_boxes(uint32_t to, const TensorMap& map, int64_t first, int32_t row, uint32_t full) {
#pragma unroll
  for (int box = 0; box < kBoxes; ++box)
    tma_load<2>(to + box * kBoxBytes, &map, {int32_t(first) + box * 64, row}, full);
}

template <int kColumns> MOE_DEVICE void wgrad_produce(const GroupedWgradArgs& args, const WgradPlan& plan,
                                                      const WgradMaps& maps,
                                                      const typename WgradWgmma<kColumns>::RingOf& ring, int thread) {
  using W = WgradWgmma<kColumns>;
  const bool n_mapped = !args.n_side.gather, k_mapped = !args.k_side.gather;
  const uint32_t n_stride = uint32_t(args.n_side.row_stride * 2), k_stride = uint32_t(args.k_side.row_stride * 2);
  typename W::Place place, landed;
  uint32_t copied = 0;  // a bit a slice, the last one lowest: threads copy, and have not arrived yet
  int started = 0;      // slices, up to kLag
  const auto land = [&](int slices_ago) {
    if (copied >> slices_ago & 1) fence_proxy_async(), mbarrier_arrive(ring.full(landed));
    landed.next();
  };
  for (uint32_t index = blockIdx.x; index < plan.tiles; index += gridDim.x) {
    const WgradWgmmaTile tile = wgrad_tile<kColumns>(args, plan, index);
    WgradWgmmaSide<W::kRowBoxes> n_side;
    WgradWgmmaSide<W::kColumnBoxes> k_side;
    n_side.start(args.n_side, tile.n, args.N, thread), k_side.start(args.k_side, tile.k, args.K, thread);
    const auto look_up = [&](int slice) {
      const int32_t r = tile.rows.begin + slice * kSliceElements;
      n_side.look_up(args.n_side.gather, r, tile.rows.end, thread);
      k_side.look_up(args.k_side.gather, r, tile.rows.end, thread);
    };
    look_up(0);
    for (int s = 0; s < tile.slices; ++s, place.next()) {
      const bool last = s == tile.slices - 1, n_map = n_mapped && !last, k_map = k_mapped && !last;
      const int32_t row = tile.rows.begin + s * kSliceElements;
      const uint32_t n_at = ring.stage(place), k_at = n_at + W::kRowBoxes * kBoxBytes, full = ring.full(place);
      ring.wait_empty(place);
      if (thread == 0) {
        mbarrier_arrive_expect_tx(full,
                                  (n_map ? W::kRowBoxes * kBoxBytes : 0) + (k_map ? W::kColumnBoxes * kBoxBytes : 0));
        if (n_map) copy_boxes<W::kRowBoxes>(n_at, maps.n, tile.n, row, full);
        if (k_map) copy_boxes<W::kColumnBoxes>(k_at, maps.k, tile.k, row, full);
      }
      if (!n_map) n_side.copy(n_at, n_stride, plan.n_token, thread);
      if (!k_map) k_side.copy(k_at, k_stride, plan.k_token, thread);
      cp_async_commit_group();
      copied = copied << 1 | uint32_t(!n_map || !k_map);
      if (n_map && k_map) mbarrier_arrive(full);
      look_up(s + 1);
      if (started < W::kLag) {
        ++started;
        continue;
      }
      cp_async_wait_group<W::kLag>();
      land(W::kLag);
    }
  }
  cp_async_wait_group<0>();
  for (; started > 0; --started) land(started - 1);
}

/// The sums of one tile's 64 rows. While the products of a slice run, those of the slice before end and its stage is
/// released.
template <class T, int kColumns>
MOE_DEVICE void wgrad_multiply(const typename WgradWgmma<kColumns>::RingOf& ring,
                               typename WgradWgmma<kColumns>::Place& place, int slices, int consumer, int lane,
                               float (&sum)[kColumns / 2]) {
  using W = WgradWgmma<kColumns>;
  const Operand a = operand_at<true>(ring.at + consumer * kBoxBytes);
  const Operand b = operand_at<true>(ring.at + W::kRowBoxes * kBoxBytes);
  typename W::Place before;
  for (int s = 0; s < slices; ++s) {
    ring.wait_full(place);
    const Operand left = ring.in_stage(place, a), right = ring.in_stage(place, b);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSliceElements / kStepElements; ++step)
      wgmma<T, kColumns, 1, 1>(sum, left.moved(step * kStepBytes<true>).word(),
                               right.moved(step * kStepBytes<true>).word(), s > 0 || step > 0);
    wgmma_commit_group();
    if (s > 0) {
      wgmma_wait_group<1>();
      if (lane == 0) mbarrier_arrive(ring.empty(before));
    }
    before = place;
    place.next();
  }
  wgmma_wait_group<0>();
  wgmma_fence_operands(sum);
  if (slices > 0 && lane == 0) mbarrier_arrive(ring.empty(before));
}

/// A warp writes its 16 rows: four lanes have 32 neighbouring columns of a row, eight each.
template <class O, int kColumns>
MOE_DEVICE void wgrad_store(const GroupedWgradArgs& args, const WgradWgmmaTile& tile, int64_t n, int lane,
                            const float (&sum)[kColumns / 2]) {
  O* const out = static_cast<O*>(args.out) + tile.expert * args.out_expert;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = n + lane / 4 + half * 8;
#pragma unroll
    for (int group = 0; group < kColumns / 32; ++group) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = tile.slices > 0 ? sum[(group * 4 + i / 2) * 4 + half * 2 + i % 2] : 0.f;
      exchange(v, lane);
      const int64_t k = tile.k + group * 32 + lane % 4 * 8;
#pragma unroll
      for (int part = 0; part < 8; part += kVector<O>) {
        if (row >= args.N || k + part >= args.K) continue;
        O* const to = out + row * args.out_row + k + part;
        Elements<O, kVector<O>> value;
#pragma unroll
        for (int i = 0; i < kVector<O>; ++i) value.v[i] = v[part + i];
        if (args.accumulate) {
          const Elements<O, kVector<O>> before = load_again<kVector<O>>(to);
#pragma unroll
          for (int i = 0; i < kVector<O>; ++i) value.v[i] += before.v[i];
        }
        store(to, value);
      }
    }
  }
}

/// out_col is 1, parts at most 1.
template <class T, int kColumns>
MOE_KERNEL __launch_bounds__(MOE_SM90A ? WgradWgmma<kColumns>::kThreads : 32, 1)
    grouped_wgrad_sm90_kernel(const MOE_GRID_CONSTANT WgradMaps maps, const MOE_GRID_CONSTANT GroupedWgradArgs args,
                              WgradPlan plan) {
#if MOE_SM90A
  using W = WgradWgmma<kColumns>;
  MOE_SHARED(unsigned char, memory);
  const typename W::RingOf ring(cvta_to_shared(memory));
  const int lane = int(threadIdx.x) % kWarp, warp = __shfl_sync(kFullWarp, int(threadIdx.x) / kWarp, 0);
  if (threadIdx.x == 0) {
    ring.start(kWarpgroup + 1, 8);
    fence_mbarrier_init();
    if (!args.n_side.gather) prefetch_tensor_map(&maps.n);
    if (!args.k_side.gather) prefetch_tensor_map(&maps.k);
  }
  __syncthreads();
  if (warp < 4) {
    setmaxnreg_dec<W::kProducerRegisters>();
    wgrad_produce<kColumns>(args, plan, maps, ring, int(threadIdx.x));
    return;
  }
  setmaxnreg_inc<W::kConsumerRegisters>();
  typename W::Place place;
  const int consumer = warp / 4 - 1;
  for (uint32_t index = blockIdx.x; index < plan.tiles; index += gridDim.x) {
    const WgradWgmmaTile tile = wgrad_tile<kColumns>(args, plan, index);
    if (args.accumulate && tile.slices == 0) continue;
    float sum[kColumns / 2];
    wgrad_multiply<T, kColumns>(ring, place, tile.slices, consumer, lane, sum);
    const int64_t n = tile.n + consumer * 64 + warp % 4 * 16;
    if (args.out_dtype == DType::f32) wgrad_store<float, kColumns>(args, tile, n, lane, sum);
    else wgrad_store<T, kColumns>(args, tile, n, lane, sum);
  }
#endif
}

}  // namespace moe::cuda

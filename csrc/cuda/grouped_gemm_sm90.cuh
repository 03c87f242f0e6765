// SPDX-License-Identifier: Apache-2.0
// A grouped product on the tensor cores of sm_90a. Blocks stay: each goes round the tiles of D. One warpgroup, the
// producer, fills a ring of stages in shared memory; two others, the consumers, multiply what is there.
//
//   find_tile     which expert, rows and columns (tile_scheduler.cuh); every warp finds its tiles itself
//   Producer      b by TMA, an expert is a coordinate of its map; a by TMA, or gathered by cp.async of all its threads
//   multiply      wgmma from shared memory, 64 rows by all columns of the tile at a time; both consumers half of the
//                 rows of one tile (cooperative), or every other tile each, one finishing while the other multiplies
//                 (ping-pong)
//   finish_tile   neighbouring threads exchange their sums so that each has neighbouring columns of one row, gate and
//                 up of a unit among them (grouped_epilogue.cuh)
//
// Where a block is one of two of a cluster, both have the same expert and columns, each loads half of b for both, and a
// stage is empty once the consumers of both have read it.
// A tile may reach into the next expert's rows: they are multiplied, and not stored.
#pragma once
#include "grouped_epilogue.cuh"
#include "grouped_gemm_config.h"
#include "tensor_map.h"
#include "tile_scheduler.cuh"
#include "wgmma_tile.cuh"

namespace moe::cuda {

/// Everything about a kernel that its table row, its element type and its form decide.
template <class T_, int kRow, bool kGather_, bool kAcross_> struct WgmmaTile {
  using T = T_;
  static constexpr TileRow row = kTileRows[kRow];
  static constexpr bool gather = kGather_, across = kAcross_;  // rows of a by their slots; b across the sum
  static constexpr int rows = row.rows, columns = row.columns, stages = row.stages, cluster = row.cluster;
  static constexpr int threads = row.threads(), a_bytes = rows * kSliceBytes, b_bytes = columns * kSliceBytes;
  static constexpr int producer_registers = gather ? 56 : 40, consumer_registers = gather ? 224 : 232;
  static constexpr int lag = 2;  // slices of a that fly while the producer starts the next one
  using RingOf = Ring<stages, a_bytes + b_bytes>;
  using Place = typename RingOf::Place;
  static_assert(stages >= lag + 1 && rows == (row.ping_pong ? 64 : 128) && row.slice == kSliceBytes);
};
template <class S> using TileSums = float[S::columns / 2];  // 64 rows of a consumer

/// The two tensor maps of a product; a's is not read where rows are gathered.
struct RowsMaps { TensorMap a, b; };

/// Gate and up rows of w13 come as two halves of a tile of b.
MOE_BOTH bool in_halves(const RowsEpilogue& p) { return p.kind == Epilogue::activation && p.gated && !p.interleaved; }

/// The tiles of this block in order; the blocks of a cluster have neighbouring rows.
template <class S> struct TileWalk {
  const GroupedRows& g;
  uint32_t column_tiles, index, step;
  int64_t row_in_cluster;
  TileSearch search;

  MOE_DEVICE TileWalk(const GroupedRows& g, uint32_t column_tiles, uint32_t first, uint32_t every)
      : g(g),
        column_tiles(column_tiles),
        index(blockIdx.x / S::cluster + first * (gridDim.x / S::cluster)),
        step(every * (gridDim.x / S::cluster)),
        row_in_cluster(S::cluster > 1 ? cluster_ctarank() * S::rows : 0) {}

  MOE_DEVICE OutputTile next() {
    OutputTile tile = find_tile<S::rows * S::cluster>(g.ends, g.E, g.S, column_tiles, index, search);
    tile.row += row_in_cluster;
    index += step;
    return tile;
  }
};

// ---------------------------------------------------------------- the producer

/// What a thread copies of gathered rows: one chunk of every 16th row of the tile.
template <class S> struct GatherCopies {
  static constexpr int chunks = kSliceBytes / 16, step = kWarpgroup / chunks, count = S::rows / step;
  const unsigned char* from[count];
  uint32_t rows;  // a bit each: there is such a row; others are zeros
  uint32_t to;    // of the first
  int left;       // bytes from this chunk to the end of the sum

  MOE_DEVICE void start(const GroupedRows& g, const OutputTile& tile, int thread) {
    const int first = thread / chunks, chunk = thread % chunks;
    const int64_t bytes = g.a_stride * int64_t(sizeof(typename S::T));
    const auto* const base = static_cast<const unsigned char*>(g.a) + chunk * 16;
    to = swizzled_chunk(first, chunk), rows = 0;
    left = int(g.K * int64_t(sizeof(typename S::T))) - chunk * 16;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int64_t r = tile.row + first + i * step;
      const int32_t slot = r < tile.end ? g.gather[r] : -1;
      rows |= uint32_t(slot >= 0) << i;
      from[i] = base + max(slot, 0) / int32_t(g.per_token) * bytes;
    }
  }
  MOE_DEVICE void copy(uint32_t stage) {
    const uint32_t there = left > 0 ? rows : 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      cp_async_cg_16(stage + to + uint32_t(i * step * kSliceBytes), from[i], there >> i & 1 ? 16 : 0);
      from[i] += kSliceBytes;
    }
    left -= kSliceBytes;
  }
};

/// Copies of b, and of a unless it is gathered, by TMA; one thread.
template <class S> struct MapCopies {
  const RowsMaps& maps;
  int32_t k, a_row, a_expert, expert, column[2], half[2];  // where the two halves of the tile of b begin

  MOE_DEVICE void start(const GroupedRows& g, const OutputTile& tile) {
    const bool halves = in_halves(g.epilogue);
    const int32_t first = tile.column_tile * (halves ? S::columns / 2 : S::columns);
    k = 0, expert = tile.expert;
    a_row = int32_t(g.ends ? tile.row : tile.row - tile.expert_row), a_expert = g.ends ? 0 : tile.expert;
#pragma unroll
    for (int i = 0; i < 2; ++i) column[i] = halves ? first : first + i * S::columns / 2, half[i] = halves ? i : 0;
  }
  MOE_DEVICE void copy(uint32_t stage, uint32_t full) {
    mbarrier_arrive_expect_tx(full, (S::gather ? 0 : S::a_bytes) + S::b_bytes);
    if constexpr (!S::gather) tma_load<3>(stage, &maps.a, {k, a_row, a_expert}, full);
    const uint32_t b = stage + S::a_bytes;
    if constexpr (S::cluster > 1) {
      const uint32_t own = cluster_ctarank();
      copy_half(b + own * (S::b_bytes / 2), own ? column[1] : column[0], own ? half[1] : half[0], full);
    } else {
      copy_half(b, column[0], half[0], full);
      copy_half(b + S::b_bytes / 2, column[1], half[1], full);
    }
    k += kSliceElements;
  }

 private:
  MOE_DEVICE void copy_half(uint32_t to, int32_t n, int32_t which, uint32_t full) const {
    if constexpr (S::across) {
#pragma unroll
      for (int i = 0; i < S::columns / 128; ++i) load(to + i * kBoxBytes, {n + i * 64, which, k, expert}, full);
    } else {
      load(to, {k, n, which, expert}, full);
    }
  }
  MOE_DEVICE void load(uint32_t to, const int32_t (&at)[4], uint32_t full) const {
    if constexpr (S::cluster > 1) tma_load_multicast<4>(to, &maps.b, at, full, uint16_t((1 << S::cluster) - 1));
    else tma_load<4>(to, &maps.b, at, full);
  }
};

/// One warp, of which one thread copies everything.
template <class S> MOE_DEVICE void produce_by_maps(const GroupedRows& g, const RowsMaps& maps,
                                                   const typename S::RingOf& ring, uint32_t column_tiles, int slices) {
  TileWalk<S> walk(g, column_tiles, 0, 1);
  typename S::Place place;
  const bool elected = elect_sync(kFullWarp);
  for (OutputTile tile = walk.next(); tile.expert >= 0; tile = walk.next()) {
    MapCopies<S> copies{maps};
    copies.start(g, tile);
    for (int s = 0; s < slices; ++s, place.next()) {
      if (!elected) continue;
      ring.wait_empty(place);
      copies.copy(ring.stage(place), ring.full(place));
    }
    __syncwarp();
  }
}

/// All four warps copy rows of a; one thread of them copies b. A thread's copies of a slice have landed `lag` slices
/// later: then wgmma may see them, and the thread arrives.
template <class S> MOE_DEVICE void produce_gathered(const GroupedRows& g, const RowsMaps& maps,
                                                    const typename S::RingOf& ring, uint32_t column_tiles, int slices,
                                                    int thread) {
  TileWalk<S> walk(g, column_tiles, 0, 1);
  typename S::Place place, landed;
  int flying = 0;
  const auto land = [&] {
    fence_proxy_async();
    mbarrier_arrive(ring.full(landed));
    landed.next();
  };
  for (OutputTile tile = walk.next(); tile.expert >= 0; tile = walk.next()) {
    MapCopies<S> of_b{maps};
    of_b.start(g, tile);
    GatherCopies<S> of_a;
    of_a.start(g, tile, thread);
    for (int s = 0; s < slices; ++s, place.next()) {
      ring.wait_empty(place);
      if (thread == 0) of_b.copy(ring.stage(place), ring.full(place));
      of_a.copy(ring.stage(place));
      cp_async_commit_group();
      if (flying < S::lag) {
        ++flying;
        continue;
      }
      cp_async_wait_group<S::lag>();
      land();
    }
  }
  cp_async_wait_group<0>();
  for (; flying > 0; --flying) land();
}

// ---------------------------------------------------------------- the consumers

/// A warp says that it has read a stage, to the producers that write to it.
template <class S> MOE_DEVICE void release(const typename S::RingOf& ring, const typename S::Place& place, int lane) {
  if constexpr (S::cluster > 1) {
    if (lane < S::cluster) mbarrier_arrive_remote(ring.empty(place), uint32_t(lane));
  } else {
    if (lane == 0) mbarrier_arrive(ring.empty(place));
  }
}

/// The products of one slice, queued.
template <class S> MOE_DEVICE void multiply_slice(const Operand& a, const Operand& b, bool accumulate,
                                                  TileSums<S>& sum) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSliceElements / kStepElements; ++step)
    wgmma<typename S::T, S::columns, 0, S::across>(sum, a.moved(step * kStepBytes<false>).word(),
                                                   b.moved(step * kStepBytes<S::across>).word(),
                                                   accumulate || step > 0);
  wgmma_commit_group();
}

/// Queues the products of one tile. While those of a slice run, those of the slice before end and its stage is
/// released.
template <class S> MOE_DEVICE void multiply(const typename S::RingOf& ring, typename S::Place& place, int slices,
                                            int first, int lane, TileSums<S>& sum) {
  const Operand a = operand_at<false>(ring.at + uint32_t(first * kSliceBytes));
  const Operand b = operand_at<S::across>(ring.at + S::a_bytes);
  ring.wait_full(place);
  multiply_slice<S>(ring.in_stage(place, a), ring.in_stage(place, b), false, sum);
  for (int s = 1; s < slices; ++s) {
    const typename S::Place before = place;
    place.next();
    ring.wait_full(place);
    multiply_slice<S>(ring.in_stage(place, a), ring.in_stage(place, b), true, sum);
    wgmma_wait_group<1>();
    release<S>(ring, before, lane);
  }
}
/// The sums of the tile are there.
template <class S> MOE_DEVICE void end_products(const typename S::RingOf& ring, typename S::Place& place, int lane,
                                                TileSums<S>& sum) {
  wgmma_wait_group<0>();
  wgmma_fence_operands(sum);
  release<S>(ring, place, lane);
  place.next();
}

/// Whose turn it is to multiply where tiles alternate between two consumers. A consumer that went ahead would take the
/// stages of the other's tile, a round before its own, for its own: a barrier tells odd rounds from even ones only.
struct Alternation {
  uint32_t at;  // a barrier each
  MOE_DEVICE void start() const {
    mbarrier_init(at, 4);
    mbarrier_init(at + 8, 4);
  }
  /// Before a consumer's tile, counted from 0: until the other has queued its one before. Nothing is before the first.
  MOE_DEVICE void wait(int consumer, uint32_t tile) const {
    mbarrier_wait_parity(at + consumer * 8, (tile + 1 + consumer) % 2);
  }
  MOE_DEVICE void pass(int consumer, int lane) const {
    if (lane == 0) mbarrier_arrive(at + (1 - consumer) * 8);
  }
};

/// Eight neighbouring columns of a row for each lane: of group `group` of 32 columns, of row set `set`, 8 rows of a
/// warp.
template <class S> MOE_DEVICE void take(const TileSums<S>& sum, int set, int group, int lane, float (&v)[8]) {
  constexpr int groups = S::columns / 32;
  // Registers have no index: one of these copies happens, and the fence keeps the compiler from making one of them.
#pragma unroll
  for (int x = 0; x < 2 * groups; ++x) {
    if (x == set * groups + group) {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = sum[(x % groups * 4 + i / 2) * 4 + x / groups * 2 + i % 2];
      wgmma_fence_operands(v);
    }
  }
  exchange(v, lane);
}

/// The sums of a warp to where they belong. first_row: of its sixteen.
template <class S> MOE_DEVICE void finish_tile(const GroupedRows& g, const OutputTile& tile, int64_t first_row,
                                               int lane, const TileSums<S>& sum) {
  using T = typename S::T;
  const RowsEpilogue& p = g.epilogue;
  const bool paired = p.kind == Epilogue::activation && p.gated, halves = in_halves(p);
  const int64_t limit = paired ? g.N / 2 : g.N;           // columns, or units of w13
  const int own = paired && p.interleaved ? 4 : 8;        // of a lane
  const int groups = S::columns / 32 / (halves ? 2 : 1);  // four lanes' of a row
  const int64_t column = int64_t(tile.column_tile) * (S::columns / (paired ? 2 : 1)) + lane % 4 * own;
#pragma unroll 1
  for (int set = 0; set < 2; ++set) {
    const int64_t begin = first_row + set * 8, r = begin + lane / 4;
    if (begin >= tile.end) continue;
    const bool there = r < tile.end;
    const EpilogueRow<float> row = epilogue_row<float>(p, there ? r : begin, tile.expert);
    float share = 0;
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      float v[8], up[8];
      take<S>(sum, set, group, lane, v);
      if (halves) take<S>(sum, set, group + S::columns / 64, lane, up);
      const int64_t n = column + group * 4 * own;
      if (!there || n >= limit) continue;
      if (p.kind == Epilogue::plain) {
        finish_plain<T, 8>(p, row, g.N, n, v);
      } else if (p.kind == Epilogue::activation_backward) {
        float low[4] = {v[0], v[1], v[2], v[3]}, high[4] = {v[4], v[5], v[6], v[7]};  // eight take too many registers
        share += finish_backward<T, 4>(p, row, limit, n, low);
        if (n + 4 < limit) share += finish_backward<T, 4>(p, row, limit, n + 4, high);
      } else if (own == 8) {
        finish_activation<T, 8>(p, row, limit, n, v, up);
      } else {
        float gate[4], linear[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) gate[i] = v[2 * i], linear[i] = v[2 * i + 1];
        finish_activation<T, 4>(p, row, limit, n, gate, linear);
      }
    }
    if (p.kind != Epilogue::activation_backward || !p.weight_parts) continue;
    share += __shfl_xor_sync(kFullWarp, share, 1);
    share += __shfl_xor_sync(kFullWarp, share, 2);
    if (there && lane % 4 == 0) static_cast<float*>(p.weight_parts)[tile.column_tile * g.S + r] = share;
  }
}

/// Consumer 0 or 1: multiplies and finishes.
template <class S> MOE_DEVICE void consume(const GroupedRows& g, const typename S::RingOf& ring, uint32_t column_tiles,
                                           int slices, int consumer, int warp, int lane) {
  constexpr bool ping_pong = S::row.ping_pong;
  const Alternation turns{ring.end()};
  const int first = ping_pong ? 0 : consumer * 64;  // of this consumer's rows in the tile
  TileWalk<S> walk(g, column_tiles, ping_pong ? consumer : 0, ping_pong ? 2 : 1);
  typename S::Place place;
  uint32_t count = 0;
  for (OutputTile tile = walk.next(); tile.expert >= 0; tile = walk.next(), ++count) {
    TileSums<S> sum;
    if constexpr (ping_pong) {
      place = S::Place::after((2 * count + uint32_t(consumer)) * uint32_t(slices));
      turns.wait(consumer, count);
    }
    multiply<S>(ring, place, slices, first, lane, sum);
    if constexpr (ping_pong) turns.pass(consumer, lane);
    end_products<S>(ring, place, lane, sum);
    finish_tile<S>(g, tile, tile.row + first + warp % 4 * 16, lane, sum);
  }
}

template <class T, int kRow, bool kGather, bool kAcross>
MOE_KERNEL __launch_bounds__(MOE_SM90A ? kTileRows[kRow].threads() : 32, 1)
    grouped_rows_sm90_kernel(const MOE_GRID_CONSTANT RowsMaps maps, const MOE_GRID_CONSTANT GroupedRows g,
                             uint32_t column_tiles) {
#if MOE_SM90A
  using S = WgmmaTile<T, kRow, kGather, kAcross>;
  MOE_SHARED(unsigned char, memory);
  const typename S::RingOf ring(cvta_to_shared(memory));
  const int lane = int(threadIdx.x) % kWarp, warp = __shfl_sync(kFullWarp, int(threadIdx.x) / kWarp, 0);
  const int slices = int((g.K + kSliceElements - 1) / kSliceElements);
  if (threadIdx.x == 0) {
    ring.start(kGather ? kWarpgroup + 1 : 1, (S::row.ping_pong ? 4 : 8) * S::cluster);
    if (S::row.ping_pong) Alternation{ring.end()}.start();
    fence_mbarrier_init();
    if (!kGather) prefetch_tensor_map(&maps.a);
    prefetch_tensor_map(&maps.b);
  }
  if constexpr (S::cluster > 1) cluster_arrive(), cluster_wait();
  else __syncthreads();
  if (warp < 4) {
    setmaxnreg_dec<S::producer_registers>();
    if constexpr (kGather) produce_gathered<S>(g, maps, ring, column_tiles, slices, int(threadIdx.x));
    else if (warp == 0) produce_by_maps<S>(g, maps, ring, column_tiles, slices);
  } else {
    setmaxnreg_inc<S::consumer_registers>();
    consume<S>(g, ring, column_tiles, slices, warp / 4 - 1, warp, lane);
  }
  // No block may end while the other one of its cluster still writes to its shared memory.
  if constexpr (S::cluster > 1) cluster_arrive(), cluster_wait();
#endif
}

}  // namespace moe::cuda

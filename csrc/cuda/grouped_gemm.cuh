// SPDX-License-Identifier: Apache-2.0
// A grouped product on tensor cores, sm_80 and newer: cp.async into a ring of stages, ldmatrix, mma.sync. One block
// computes one tile of D and ends.
//
//   find_tile     which expert, rows and columns (tile_scheduler.cuh)
//   multiply      all threads copy slice s + stages - 1 while their warps multiply slice s. Registers hold the operands
//                 of two steps: while one is multiplied the next one is on its way from shared memory.
//   finish_tile   a warp passes its sums through shared memory, 16 rows at a time, so that a thread then holds
//                 neighbouring columns of one row, gate and up of a unit among them (grouped_epilogue.cuh)
//
// Shared memory is in chunks of 16 bytes. The chunks of a row are permuted by the row (swizzle), so that eight chunks
// of one column, as a pass of ldmatrix reads them, lie in different banks, and so do those that cp.async writes.
#pragma once
#include "grouped_epilogue.cuh"
#include "grouped_gemm_config.h"
#include "mma_tile.cuh"
#include "tile_scheduler.cuh"

namespace moe::cuda {

/// The instruction of a step: 32 bytes of the sum, 16 elements or 8.
template <class T> MOE_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2) mma_m16n8k16<T>(d, a, b);
  else mma_m16n8k8_tf32(d, a, b);
}

/// Everything about a kernel that its table row and its element type decide.
template <class T_, int kRow> struct Tile {
  using T = T_;
  static constexpr TileRow row = kTileRows[kRow];
  static constexpr int rows = row.rows, columns = row.columns, slice = row.slice, stages = row.stages;
  static constexpr int threads = row.threads(), warp_rows = row.warp_rows(), warp_columns = row.warp_columns();
  static constexpr int warps_m = row.warps_m, a_bytes = rows * slice, stage_bytes = row.stage_bytes();
  static constexpr int staging_stride = row.staging_stride();
  static constexpr int elements = slice / int(sizeof(T));  // of the sum in a slice
  static constexpr int steps = slice / 32, step_elements = elements / steps;
  static constexpr int m16 = warp_rows / 16, n8 = warp_columns / 8;
  // Steps whose operands registers hold: one is multiplied while the next comes. 64 x 64 sums leave f32 room for one.
  static constexpr int buffers = sizeof(T) == 4 && m16 * n8 >= 32 ? 1 : 2;
  static_assert(stages >= 3 && steps % 2 == 0 && n8 % 2 == 0 && (slice == 64 || slice == 128));
};

// ---------------------------------------------------------------- the layout of a stage

/// Where chunk `chunk` of row `row` lies in a tile whose rows are `slice` bytes along the sum.
template <int kSlice> MOE_DEVICE uint32_t along_sum(int row, int chunk) {
  const int turn = kSlice == 128 ? row % 8 : row / 2 % 4;
  return uint32_t(row * kSlice + (chunk ^ turn) * 16);
}
/// The same in a tile of B whose rows are the columns of D at one k.
template <class T, int kColumns> MOE_DEVICE uint32_t along_columns(int k, int chunk) {
  const int turn = sizeof(T) == 2 ? k % 8 : k % 4 * 2;
  return uint32_t(k * kColumns * int(sizeof(T)) + (chunk ^ turn) * 16);
}

/// The column of D (row of w13) that column `b` of the tile stands for; past the last one any: those are not stored.
/// Without interleaving a warp's columns are as many gates and then the ups of the same units.
template <class S> MOE_DEVICE int64_t column_of(const GroupedRows& g, const OutputTile& tile, int b) {
  const RowsEpilogue& p = g.epilogue;
  if (p.kind != Epilogue::activation || !p.gated || p.interleaved) {
    const int64_t n = int64_t(tile.column_tile) * S::columns + b;
    return n < g.N ? n : 0;
  }
  constexpr int half = S::warp_columns / 2;
  const int64_t I = g.N / 2;
  const int64_t unit = int64_t(tile.column_tile) * (S::columns / 2) + b / S::warp_columns * half + b % half;
  return (unit < I ? unit : 0) + (b % S::warp_columns < half ? 0 : I);
}

// ---------------------------------------------------------------- copies into a stage

/// What a thread copies of a tile of rows along the sum: one chunk of every step-th row. kTail: some rows may not be
/// there; their address is null and they count as zeros.
template <class S, int kRows, bool kTail> struct SumCopies {
  static constexpr int chunks = S::slice / 16, step = S::threads / chunks, count = kRows / step;
  static_assert(count * step == kRows && step % 8 == 0);
  const unsigned char* from[count];
  uint32_t rows;  // a bit each: there is such a row
  uint32_t to;    // of the first
  int at, end;    // bytes of the sum: where this chunk is, and all

  template <class Row> MOE_DEVICE void start(int64_t K, Row row) {
    const int first = int(threadIdx.x) / chunks, chunk = int(threadIdx.x) % chunks;
    to = along_sum<S::slice>(first, chunk);
    at = chunk * 16, end = int(K * int64_t(sizeof(typename S::T))), rows = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const unsigned char* p = row(first + i * step);
      rows |= uint32_t(p != nullptr) << i;
      from[i] = p + at;
    }
  }
  MOE_DEVICE void copy(uint32_t stage) {
    const uint32_t there = at < end ? rows : 0, bytes = at < end ? 16 : 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const uint32_t read = !kTail ? bytes : there >> i & 1 ? 16 : 0;
      cp_async_cg_16(stage + to + uint32_t(i * step * S::slice), from[i], read);
      from[i] += S::slice;
    }
    at += S::slice;
  }
};

/// What a thread copies of a tile of B along the columns of D: one chunk of every kStep-th k.
template <class S> struct ColumnCopies {
  using T = typename S::T;
  static constexpr int row_bytes = S::columns * int(sizeof(T));
  static constexpr int chunks = row_bytes / 16, step = S::threads / chunks, count = S::elements / step;
  static_assert(count * step == S::elements && step % (sizeof(T) == 2 ? 8 : 4) == 0);
  const unsigned char* from;
  int64_t stride;  // bytes from one of its chunks to the next
  uint32_t to;
  int left;  // k from its first chunk to the end

  MOE_DEVICE void start(const GroupedRows& g, const OutputTile& tile) {
    const int chunk = int(threadIdx.x) % chunks;
    const int k = int(threadIdx.x) / chunks;
    to = along_columns<T, S::columns>(k, chunk);
    const int64_t n = column_of<S>(g, tile, chunk * (16 / int(sizeof(T))));
    left = int(g.K) - k;
    from = static_cast<const unsigned char*>(g.b.data) +
           (tile.expert * g.b.expert_stride + k * g.b.col_stride + n) * int64_t(sizeof(T));
    stride = step * g.b.col_stride * int64_t(sizeof(T));
  }
  MOE_DEVICE void copy(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      cp_async_cg_16(stage + to + uint32_t(i * step * row_bytes), from, i * step < left ? 16 : 0);
      from += stride;
    }
    left -= S::elements;
  }
};

/// The copies of one slice of both operands.
template <class S, bool kAlongColumns> struct Copies;
template <class S> struct RowCopies {
  using T = typename S::T;
  SumCopies<S, S::rows, true> a;

  MOE_DEVICE void start(const GroupedRows& g, const OutputTile& tile) {
    const auto* base = static_cast<const unsigned char*>(g.a);
    const int64_t bytes = g.a_stride * int64_t(sizeof(T));
    a.start(g.K, [&](int i) -> const unsigned char* {
      const int64_t r = tile.row + i;
      if (r >= tile.end) return nullptr;
      if (g.gather) {
        const int32_t slot = g.gather[r];
        return slot < 0 ? nullptr : base + slot / int32_t(g.per_token) * bytes;
      }
      if (g.ends) return base + r * bytes;
      return base + tile.expert * g.a_expert * int64_t(sizeof(T)) + (r - tile.expert_row) * bytes;
    });
  }
};
template <class S> struct Copies<S, false> : RowCopies<S> {
  SumCopies<S, S::columns, false> b;

  MOE_DEVICE void start(const GroupedRows& g, const OutputTile& tile) {
    RowCopies<S>::start(g, tile);
    const auto* base = static_cast<const typename S::T*>(g.b.data) + tile.expert * g.b.expert_stride;
    b.start(g.K, [&](int i) -> const unsigned char* {
      return reinterpret_cast<const unsigned char*>(base + column_of<S>(g, tile, i) * g.b.row_stride);
    });
  }
};
template <class S> struct Copies<S, true> : RowCopies<S> {
  ColumnCopies<S> b;

  MOE_DEVICE void start(const GroupedRows& g, const OutputTile& tile) {
    RowCopies<S>::start(g, tile);
    b.start(g, tile);
  }
};

// ---------------------------------------------------------------- from a stage to registers

/// The operands of one step of a warp.
template <class S> struct Operands {
  uint32_t a[S::m16][4];
  uint32_t b[S::n8][2];
};

/// Where a lane reads in a stage. Matrix j of an ldmatrix.x4 is named by lanes 8j .. 8j+7.
template <class S, bool kAlongColumns> struct Reader {
  using T = typename S::T;
  uint32_t a, b;

  MOE_DEVICE Reader(int warp, int lane) {
    const int warp_m = warp % S::warps_m, warp_n = warp / S::warps_m;
    // A: rows 0-7, 8-15 of the first 16 bytes, then of the next 16.
    a = along_sum<S::slice>(warp_m * S::warp_rows + lane % 16, lane / 16);
    const int column = warp_n * S::warp_columns;
    if constexpr (!kAlongColumns) {  // B: columns 0-7 of the first 16 bytes and of the next, then columns 8-15
      b = S::a_bytes + along_sum<S::slice>(column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    } else if constexpr (sizeof(T) == 2) {  // B: k 0-7 and 8-15 of columns 0-7, then of columns 8-15
      b = S::a_bytes + along_columns<T, S::columns>(lane % 16, column / 8 + lane / 16);
    } else {  // four columns a lane, one for each of four products (stage_fours): k = lane % 4
      b = S::a_bytes + along_columns<T, S::columns>(lane % 4, column / 4 + lane / 4);
    }
  }

  MOE_DEVICE void read(Operands<S>& to, uint32_t stage, int step) const {
    const uint32_t from_a = address(stage, a, step * 32);
#pragma unroll
    for (int m = 0; m < S::m16; ++m) ldmatrix_x4(to.a[m], from_a + uint32_t(m * 16 * S::slice));
    if constexpr (!kAlongColumns) {
      const uint32_t from_b = address(stage, b, step * 32);
#pragma unroll
      for (int n = 0; n < S::n8; n += 2) put(to, n, from_b + uint32_t(n * 8 * S::slice), false);
    } else if constexpr (sizeof(T) == 2) {
      const uint32_t from_b = stage + uint32_t(step * S::step_elements * S::columns * 2);
#pragma unroll
      for (int n = 0; n < S::n8; n += 2) put(to, n, address(from_b, b, n * 16), true);
    } else {
      const uint32_t from_b = stage + b + uint32_t(step * S::step_elements * S::columns * 4);
#pragma unroll
      for (int n = 0; n < S::n8; n += 4)
#pragma unroll
        for (int far = 0; far < 2; ++far) {
          const uint4 four = ld_shared_v4(from_b + uint32_t(n * 32 + far * 4 * S::columns * 4));
          to.b[n][far] = four.x, to.b[n + 1][far] = four.y, to.b[n + 2][far] = four.z, to.b[n + 3][far] = four.w;
        }
    }
    if constexpr (sizeof(T) == 4) round(to);
  }

 private:
  /// Bits 4 to 6 of an address are those that the swizzle exchanges; a stage begins at a multiple of 128. Added last,
  /// it leaves the rest the same from slice to slice, but f32 has no registers to keep that in.
  static MOE_DEVICE uint32_t address(uint32_t stage, uint32_t at, int bits) {
    return sizeof(T) == 4 ? (stage + at) ^ uint32_t(bits) : stage + (at ^ uint32_t(bits));
  }
  static MOE_DEVICE void put(Operands<S>& to, int n, uint32_t from, bool transposed) {
    uint32_t four[4];
    if (transposed) ldmatrix_x4_trans(four, from);
    else ldmatrix_x4(four, from);
    to.b[n][0] = four[0], to.b[n][1] = four[1], to.b[n + 1][0] = four[2], to.b[n + 1][1] = four[3];
  }
  static MOE_DEVICE void round(Operands<S>& x) {
#pragma unroll
    for (int m = 0; m < S::m16; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) x.a[m][i] = tf32_of(x.a[m][i]);
#pragma unroll
    for (int n = 0; n < S::n8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) x.b[n][i] = tf32_of(x.b[n][i]);
  }
};

// ---------------------------------------------------------------- the product

template <class S> using Sums = float[S::m16][S::n8][4];

template <class S> MOE_DEVICE void multiply_step(const Operands<S>& x, Sums<S>& sum) {
#pragma unroll
  for (int m = 0; m < S::m16; ++m)
#pragma unroll
    for (int n = 0; n < S::n8; ++n) multiply_add<typename S::T>(sum[m][n], x.a[m], x.b[n]);
}

/// Behind the barrier before its last step nobody reads a stage any more.
template <class S, bool kAlongColumns> MOE_DEVICE void multiply(const GroupedRows& g, const OutputTile& tile,
                                                                uint32_t shared, Sums<S>& sum) {
  const int slices = int((g.K + S::elements - 1) / S::elements);
  Copies<S, kAlongColumns> copies;
  copies.start(g, tile);
  const Reader<S, kAlongColumns> reader(int(threadIdx.x) / kWarp, int(threadIdx.x) % kWarp);
  const auto copy = [&](uint32_t stage) {
    copies.a.copy(stage);
    copies.b.copy(stage + S::a_bytes);
  };
#pragma unroll
  for (int s = 0; s < S::stages - 1; ++s) {
    if (s < slices) copy(shared + uint32_t(s * S::stage_bytes));
    cp_async_commit_group();
  }
  cp_async_wait_group<S::stages - 2>();
  __syncthreads();
  Operands<S> x[S::buffers];
  reader.read(x[0], shared, 0);
  uint32_t read = shared, write = shared + (S::stages - 1) * S::stage_bytes;
  const uint32_t ring_end = shared + S::stages * S::stage_bytes;
  for (int s = 0; s < slices; ++s) {
#pragma unroll
    for (int step = 0; step < S::steps; ++step) {
      if constexpr (S::buffers == 1) multiply_step<S>(x[0], sum);
      if (step == S::steps - 1) {  // the next slice is there, and no warp reads the one before this any more
        cp_async_wait_group<S::stages - 2>();
        __syncthreads();
        read = read + S::stage_bytes == ring_end ? shared : read + S::stage_bytes;
        if (s + 1 < slices) reader.read(x[(step + 1) % S::buffers], read, 0);
      } else {
        reader.read(x[(step + 1) % S::buffers], read, step + 1);
      }
      if (step == 0) {
        if (s + S::stages - 1 < slices) copy(write);
        cp_async_commit_group();
        write = write + S::stage_bytes == ring_end ? shared : write + S::stage_bytes;
      }
      if constexpr (S::buffers == 2) multiply_step<S>(x[step % 2], sum);
    }
  }
}

// ---------------------------------------------------------------- the epilogue

MOE_DEVICE void load_four(uint32_t from, float (&v)[4]) {
  const uint4 raw = ld_shared_v4(from);
  v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
  v[2] = __uint_as_float(raw.z), v[3] = __uint_as_float(raw.w);
}

MOE_DEVICE void load_columns_of(uint32_t from, float (&v)[4]) { load_four(from, v); }
MOE_DEVICE void load_columns_of(uint32_t from, float (&v)[2]) {
  const uint2 raw = ld_shared_v2(from);
  v[0] = __uint_as_float(raw.x), v[1] = __uint_as_float(raw.y);
}

/// Two units' gates and ups.
MOE_DEVICE void load_pairs(uint32_t from, int, float (&gate)[2], float (&up)[2]) {
  float four[4];
  load_four(from, four);
  gate[0] = four[0], up[0] = four[1], gate[1] = four[2], up[1] = four[3];
}
/// Four units' gates and ups from eight sums side by side. Half of the lanes begin with the second four, so that eight
/// lanes read from different banks.
MOE_DEVICE void load_pairs(uint32_t from, int lane, float (&gate)[4], float (&up)[4]) {
  const bool second = lane / 4 % 2;
  float one[4], other[4];
  load_four(from + (second ? 16 : 0), one);
  load_four(from + (second ? 0 : 16), other);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    gate[i] = second ? other[2 * i] : one[2 * i], up[i] = second ? other[2 * i + 1] : one[2 * i + 1];
    gate[2 + i] = second ? one[2 * i] : other[2 * i], up[2 + i] = second ? one[2 * i + 1] : other[2 * i + 1];
  }
}

/// Sixteen rows of a warp, from shared memory to where they belong. A lane has four columns (or units) of a row; of
/// f32 two, so that pairs of gate and up are one request of whole sectors.
template <class S> MOE_DEVICE void finish_rows(const GroupedRows& g, const OutputTile& tile, uint32_t from,
                                               int64_t first_row, int warp_n, int lane) {
  using T = typename S::T;
  constexpr uint32_t stride = S::staging_stride;
  constexpr int V = sizeof(T) == 4 ? 2 : 4;
  const RowsEpilogue& p = g.epilogue;
  const bool paired = p.kind == Epilogue::activation && p.gated;
  const int width = paired ? S::warp_columns / 2 : S::warp_columns;  // columns or units of a row
  const int lanes = width / V, rows_at_once = kWarp / lanes;
  const int64_t limit = paired ? g.N / 2 : g.N;
  const int64_t column = (int64_t(tile.column_tile) * S::columns + warp_n * S::warp_columns) / (paired ? 2 : 1);
  const int own = lane % lanes * V, turn = lane / lanes;
  // Where the lanes of a pass, 32 / V of them, read two rows, these are two apart: 16 banks.
  const int row_in_turn = lanes == 16 / V ? (turn & 4) | (turn & 1) << 1 | (turn & 2) >> 1 : turn;
#pragma unroll 1
  for (int base = 0; base < 16; base += rows_at_once) {
    const int64_t r = first_row + base + row_in_turn, n = column + own;
    const uint32_t at = from + uint32_t(base + row_in_turn) * stride;
    const bool inside = r < tile.end && n < limit;
    float share = 0;
    if (inside) {
      const EpilogueRow<float> row = epilogue_row<float>(p, r, tile.expert);
      float sum[V], up[V] = {};
      if (paired && p.interleaved) {
        load_pairs(at + uint32_t(own * 8), lane, sum, up);
      } else {
        load_columns_of(at + uint32_t(own * 4), sum);
        if (paired) load_columns_of(at + uint32_t((width + own) * 4), up);
      }
      if (p.kind == Epilogue::plain) finish_plain<T, V>(p, row, g.N, n, sum);
      else if (p.kind == Epilogue::activation) finish_activation<T, V>(p, row, limit, n, sum, up);
      else share = finish_backward<T, V>(p, row, limit, n, sum);
    }
    if (p.kind != Epilogue::activation_backward || !p.weight_parts) continue;
#pragma unroll
    for (int other = S::warp_columns / (2 * V); other > 0; other /= 2)
      share += __shfl_xor_sync(kFullWarp, share, other);
    if (inside && own == 0) static_cast<float*>(p.weight_parts)[column / S::warp_columns * g.S + r] = share;
  }
}

template <class S, bool kAlongColumns> MOE_DEVICE void finish_tile(const GroupedRows& g, const OutputTile& tile,
                                                                   uint32_t shared, const Sums<S>& sum) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int warp_m = warp % S::warps_m, warp_n = warp / S::warps_m;
  const uint32_t staging = shared + uint32_t(warp * 16 * S::staging_stride);
#pragma unroll 1
  for (int m = 0; m < S::m16; ++m) {
    // One copy of the code behind, though registers have no index.
#pragma unroll
    for (int i = 0; i < S::m16; ++i)
      if (i == m) {
        if constexpr (kAlongColumns && sizeof(typename S::T) == 4)
          stage_fours(staging, S::staging_stride, lane, sum[i]);
        else stage_pairs(staging, S::staging_stride, lane, sum[i]);
      }
    __syncwarp();
    finish_rows<S>(g, tile, staging, tile.row + warp_m * S::warp_rows + m * 16, warp_n, lane);
    __syncwarp();
  }
}

/// One tile of D a block. kAlongColumns: the rows of b run along N, not along the sum.
template <class T, int kRow, bool kAlongColumns> MOE_KERNEL __launch_bounds__(kTileRows[kRow].threads())
    grouped_rows_kernel(GroupedRows g, uint32_t column_tiles) {
  using S = Tile<T, kRow>;
  MOE_SHARED(unsigned char, memory);
  const OutputTile tile = find_tile<S::rows>(g.ends, g.E, g.S, column_tiles, blockIdx.x);
  if (tile.expert < 0) return;
  const uint32_t shared = cvta_to_shared(memory);
  float sum[S::m16][S::n8][4] = {};
  if (g.K > 0) multiply<S, kAlongColumns>(g, tile, shared, sum);
  finish_tile<S, kAlongColumns>(g, tile, shared, sum);
}

}  // namespace moe::cuda

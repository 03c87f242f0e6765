// SPDX-License-Identifier: Apache-2.0
// The product of grouped_gemm.h with plain multiply-adds: float32 and float64 exactly, and every width, stride and
// alignment that the tensor-core kernels do not take. A block owns 64 rows of one expert and walks over their columns,
// 32 at a time; gate and up of a hidden unit meet in one thread. Sums run over k in ascending order.
#pragma once
#include "grouped_epilogue.cuh"
#include "warp.cuh"

namespace moe::cuda {

constexpr int kFmaRows = 64, kFmaDepth = 16, kFmaThreads = 128;
constexpr int kFmaPart = 4;                         // rows of a thread, and its columns
constexpr int kFmaAcross = kFmaColumns / kFmaPart;  // threads side by side

template <class A, int kHalves> struct FmaShared {
  union {
    struct {
      A a[kFmaDepth][kFmaRows + 1];  // one more than a power of two: no two lanes of a store meet in a bank
      A b[kHalves][kFmaDepth][kFmaColumns + 1];
    };
    A sum[kHalves][kFmaRows][kFmaColumns + 1];  // the products, once they are finished
  };
  int64_t source[kFmaRows];  // row of a, -1: zeros
  int32_t highest[kFmaThreads / kWarp];
  int32_t expert, begin, end;
};

/// Rows [begin, end) of one expert; empty where the block has nothing to do.
struct RowTile { int32_t expert, begin, end; };

/// The tile of this block. Expert e, whose first row is b, owns the blocks from b / 64 + e on: enough for any counts,
/// and found without their sum. `ends` is clamped and made to ascend on the way.
template <class Shared> MOE_DEVICE RowTile row_tile(const GroupedRows& g, Shared* shared) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int E = int(g.E), stretch = (E + kFmaThreads - 1) / kFmaThreads;
  const int first = min(int(threadIdx.x) * stretch, E), last = min(first + stretch, E);
  const auto end_of = [&](int e) {
    const int64_t end = g.ends ? int64_t(g.ends[e]) : (e + 1) * (g.S / g.E);
    return int32_t(end < 0 ? 0 : end < g.S ? end : g.S);
  };
  int32_t highest = 0;
  for (int e = first; e < last; ++e) highest = max(highest, end_of(e));
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, highest, unsigned(delta));
    if (lane >= delta) highest = max(highest, before);
  }
  if (lane == kWarp - 1) shared->highest[warp] = highest;
  if (threadIdx.x == 0) shared->expert = shared->begin = shared->end = 0;
  __syncthreads();
  int32_t begin = __shfl_up_sync(kFullWarp, highest, 1u);
  if (lane == 0) begin = 0;
  for (int w = 0; w < warp; ++w) begin = max(begin, shared->highest[w]);
  for (int e = first; e < last; ++e) {
    const int32_t end = max(begin, end_of(e));
    const int64_t tile = int64_t(blockIdx.x) - (begin / kFmaRows + e);
    if (tile >= 0 && tile * kFmaRows < end - begin) {
      shared->expert = e, shared->begin = int32_t(begin + tile * kFmaRows);
      shared->end = min(end, int32_t(begin + (tile + 1) * kFmaRows));
    }
    begin = end;
  }
  __syncthreads();
  return {shared->expert, shared->begin, shared->end};
}

/// Loads depth [k0, +16) of the block's rows, a multiple of 4, and of 32 columns from `unit` on. What is outside is 0.
template <class T, int kHalves>
MOE_DEVICE void fma_load(const GroupedRows& g, int64_t expert, int64_t unit, int64_t k0, int rows,
                         FmaShared<acc_t<T>, kHalves>* shared) {
  const int64_t units = g.N / kHalves;
  for (int i = threadIdx.x; i < rows * kFmaDepth; i += kFmaThreads) {
    const int k = i % kFmaDepth, m = i / kFmaDepth;
    const int64_t row = shared->source[m];
    const T* a = static_cast<const T*>(g.a) + (g.ends ? 0 : expert * g.a_expert) + row * g.a_stride + k0 + k;
    shared->a[k][m] = row >= 0 && k0 + k < g.K ? widen(*a) : acc_t<T>(0);
  }
  const int64_t apart = kHalves == 2 && g.epilogue.interleaved ? 2 : 1;  // rows of w13 from unit to unit
  const bool along_n = g.b.col_stride != 1;  // neighbouring lanes read neighbouring addresses
  for (int i = threadIdx.x; i < kHalves * kFmaColumns * kFmaDepth; i += kFmaThreads) {
    const int half = i / (kFmaColumns * kFmaDepth), j = i % (kFmaColumns * kFmaDepth);
    const int k = along_n ? j / kFmaColumns : j % kFmaDepth, n = along_n ? j % kFmaColumns : j / kFmaDepth;
    const int64_t row = (unit + n) * apart + half * (apart == 1 ? units : 1);
    const T* b =
        static_cast<const T*>(g.b.data) + expert * g.b.expert_stride + row * g.b.row_stride + (k0 + k) * g.b.col_stride;
    shared->b[half][k][n] = unit + n < units && k0 + k < g.K ? widen(*b) : acc_t<T>(0);
  }
}

/// sum[half][m][n] <- the products of the block's rows with columns [unit, +32).
template <class T, int kHalves>
MOE_DEVICE void fma_products(const GroupedRows& g, int64_t expert, int64_t unit, int rows,
                             FmaShared<acc_t<T>, kHalves>* shared) {
  using A = acc_t<T>;
  const int across = threadIdx.x % kFmaAcross, down = threadIdx.x / kFmaAcross * kFmaPart;
  const bool busy = down < rows;
  A sum[kHalves][kFmaPart][kFmaPart] = {};
  for (int64_t k0 = 0; k0 < g.K; k0 += kFmaDepth) {
    fma_load<T, kHalves>(g, expert, unit, k0, (rows + kFmaPart - 1) / kFmaPart * kFmaPart, shared);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kFmaDepth && busy; ++k) {
      A a[kFmaPart];
#pragma unroll
      for (int i = 0; i < kFmaPart; ++i) a[i] = shared->a[k][down + i];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int j = 0; j < kFmaPart; ++j) {
          const A b = shared->b[half][k][across + j * kFmaAcross];
#pragma unroll
          for (int i = 0; i < kFmaPart; ++i) sum[half][i][j] += a[i] * b;
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int i = 0; i < kFmaPart; ++i) {
#pragma unroll
      for (int j = 0; j < kFmaPart; ++j) shared->sum[half][down + i][across + j * kFmaAcross] = sum[half][i][j];
    }
  }
}

template <class T, int kHalves> MOE_KERNEL __launch_bounds__(kFmaThreads, 4) grouped_fma_kernel(GroupedRows g) {
  using A = acc_t<T>;
  using Shared = FmaShared<A, kHalves>;
  MOE_SHARED(Shared, shared);
  const RowTile tile = row_tile(g, shared);
  if (tile.begin >= tile.end) return;
  const RowsEpilogue& e = g.epilogue;
  for (int m = threadIdx.x; m < kFmaRows; m += kFmaThreads) {
    const int64_t r = int64_t(tile.begin) + m;
    int64_t row = -1;
    if (r < tile.end && g.gather) row = g.gather[r] < 0 ? -1 : g.gather[r] / g.per_token;
    else if (r < tile.end) row = g.ends ? r : r - tile.expert * (g.S / g.E);
    shared->source[m] = row;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, rows = tile.end - tile.begin;
  const int64_t units = g.N / kHalves, parts = (units + kFmaColumns - 1) / kFmaColumns;
  for (int64_t part = blockIdx.y; part < parts; part += gridDim.y) {
    fma_products<T, kHalves>(g, tile.expert, part * kFmaColumns, rows, shared);
    __syncthreads();
    const int64_t unit = part * kFmaColumns + lane;
#pragma unroll 1
    for (int m = threadIdx.x / kWarp; m < rows; m += kFmaThreads / kWarp) {  // a warp finishes a row
      const int64_t r = int64_t(tile.begin) + m;
      const EpilogueRow<A> row = epilogue_row<A>(e, r, tile.expert);
      A share = 0, sum[1] = {shared->sum[0][m][lane]}, up[1] = {shared->sum[kHalves - 1][m][lane]};
      if (unit < units) {
        if (kHalves == 2 || e.kind == Epilogue::activation) finish_activation<T, 1>(e, row, units, unit, sum, up);
        else if (e.kind == Epilogue::activation_backward) share = finish_backward<T, 1>(e, row, units, unit, sum);
        else finish_plain<T, 1>(e, row, units, unit, sum);
      }
      if (e.kind != Epilogue::activation_backward || !e.weight_parts) continue;
      share = warp_sum(share);
      if (lane == 0) static_cast<A*>(e.weight_parts)[part * g.S + r] = share;
    }
    __syncthreads();
  }
}

}  // namespace moe::cuda

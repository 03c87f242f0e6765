// SPDX-License-Identifier: Apache-2.0
// The product of grouped_gemm.h with plain multiply-adds: float32 and float64 exactly, and every width, stride and
// alignment that the tensor-core kernels do not take. A block owns 64 rows of one expert and walks over their columns,
// 32 at a time; gate and up of a hidden unit meet in one thread. Sums run over k in ascending order.
#pragma once
#include "activation.cuh"
#include "warp.cuh"

namespace moe::cuda {

constexpr int kFmaRows = 64, kFmaDepth = 16, kFmaThreads = 128;
constexpr int kFmaPart = 4;                         // rows of a thread, and its columns
constexpr int kFmaAcross = kFmaColumns / kFmaPart;  // threads side by side

template <class A, int kHalves> struct FmaShared {
  A a[kFmaDepth][kFmaRows + 1];  // one more than a power of two: no two lanes of a store meet in a bank
  A b[kHalves][kFmaDepth][kFmaColumns + 1];
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

/// Loads depth [k0, +16) of the block's rows and of 32 columns from `unit` on. What is outside is 0.
template <class T, int kHalves> MOE_DEVICE void fma_load(const GroupedRows& g, int64_t expert, int64_t unit, int64_t k0,
                                                         FmaShared<acc_t<T>, kHalves>* shared) {
  const int64_t units = g.N / kHalves;
  for (int i = threadIdx.x; i < kFmaRows * kFmaDepth; i += kFmaThreads) {
    const int k = i % kFmaDepth, m = i / kFmaDepth;
    const int64_t row = shared->source[m];
    const T* a = static_cast<const T*>(g.a) + (g.ends ? 0 : expert * g.a_expert) + row * g.a_stride + k0 + k;
    shared->a[k][m] = row >= 0 && k0 + k < g.K ? widen(*a) : acc_t<T>(0);
  }
  const bool along_n = g.b.col_stride != 1;  // neighbouring lanes read neighbouring addresses
  for (int i = threadIdx.x; i < kHalves * kFmaColumns * kFmaDepth; i += kFmaThreads) {
    const int half = i / (kFmaColumns * kFmaDepth), j = i % (kFmaColumns * kFmaDepth);
    const int k = along_n ? j / kFmaColumns : j % kFmaDepth, n = along_n ? j % kFmaColumns : j / kFmaDepth;
    const int64_t row = kHalves == 2 ? w13_row(g.epilogue, units, unit + n, half) : unit + n;
    const T* b =
        static_cast<const T*>(g.b.data) + expert * g.b.expert_stride + row * g.b.row_stride + (k0 + k) * g.b.col_stride;
    shared->b[half][k][n] = unit + n < units && k0 + k < g.K ? widen(*b) : acc_t<T>(0);
  }
}

template <class A> MOE_DEVICE void store_as(void* out, DType dtype, int64_t at, A value) {
  if (dtype == DType::f64) static_cast<double*>(out)[at] = double(value);
  else if (dtype == DType::f32) static_cast<float*>(out)[at] = float(value);
  else if (dtype == DType::bf16) static_cast<bf16*>(out)[at] = narrow<bf16>(float(value));
  else static_cast<f16*>(out)[at] = narrow<f16>(float(value));
}

/// One finished row of one unit: the forward's activation. sum: x w13^T of gate and up.
template <class T> MOE_DEVICE void finish_activation(const GroupedRows& g, const RowWeight<acc_t<T>>& w, int64_t expert,
                                                     int64_t r, int64_t unit, acc_t<T> gate, acc_t<T> up) {
  using A = acc_t<T>;
  const RowsEpilogue& e = g.epilogue;
  const int64_t I = e.gated ? g.N / 2 : g.N;
  if (e.hidden) {
    T* hidden = static_cast<T*>(e.hidden) + r * g.N + unit;
    hidden[0] = narrow<T>(gate);
    if (e.gated) hidden[I] = narrow<T>(up);
  }
  gate = w.s * gate + bias_of<T>(e, expert, g.N, w13_row(e, I, unit, 0));
  if (e.gated) up = w.s * up + bias_of<T>(e, expert, g.N, w13_row(e, I, unit, 1));
  static_cast<T*>(e.act)[r * I + unit] = narrow<T>(activate<A>(e, gate, up, mask_of<A>(e, w.slot, I, unit)));
}

/// The same of the backward; returns the unit's share in the gradient of the routing weight. u: grad_y w2.
template <class T>
MOE_DEVICE acc_t<T> finish_backward(const GroupedRows& g, const RowWeight<acc_t<T>>& w, int64_t expert, int64_t r,
                                    int64_t unit, acc_t<T> u) {
  using A = acc_t<T>;
  const RowsEpilogue& e = g.epilogue;
  const int64_t I = g.N, rows = e.gated ? 2 * I : I, gate = w13_row(e, I, unit, 0), up = w13_row(e, I, unit, 1);
  const T* hidden = static_cast<const T*>(e.hidden) + r * rows + unit;
  const A raw_gate = widen(hidden[0]), raw_up = e.gated ? widen(hidden[I]) : A(0);
  const A bias_up = e.gated ? bias_of<T>(e, expert, rows, up) : A(0);
  const UnitGradient<A> grad = activate_backward(e, w, mask_of<A>(e, w.slot, I, unit), u, raw_gate, raw_up,
                                                 bias_of<T>(e, expert, rows, gate), bias_up);
  T* const outs[2] = {static_cast<T*>(e.grad_hidden), static_cast<T*>(e.grad_biased)};
  for (int i = 0; i < 2; ++i) {
    if (!outs[i]) continue;
    const A scale = i == 0 ? w.s : A(1);
    outs[i][r * rows + gate] = narrow<T>(scale * grad.gate);
    if (e.gated) outs[i][r * rows + up] = narrow<T>(scale * grad.up);
  }
  if (e.weighted_act) static_cast<T*>(e.weighted_act)[r * I + unit] = narrow<T>(grad.weighted);
  return grad.share;
}

template <class T, int kHalves> MOE_KERNEL __launch_bounds__(kFmaThreads) grouped_fma_kernel(GroupedRows g) {
  using A = acc_t<T>;
  using Shared = FmaShared<A, kHalves>;
  MOE_SHARED(Shared, shared);
  const RowTile tile = row_tile(g, shared);
  if (tile.begin >= tile.end) return;
  const RowsEpilogue& e = g.epilogue;
  for (int m = threadIdx.x; m < kFmaRows; m += kFmaThreads) {
    const int64_t r = int64_t(tile.begin) + m;
    int64_t row = -1;
    if (r < tile.end) row = g.gather ? (g.gather[r] < 0 ? -1 : g.gather[r] / g.per_token) : r;
    if (!g.ends && row >= 0) row -= tile.expert * (g.S / g.E);
    shared->source[m] = row;
  }
  __syncthreads();
  const int across = threadIdx.x % kFmaAcross, down = threadIdx.x / kFmaAcross * kFmaPart;
  const int64_t units = g.N / kHalves, parts = (units + kFmaColumns - 1) / kFmaColumns;
  for (int64_t part = blockIdx.y; part < parts; part += gridDim.y) {
    A sum[kHalves][kFmaPart][kFmaPart] = {};
    for (int64_t k0 = 0; k0 < g.K; k0 += kFmaDepth) {
      fma_load<T, kHalves>(g, tile.expert, part * kFmaColumns, k0, shared);
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kFmaDepth; ++k) {
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
    for (int i = 0; i < kFmaPart; ++i) {
      const int64_t r = int64_t(tile.begin) + down + i;
      const bool there = r < tile.end;
      RowWeight<A> w{-1, A(0), A(0)};
      if (there) w = row_weight<A>(e, r);
      A share = 0;
#pragma unroll
      for (int j = 0; j < kFmaPart; ++j) {
        const int64_t unit = part * kFmaColumns + across + j * kFmaAcross;
        if (!there || unit >= units) continue;
        const A value = sum[0][i][j];
        if (e.kind == Epilogue::activation)
          finish_activation<T>(g, w, tile.expert, r, unit, value, sum[kHalves - 1][i][j]);
        else if (e.kind == Epilogue::activation_backward)
          share += finish_backward<T>(g, w, tile.expert, r, unit, value);
        else
          store_as(e.out, e.out_dtype, r * e.out_stride + unit,
                   (e.weight_on_input ? w.s : w.v) * (value + bias_of<T>(e, tile.expert, g.N, unit)));
      }
      if (e.kind != Epilogue::activation_backward || !e.weight_parts) continue;
      for (int lanes = kFmaAcross / 2; lanes > 0; lanes /= 2) share += __shfl_xor_sync(kFullWarp, share, lanes);
      if (there && across == 0) static_cast<A*>(e.weight_parts)[part * g.S + r] = share;
    }
  }
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// decode on a GPU: the weights are the rows of the product (m16), the tokens its columns (n8), so that a handful of
// tokens wastes no tensor core, and a weight goes from memory to a register in one 16-byte load, once.
//   a lane holds k .. k + 7 of its weight row and of its token. The sum runs over k in any order, so the four pairs in
//   those 16 bytes are handed to two products as they lie: no shared memory, no ldmatrix.
// The eight warps of a block each take an eighth of k, in one fixed pattern; their sums are added in the order of the
// warps. What a token gets does not depend on the tokens beside it, only on whether they are more than eight.
#pragma once
#include "decode.h"
#include "expert_rows.cuh"
#include "grouped_epilogue.cuh"
#include "mma_tile.cuh"

namespace moe::cuda {

constexpr int kDecodeWarps = 8, kDecodeRows = 16;  // warps of a block | weight rows of a product
constexpr int kDecodeTokens = 64;                  // rows whose sums a block of decode_w2 holds at a time

MOE_DEVICE uint4 load16(const void* p, bool there) {
  return there ? __ldg(static_cast<const uint4*>(p)) : make_uint4(0, 0, 0, 0);
}

/// sum[m][n] += 16 weight rows times 8 tokens over one part of k: every kDecodeWarps-th stretch. weight[m][h] is this
/// lane's row lane / 4 + 8 h, token[n] its token lane / 4; null is zeros.
template <class T, int M, int N>
MOE_DEVICE void stream(float (&sum)[M][N][4], const T* const (&weight)[M][2], const T* const (&token)[N], int64_t K,
                       int part) {
  constexpr int ahead = N > 1 ? 2 : M > 1 ? 3 : 4, step = ahead * 32;  // all loads of a step are in flight together
  for (int64_t k = int64_t(part) * step; k < K; k += kDecodeWarps * step) {
    uint4 w[ahead][M][2];
#pragma unroll
    for (int a = 0; a < ahead; ++a)
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t at = k + a * 32 + threadIdx.x % 4 * 8;
          w[a][m][h] = load16(weight[m][h] + at, weight[m][h] && at < K);
        }
#pragma unroll
    for (int a = 0; a < ahead; ++a)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int64_t at = k + a * 32 + threadIdx.x % 4 * 8;
        const uint4 x = load16(token[n] + at, token[n] && at < K);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const uint4 low = w[a][m][0], high = w[a][m][1];
          mma_m16n8k16<T>(sum[m][n], {low.x, high.x, low.y, high.y}, {x.x, x.y});
          mma_m16n8k16<T>(sum[m][n], {low.z, high.z, low.w, high.w}, {x.z, x.w});
        }
      }
  }
}

/// Sums of the parts of k: [row][part][M * 16 weight rows]. Four floats between rows keep lanes in different banks.
template <int M> struct DecodeParts {
  static constexpr int kUnits = M * kDecodeRows, kPitch = kDecodeWarps * kUnits + 4;
  float* parts;

  template <int N> MOE_DEVICE void put(const float (&sum)[M][N][4], int part, int first, int rows) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int row = n * 8 + lane % 4 * 2 + v % 2;
          if (row < rows)
            parts[(first + row) * kPitch + part * kUnits + m * kDecodeRows + lane / 4 + v / 2 * 8] = sum[m][n][v];
        }
  }
  MOE_DEVICE float get(int row, int unit) const {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < kDecodeWarps; ++part) sum += parts[row * kPitch + part * kUnits + unit];
    return sum;
  }
};

/// Calls f(row, unit) once for every row below `rows` and 16 units: rows four apart share a warp, see DecodeParts.
template <class F> MOE_DEVICE void for_row_units(int rows, F&& f) {
  const int lane = threadIdx.x % kWarp;
  for (int turn = threadIdx.x / kWarp; turn / 4 * 8 < rows; turn += kDecodeWarps) {
    const int row = turn / 4 * 8 + turn % 4 + lane / 16 * 4;
    if (row < rows) f(row, lane % 16);
  }
}

/// act of 16 units (32 without a gate) of one expert for all its rows. blockIdx.y counts the experts that have rows.
template <class T, int N>
MOE_KERNEL __launch_bounds__(256, N == 1 ? 2 : 1) decode_w13_kernel(ExpertMlp p, RowsEpilogue epilogue) {
  MOE_SHARED(float, shared);
  const DecodeParts<2> parts{shared};
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  griddepcontrol_wait();  // blocks without work too: what comes after decode_w2 may count on it
  griddepcontrol_launch_dependents();
  const ActiveExpert active = active_expert(p.expert_offsets + 1, p.E, p.T * p.K, int(blockIdx.y));
  if (active.expert < 0) return;
  const int units = p.gated ? kDecodeRows : 2 * kDecodeRows;
  const int64_t first = int64_t(blockIdx.x) * units;
  const T* weight[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t unit = first + (p.gated ? 0 : m * kDecodeRows) + lane / 4 + h * 8;
      const int64_t n = !p.gated ? unit : p.interleaved ? 2 * unit + m : m * p.I + unit;
      weight[m][h] = nullptr;
      if (unit < p.I)
        weight[m][h] = static_cast<const T*>(p.w13.data) + active.expert * p.w13.expert_stride + n * p.w13.row_stride;
    }
  for (int32_t r0 = active.begin; r0 < active.end; r0 += N * 8) {
    const int rows = min(N * 8, active.end - r0);
    const T* token[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int row = n * 8 + lane / 4;
      token[n] = nullptr;
      if (row < rows) token[n] = static_cast<const T*>(p.x) + p.row_to_slot[r0 + row] / p.K * p.x_stride;
    }
    float sum[2][N][4] = {};
    stream(sum, weight, token, p.H, part);
    parts.put(sum, part, 0, rows);
    __syncthreads();
    const auto finish = [&](int row, int unit) {
      if (first + unit >= p.I) return;
      float gate[1] = {parts.get(row, unit)}, up[1] = {p.gated ? parts.get(row, kDecodeRows + unit) : 0.f};
      const EpilogueRow<float> at = epilogue_row<float>(epilogue, r0 + row, active.expert);
      finish_activation<T, 1>(epilogue, at, p.I, first + unit, gate, up);
    };
    for_row_units(rows, finish);
    if (!p.gated) for_row_units(rows, [&](int row, int unit) { finish(row, kDecodeRows + unit); });
    __syncthreads();
  }
}

/// What a block of decode_w2 keeps: the active experts, the parts of their rows, one sum a slot and output column.
struct DecodeW2Layout {
  uint32_t count, sums, parts, bytes;  // offsets in bytes; the list stands at 0
};

/// w(slot) * (sum + bias), where a slot's sum is kept until those of its token are added up.
template <class T> MOE_DEVICE acc_t<T> weighted_sum(const ExpertMlp& p, int32_t slot, int32_t expert, int64_t h,
                                                    acc_t<T> sum) {
  using A = acc_t<T>;
  if (p.w2_bias) sum += widen(static_cast<const T*>(p.w2_bias)[expert * p.H + h]);
  return p.weight_on_input ? sum : static_cast<const A*>(p.topk_weights)[slot] * sum;
}

/// y[t][h0 .. h0 + width) = the sum over the slots of t, ascending. An absent slot has left its zero there.
template <class T> MOE_DEVICE void combine(const ExpertMlp& p, const acc_t<T>* sums, int width, int64_t h0, T* y) {
  for (int64_t i = threadIdx.x; i < p.T * width; i += blockDim.x) {
    const int64_t t = i / width, h = i % width;
    if (h0 + h >= p.H) continue;
    acc_t<T> sum = 0;
    for (int64_t slot = t * p.K; slot < (t + 1) * p.K; ++slot) sum += sums[slot * width + h];
    y[t * p.H + h0 + h] = narrow<T>(sum);
  }
}

/// y[:, 16 columns]: the rows of all experts, 64 at a time.
template <class T, int N>
MOE_KERNEL __launch_bounds__(256, N == 1 ? 2 : 1)
    decode_w2_kernel(ExpertMlp p, DecodeW2Layout layout, const T* act, T* y) {
  MOE_SHARED(unsigned char, shared);
  auto* list = reinterpret_cast<ActiveExpert*>(shared);
  auto* count = reinterpret_cast<int*>(shared + layout.count);
  auto* sums = reinterpret_cast<float*>(shared + layout.sums);
  const DecodeParts<1> parts{reinterpret_cast<float*>(shared + layout.parts)};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t h0 = int64_t(blockIdx.x) * kDecodeRows, S = p.T * p.K;
  for (int64_t i = threadIdx.x; i < S * kDecodeRows; i += blockDim.x) sums[i] = 0;
  griddepcontrol_wait();
  if (warp == 0) {
    const int found = active_experts(p.expert_offsets + 1, p.E, S, list);
    if (lane == 0) *count = found;
  }
  __syncthreads();

  int32_t base = 0;  // row of the first sums in `parts`
  const auto flush = [&](int32_t end) {
    __syncthreads();
    for_row_units(end - base, [&](int row, int unit) {
      if (h0 + unit >= p.H) return;
      int e = 0;  // of this row: the list is short, and the row is behind those that were flushed before
      while (list[e].end <= base + row) ++e;
      const int32_t slot = p.row_to_slot[base + row];
      sums[slot * kDecodeRows + unit] = weighted_sum<T>(p, slot, list[e].expert, h0 + unit, parts.get(row, unit));
    });
    __syncthreads();
    base = end;
  };
  for (int a = 0; a < *count; ++a) {
    const ActiveExpert active = list[a];
    const T* weight[1][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t n = h0 + lane / 4 + h * 8;
      weight[0][h] = nullptr;
      if (n < p.H)
        weight[0][h] = static_cast<const T*>(p.w2.data) + active.expert * p.w2.expert_stride + n * p.w2.row_stride;
    }
    const int part = (warp + a) % kDecodeWarps;  // parts may differ in length: every warp takes every part in turn
    for (int32_t r0 = active.begin; r0 < active.end; r0 += N * 8) {
      const int rows = min(N * 8, active.end - r0);
      if (r0 + rows - base > kDecodeTokens) flush(r0);
      const T* token[N];
#pragma unroll
      for (int n = 0; n < N; ++n) token[n] = n * 8 + lane / 4 < rows ? act + (r0 + n * 8 + lane / 4) * p.I : nullptr;
      float sum[1][N][4] = {};
      stream(sum, weight, token, p.I, part);
      parts.put(sum, part, r0 - base, rows);
    }
  }
  if (*count > 0) flush(list[*count - 1].end);
  combine<T>(p, sums, kDecodeRows, h0, y);
}

// ---------------------------------------------------------------- any type and stride: a warp a dot product

/// sum over k < K of a[k] * b[k * stride], in one order; every lane gets it.
template <class T> MOE_DEVICE acc_t<T> dot(const T* a, const T* b, int64_t stride, int64_t K) {
  acc_t<T> sum = 0;
  for (int64_t k = threadIdx.x % kWarp; k < K; k += kWarp) sum += widen(a[k]) * widen(b[k * stride]);
  return warp_sum(sum);
}
template <class T> MOE_DEVICE const T* weight_row(const Weight& w, int32_t expert, int64_t n) {
  return static_cast<const T*>(w.data) + expert * w.expert_stride + n * w.row_stride;
}

template <class T> MOE_KERNEL __launch_bounds__(256) decode_w13_plain_kernel(ExpertMlp p, RowsEpilogue epilogue) {
  using A = acc_t<T>;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const ActiveExpert active = active_expert(p.expert_offsets + 1, p.E, p.T * p.K, int(blockIdx.y));
  const int64_t unit = int64_t(blockIdx.x) * kDecodeWarps + threadIdx.x / kWarp;
  if (active.expert < 0 || unit >= p.I) return;
  const int64_t n = p.interleaved ? 2 * unit : unit;
  for (int64_t r = active.begin; r < active.end; ++r) {
    const T* x = static_cast<const T*>(p.x) + p.row_to_slot[r] / p.K * p.x_stride;
    A gate[1] = {dot(x, weight_row<T>(p.w13, active.expert, n), p.w13.col_stride, p.H)}, up[1] = {};
    if (p.gated) {
      const int64_t up_row = p.interleaved ? n + 1 : p.I + n;
      up[0] = dot(x, weight_row<T>(p.w13, active.expert, up_row), p.w13.col_stride, p.H);
    }
    if (threadIdx.x % kWarp == 0) {
      const EpilogueRow<A> at = epilogue_row<A>(epilogue, r, active.expert);
      finish_activation<T, 1>(epilogue, at, p.I, unit, gate, up);
    }
  }
}

/// A warp a column of y.
template <class T>
MOE_KERNEL __launch_bounds__(256) decode_w2_plain_kernel(ExpertMlp p, DecodeW2Layout layout, const T* act, T* y) {
  using A = acc_t<T>;
  MOE_SHARED(unsigned char, shared);
  auto* list = reinterpret_cast<ActiveExpert*>(shared);
  auto* count = reinterpret_cast<int*>(shared + layout.count);
  auto* sums = reinterpret_cast<A*>(shared + layout.sums);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t h0 = int64_t(blockIdx.x) * kDecodeWarps, h = h0 + warp, S = p.T * p.K;
  for (int64_t i = threadIdx.x; i < S * kDecodeWarps; i += blockDim.x) sums[i] = 0;
  griddepcontrol_wait();
  if (warp == 0) {
    const int found = active_experts(p.expert_offsets + 1, p.E, S, list);
    if (lane == 0) *count = found;
  }
  __syncthreads();
  for (int a = 0; a < *count && h < p.H; ++a)
    for (int64_t r = list[a].begin; r < list[a].end; ++r) {
      const A sum = dot(act + r * p.I, weight_row<T>(p.w2, list[a].expert, h), p.w2.col_stride, p.I);
      const int32_t slot = p.row_to_slot[r];
      if (lane == 0) sums[slot * kDecodeWarps + warp] = weighted_sum<T>(p, slot, list[a].expert, h, sum);
    }
  __syncthreads();
  combine<T>(p, sums, kDecodeWarps, h0, y);
}

}  // namespace moe::cuda

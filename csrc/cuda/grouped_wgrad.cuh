// SPDX-License-Identifier: Apache-2.0
// grouped_wgrad on a GPU. A block owns 128 x 128 elements of one expert's gradient and walks the expert's rows from the
// first to the last, so every element is summed by one thread in one order. Both sides lie as tokens come, a row a
// token, and the sum runs over tokens: ldmatrix turns both on their way into registers.
//   ring      kStages stages of kDepth rows of both sides; a row is gathered, or found in place, by cp.async
//   tails     rows past the expert's end and columns past the side's width are filled with zeros, on both sides:
//             0 times a neighbour's NaN would be NaN
#pragma once
#include "element.cuh"
#include "expert_rows.cuh"
#include "grouped_wgrad.h"
#include "mma_tile.cuh"

namespace moe::cuda {

template <class T> struct WgradTile {
  static constexpr int kWidth = 128, kThreads = 128, kStages = 4, kWarpWidth = 64;
  static constexpr int kDepth = 64 / int(sizeof(T));  // rows of a stage
  static constexpr int kChunks = kWidth * int(sizeof(T)) / kChunk;
  static constexpr int kRowsAtOnce = kThreads / kChunks;  // that the block copies
  static constexpr int kCopies = kDepth / kRowsAtOnce;    // of a thread, a side and stage
  static constexpr uint32_t kSideBytes = kDepth * kChunks * kChunk, kStageBytes = 2 * kSideBytes;
  static constexpr uint32_t kWeights = kStages * kStageBytes;  // where the weights of the rows stand
  static constexpr uint32_t kBytes = kWeights + kStages * kDepth * 4;
  static constexpr int kPitch = kWarpWidth + 8;  // floats from row to row of a warp's slice of the epilogue
  static_assert(kThreads / kWarp * 16 * kPitch * 4 <= int(kWeights), "the epilogue fits in the ring");

  /// A row of f32 is read by word, four rows at a time: their chunks go to different banks.
  MOE_DEVICE static uint32_t at(int row, int chunk) {
    if constexpr (sizeof(T) == 2) return swizzled<kChunks>(row, chunk);
    else return uint32_t(row * kChunks + (chunk ^ 2 * (row & 3))) * kChunk;
  }
};

/// What a thread copies of one side: chunk `threadIdx.x % kChunks` of kCopies rows a stage.
template <class T> struct WgradCopy {
  using Tile = WgradTile<T>;
  const unsigned char* column;
  uint32_t stride;  // bytes
  const int32_t* gather;
  bool gathered;
  Quotient token;
  uint32_t read, to;            // bytes of a chunk: 0 past the width | offset in a stage
  int32_t rows[Tile::kCopies];  // of the next stage: what gather says, -1 past the end

  MOE_DEVICE WgradCopy(const WgradSide& side, Quotient quotient, int64_t first, int64_t width, uint32_t part)
      : stride(uint32_t(side.row_stride * int64_t(sizeof(T)))),
        gather(side.gather),
        gathered(side.gather),
        token(quotient) {
    const int chunk = threadIdx.x % Tile::kChunks;
    const int64_t at = first + chunk * kVector<T>;
    read = at < width ? kChunk : 0;
    column = static_cast<const unsigned char*>(side.data) + (read != 0 ? at * int64_t(sizeof(T)) : 0);
    to = part + Tile::at(threadIdx.x / Tile::kChunks, chunk);
  }
  /// Looks the rows from r on up: a stage ahead, so that the answer is there when it is needed.
  MOE_DEVICE void look_up(int32_t r, int32_t end) {
    r += threadIdx.x / Tile::kChunks;
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i, r += Tile::kRowsAtOnce)
      if (r >= end) rows[i] = -1;
      else rows[i] = gathered ? __ldg(gather + r) : r;
  }
  MOE_DEVICE void start(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      // An address with nothing to read at it may be anything.
      cp_async_cg_16(stage + to + i * Tile::kRowsAtOnce * Tile::kChunks * kChunk,
                     column + uint64_t(token(rows[i])) * stride, rows[i] >= 0 ? read : 0);
    }
  }
};

/// The operands of a warp for 16 rows (bf16, f16) or 8 rows (f32) of a stage: 64 columns of either side.
struct WgradFragments { uint32_t left[4][4], right[8][2]; };

/// Two elements of neighbouring rows times their weights.
template <class T> MOE_DEVICE uint32_t weighted(uint32_t pair, float low, float high) {
  T v[2];
  v[0].bits = uint16_t(pair), v[1].bits = uint16_t(pair >> 16);
  const float a = widen(v[0]) * low, b = widen(v[1]) * high;
  return T::kBrain ? cvt_rn_bf16x2_f32(b, a) : cvt_rn_f16x2_f32(b, a);
}

/// Lane addresses are set up once; a load adds only what the compiler knows.
template <class T, bool Weighted> struct WgradLoads {
  using Tile = WgradTile<T>;
  static constexpr bool kWords = sizeof(T) == 4;
  static constexpr int kRows = kWords ? 8 : 16;
  uint32_t left, right;  // offsets in a stage of this lane's first element
  int lane;

  MOE_DEVICE WgradLoads(int lane, int warp) : lane(lane) {
    const int left_chunk = warp / 2 * Tile::kChunks / 2, right_chunk = warp % 2 * Tile::kChunks / 2;
    if constexpr (kWords) {
      left = Tile::at(lane % 4, left_chunk + lane / 16) + lane / 4 % 4 * 4;
      right = Tile::kSideBytes + Tile::at(lane % 4, right_chunk + lane / 16) + lane / 4 % 4 * 4;
    } else {
      left = Tile::at(lane % 8 + lane / 16 * 8, left_chunk + lane / 8 % 2);
      right = Tile::kSideBytes + Tile::at(lane % 8 + lane / 8 % 2 * 8, right_chunk + lane / 16);
    }
  }
  /// Rows kRows * k .. of the stage that begins at `stage`; `weights` are those of its rows.
  MOE_DEVICE void operator()(WgradFragments& f, uint32_t stage, const float* weights, int k) const {
    constexpr int row_bytes = Tile::kChunks * kChunk;
    if constexpr (kWords) {
      const float w[2] = {Weighted ? weights[k * 8 + lane % 4] : 1.f, Weighted ? weights[k * 8 + lane % 4 + 4] : 1.f};
      const auto word = [&](uint32_t at, int row) {
        return __uint_as_float(ld_shared(stage + at + (k * 8 + row) * row_bytes));
      };
#pragma unroll
      for (int v = 0; v < 16; ++v) {  // value v % 4 of fragment v / 4: 8 columns and 4 rows further
        const float value = word((left ^ (v / 4 % 2 * 64 + v % 2 * 32)) + v / 8 * 128, v / 2 % 2 * 4);
        f.left[v / 4][v % 4] = tf32_of(__float_as_uint(Weighted ? value * w[v / 2 % 2] : value));
      }
#pragma unroll
      for (int v = 0; v < 16; ++v)
        f.right[v / 2][v % 2] = tf32_of(__float_as_uint(word((right ^ (v / 2 % 4 * 32)) + v / 8 * 128, v % 2 * 4)));
    } else {
      const uint32_t base = stage + k * 16 * row_bytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) ldmatrix_x4_trans(f.left[i], base + (left ^ i * 32));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t pair[4];
        ldmatrix_x4_trans(pair, base + (right ^ j * 32));
        f.right[2 * j][0] = pair[0], f.right[2 * j][1] = pair[1];
        f.right[2 * j + 1][0] = pair[2], f.right[2 * j + 1][1] = pair[3];
      }
      if constexpr (Weighted) {
        const float* w = weights + k * 16 + lane % 4 * 2;
        const float near[2] = {w[0], w[1]}, far[2] = {w[8], w[9]};
#pragma unroll
        for (int v = 0; v < 16; ++v) {
          const float* pair = v / 2 % 2 ? far : near;
          f.left[v / 4][v % 4] = weighted<T>(f.left[v / 4][v % 4], pair[0], pair[1]);
        }
      }
    }
  }
};

using WgradSums = float[4][8][4];  // of a warp: 64 x 64

template <class T> MOE_DEVICE void multiply(WgradSums& sum, const WgradFragments& f) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (sizeof(T) == 4) mma_m16n8k8_tf32(sum[i][j], f.left[i], f.right[j]);
      else mma_m16n8k16<T>(sum[i][j], f.left[i], f.right[j]);
    }
}

/// A warp writes its 64 x 64 sums, 16 rows at a time through its slice of shared memory, 16 bytes a lane. Element
/// (n, k) goes to out + n * row + k.
template <class O>
MOE_DEVICE void store_sums(const WgradSums& sum, uint32_t slice, O* out, int64_t row, int64_t n_left, int64_t k_left,
                           bool accumulate) {
  constexpr int pitch = WgradTile<float>::kPitch, each = kVector<O>, vectors = 64 / each;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t to = slice + (lane / 4 * pitch + j * 8 + lane % 4 * 2) * 4;
      st_shared_v2(to, make_uint2(__float_as_uint(sum[i][j][0]), __float_as_uint(sum[i][j][1])));
      st_shared_v2(to + 8 * pitch * 4, make_uint2(__float_as_uint(sum[i][j][2]), __float_as_uint(sum[i][j][3])));
    }
    __syncwarp();
    for (int v = lane; v < 16 * vectors; v += kWarp) {
      const int n = v / vectors, k = v % vectors * each;
      if (i * 16 + n >= n_left || k >= k_left) continue;
      Elements<O, each> value;
      const bool turned = each == 8 && lane / 4 % 2;  // reads its second half first: so 8 lanes meet 32 banks
#pragma unroll
      for (int half = 0; half < each; half += 4) {
        const Elements<float, 4> part =
            unpack<float, 4>(ld_shared_v4(slice + (n * pitch + k + (half ^ (turned ? 4 : 0))) * 4));
#pragma unroll
        for (int c = 0; c < 4; ++c) value.v[half + c] = part.v[c];
      }
#pragma unroll
      for (int c = 0; c < each / 2; ++c) {
        const float low = value.v[c], high = value.v[c + each / 2];
        value.v[c] = turned ? high : low, value.v[c + each / 2] = turned ? low : high;
      }
      O* to = out + (i * 16 + n) * row + k;
      if (accumulate) {
        const Elements<O, each> before = load_again<each>(to);
#pragma unroll
        for (int c = 0; c < each; ++c) value.v[c] += before.v[c];
      }
      store(to, value);
    }
  }
}

/// blockIdx.x counts the tiles of an expert, then the experts. out_col is 1.
template <class T, bool Weighted>
MOE_KERNEL __launch_bounds__(128, 2) grouped_wgrad_kernel(GroupedWgradArgs args, Quotient n_token, Quotient k_token) {
  using Tile = WgradTile<T>;
  MOE_SHARED(unsigned char, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t n_tiles = uint32_t(args.N + Tile::kWidth - 1) / Tile::kWidth;
  const uint32_t k_tiles = uint32_t(args.K + Tile::kWidth - 1) / Tile::kWidth;
  const uint32_t e = blockIdx.x / (n_tiles * k_tiles), tile = blockIdx.x % (n_tiles * k_tiles);
  const int64_t n0 = int64_t(tile / k_tiles) * Tile::kWidth, k0 = int64_t(tile % k_tiles) * Tile::kWidth;
  const RowRange rows = rows_of(args.ends, e, args.S);
  if (args.accumulate && rows.begin == rows.end) return;
  const int steps = (rows.end - rows.begin + Tile::kDepth - 1) / Tile::kDepth;
  auto* weights = reinterpret_cast<float*>(shared + Tile::kWeights);
  const uint32_t ring = cvta_to_shared(shared);

  WgradCopy<T> n_copy(args.n_side, n_token, n0, args.N, 0), k_copy(args.k_side, k_token, k0, args.K, Tile::kSideBytes);
  int32_t next = rows.begin;  // row of the next stage to fill
  const auto look_up = [&] { n_copy.look_up(next, rows.end), k_copy.look_up(next, rows.end); };
  const auto fill = [&](int step) {
    if (step < steps) {
      const int slot = step % Tile::kStages;
      n_copy.start(ring + slot * Tile::kStageBytes), k_copy.start(ring + slot * Tile::kStageBytes);
      if (Weighted && threadIdx.x < Tile::kDepth) {
        const int32_t r = next + int32_t(threadIdx.x), from = r < rows.end ? __ldg(args.row_to_slot + r) : -1;
        cp_async_ca_4(cvta_to_shared(weights + slot * Tile::kDepth + threadIdx.x),
                      static_cast<const float*>(args.topk_weights) + max(from, 0), from >= 0 ? 4 : 0);
      }
      next += Tile::kDepth;
      look_up();
    }
    cp_async_commit_group();
  };
  look_up();
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) fill(step);

  WgradSums sum = {};
  const WgradLoads<T, Weighted> load_fragments(lane, warp);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait_group<Tile::kStages - 2>();
    __syncthreads();
    fill(step + Tile::kStages - 1);
    const int slot = step % Tile::kStages;
#pragma unroll
    for (int k = 0; k < Tile::kDepth / load_fragments.kRows; ++k) {
      WgradFragments f;
      load_fragments(f, ring + slot * Tile::kStageBytes, weights + slot * Tile::kDepth, k);
      multiply<T>(sum, f);
    }
  }
  __syncthreads();  // the ring becomes the slices of the epilogue; the copies that were awaited last were the last

  const uint32_t slice = ring + warp * 16 * Tile::kPitch * 4;
  const int64_t n = n0 + warp / 2 * Tile::kWarpWidth, k = k0 + warp % 2 * Tile::kWarpWidth;
  const int64_t at = e * args.out_expert + n * args.out_row + k;
  if (args.out_dtype == DType::f32) {
    store_sums(sum, slice, static_cast<float*>(args.out) + at, args.out_row, args.N - n, args.K - k, args.accumulate);
  } else if constexpr (sizeof(T) == 2) {
    store_sums(sum, slice, static_cast<T*>(args.out) + at, args.out_row, args.N - n, args.K - k, args.accumulate);
  }
}

constexpr int kWgradFmaWidth = 64, kWgradFmaDepth = 16, kWgradFmaThreads = 256;

/// One side of 16 rows from `row` on, in acc, zeros past the ends. Consecutive threads take what lies side by side.
template <class T> MOE_DEVICE void load_side(acc_t<T>* tile, const WgradSide& side, const GroupedWgradArgs& args,
                                             const acc_t<T>* topk_weights, int32_t row, int32_t end, int64_t first,
                                             int64_t width) {
  using A = acc_t<T>;
  const bool along = side.col_stride == 1;
  for (int i = threadIdx.x; i < kWgradFmaDepth * kWgradFmaWidth; i += kWgradFmaThreads) {
    const int r = along ? i / kWgradFmaWidth : i % kWgradFmaDepth, c = along ? i % kWgradFmaWidth : i / kWgradFmaDepth;
    int64_t from = row + r < end && first + c < width ? row + r : -1;
    const int32_t slot = from >= 0 && topk_weights ? args.row_to_slot[from] : 0;
    if (from >= 0 && side.gather) from = side.gather[from] < 0 ? -1 : side.gather[from] / side.per_token;
    A value = 0;
    if (from >= 0 && slot >= 0)
      value = widen(static_cast<const T*>(side.data)[from * side.row_stride + (first + c) * side.col_stride]);
    if (topk_weights && slot >= 0) value = widen(narrow<T>(topk_weights[slot] * value));
    tile[r * kWgradFmaWidth + c] = value;
  }
}

/// A thread's 4 x 4 elements, sixteen apart, of the tile that begins at (n, k) of out.
template <class O, class A>
MOE_DEVICE void store_fma(const GroupedWgradArgs& args, int64_t e, int64_t n, int64_t k, const A (&sum)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = n + 16 * i, col = k + 16 * j;
      if (row >= args.N || col >= args.K) continue;
      O* to = static_cast<O*>(args.out) + e * args.out_expert + row * args.out_row + col * args.out_col;
      const acc_t<O> before = args.accumulate ? widen(*to) : acc_t<O>(0);
      *to = narrow<O>(before + acc_t<O>(sum[i][j]));
    }
}

/// The same sum with plain multiply-adds in acc, any stride: 64 x 64 elements a block, 4 x 4 a thread.
template <class T> MOE_KERNEL __launch_bounds__(256, 2) grouped_wgrad_fma_kernel(GroupedWgradArgs args) {
  using A = acc_t<T>;
  MOE_SHARED(A, shared);
  A *n_tile = shared, *k_tile = shared + kWgradFmaDepth * kWgradFmaWidth;
  const uint32_t n_tiles = uint32_t(args.N + kWgradFmaWidth - 1) / kWgradFmaWidth;
  const uint32_t k_tiles = uint32_t(args.K + kWgradFmaWidth - 1) / kWgradFmaWidth;
  const uint32_t e = blockIdx.x / (n_tiles * k_tiles), tile = blockIdx.x % (n_tiles * k_tiles);
  const int64_t n0 = int64_t(tile / k_tiles) * kWgradFmaWidth, k0 = int64_t(tile % k_tiles) * kWgradFmaWidth;
  const RowRange rows = rows_of(args.ends, e, args.S);
  if (args.accumulate && rows.begin == rows.end) return;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  A sum[4][4] = {};
  for (int32_t r = rows.begin; r < rows.end; r += kWgradFmaDepth) {
    load_side<T>(n_tile, args.n_side, args, static_cast<const A*>(args.topk_weights), r, rows.end, n0, args.N);
    load_side<T>(k_tile, args.k_side, args, nullptr, r, rows.end, k0, args.K);
    __syncthreads();
    for (int d = 0; d < kWgradFmaDepth; ++d) {
      A n[4], k[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        n[i] = n_tile[d * kWgradFmaWidth + y + 16 * i];
        k[i] = k_tile[d * kWgradFmaWidth + x + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += n[i] * k[j];
    }
    __syncthreads();
  }
  switch (args.out_dtype) {
    case DType::f64: store_fma<double>(args, e, n0 + y, k0 + x, sum); break;
    case DType::f32: store_fma<float>(args, e, n0 + y, k0 + x, sum); break;
    case DType::bf16: store_fma<bf16>(args, e, n0 + y, k0 + x, sum); break;
    case DType::f16: store_fma<f16>(args, e, n0 + y, k0 + x, sum); break;
  }
}

}  // namespace moe::cuda

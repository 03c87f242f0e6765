// SPDX-License-Identifier: Apache-2.0
// grouped_wgrad on a GPU. A block owns 128 x 128 elements of one expert's gradient and walks the expert's rows from the
// first to the last, so every element is summed by one thread in one order. Both sides lie as tokens come, a row a
// token, and the sum runs over tokens: ldmatrix turns both on their way into registers.
//   ring      kStages stages of kDepth rows of both sides; a row is gathered, or found in place, by cp.async
//   tails     rows past the expert's end and columns past the side's width are filled with zeros, on both sides:
//             0 times a neighbour's NaN would be NaN
//   parts     few tiles and many rows: several blocks share a tile, each takes a stretch of the rows and writes its
//   sums
//             to args.partial, and grouped_wgrad_add adds them in order
#pragma once
#include "element.cuh"
#include "expert_rows.cuh"
#include "grouped_gemm_config.h"
#include "grouped_wgrad.h"
#include "mma_tile.cuh"

namespace moe::cuda {

template <class T> struct WgradTile {
  static constexpr int kWidth = kWgradWidth, kThreads = 128, kStages = 4, kWarpWidth = 64;
  static constexpr int kDepth = 64 / int(sizeof(T));  // rows of a stage
  static constexpr int kChunks = kWidth * int(sizeof(T)) / kChunk;
  static constexpr int kRowsAtOnce = kThreads / kChunks;  // that the block copies
  static constexpr int kCopies = kDepth / kRowsAtOnce;    // of a thread, a side and stage
  static constexpr uint32_t kSideBytes = kDepth * kChunks * kChunk, kStageBytes = 2 * kSideBytes;
  static constexpr uint32_t kBytes = kStages * kStageBytes;
  static constexpr int kPitch = kWarpWidth + 8;  // floats from row to row of a warp's slice of the epilogue
  static_assert(kThreads / kWarp * 16 * kPitch * 4 <= int(kBytes), "the epilogue fits in the ring");

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
  bool gathered, inside;  // the chunk is not past the width
  Quotient token;
  uint32_t to;                  // offset in a stage
  int32_t rows[Tile::kCopies];  // of the next stage: what gather says, -1 past the end

  MOE_DEVICE WgradCopy(const WgradSide& side, Quotient quotient, int64_t first, int64_t width, uint32_t part)
      : stride(uint32_t(side.row_stride * int64_t(sizeof(T)))),
        gather(side.gather),
        gathered(side.gather),
        token(quotient) {
    const int chunk = threadIdx.x % Tile::kChunks;
    const int64_t at = first + chunk * kVector<T>;
    inside = at < width;
    column = static_cast<const unsigned char*>(side.data) + (inside ? at * int64_t(sizeof(T)) : 0);
    to = part + Tile::at(threadIdx.x / Tile::kChunks, chunk);
  }
  /// Looks the rows from r on up: a stage ahead, so that the answer is there when it is needed.
  MOE_DEVICE void look_up(int32_t r, int32_t end) {
    r += threadIdx.x / Tile::kChunks;
    const int32_t* at = gathered ? gather + r : nullptr;
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i)
      if (r + i * Tile::kRowsAtOnce >= end) rows[i] = -1;
      else rows[i] = at ? __ldg(at + i * Tile::kRowsAtOnce) : r + i * Tile::kRowsAtOnce;
  }
  MOE_DEVICE void start(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < Tile::kCopies; ++i) {
      // An address with nothing to read at it may be anything.
      cp_async_cg_16(stage + to + i * Tile::kRowsAtOnce * Tile::kChunks * kChunk,
                     column + uint64_t(token(rows[i])) * stride, inside && rows[i] >= 0 ? kChunk : 0);
    }
  }
};

/// The operands of a warp for 16 rows (bf16, f16) or 8 rows (f32) of a stage: 64 columns of either side.
struct WgradFragments { uint32_t left[4][4], right[8][2]; };

/// Lane addresses are set up once; a load adds only what the compiler knows. f32 has no ldmatrix that turns: a lane
/// reads four neighbouring columns of a row at once, and these four go to four products, each of which takes every
/// fourth column of 32. row_of and stage_fours
/// know which column of either side a sum then belongs to.
template <class T> struct WgradLoads {
  using Tile = WgradTile<T>;
  static constexpr bool kWords = sizeof(T) == 4;
  static constexpr int kRows = kWords ? 8 : 16;
  uint32_t left, right;  // offsets in a stage of this lane's first element

  MOE_DEVICE WgradLoads(int lane, int warp) {
    const int left_chunk = warp / 2 * Tile::kChunks / 2, right_chunk = warp % 2 * Tile::kChunks / 2;
    if constexpr (kWords) {
      left = Tile::at(lane % 4, left_chunk + lane / 4);
      right = Tile::kSideBytes + Tile::at(lane % 4, right_chunk + lane / 4);
    } else {
      left = Tile::at(lane % 8 + lane / 16 * 8, left_chunk + lane / 8 % 2);
      right = Tile::kSideBytes + Tile::at(lane % 8 + lane / 8 % 2 * 8, right_chunk + lane / 16);
    }
  }
  /// Rows kRows * k .. of the stage that begins at `stage`.
  MOE_DEVICE void operator()(WgradFragments& f, uint32_t stage, int k) const {
    constexpr int row_bytes = Tile::kChunks * kChunk;
    const uint32_t base = stage + k * kRows * row_bytes;
    if constexpr (kWords) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {  // rows lane % 4 (+ 4), columns 0 .. 31 (+ 32)
        const int far = v % 2, group = v / 2;
        const uint32_t at = base + far * 4 * row_bytes + group * 32 * 4;
        const uint4 l = ld_shared_v4(at + left), r = ld_shared_v4(at + right);
        f.left[2 * group][2 * far] = tf32_of(l.x), f.left[2 * group][2 * far + 1] = tf32_of(l.y);
        f.left[2 * group + 1][2 * far] = tf32_of(l.z), f.left[2 * group + 1][2 * far + 1] = tf32_of(l.w);
        f.right[4 * group][far] = tf32_of(r.x), f.right[4 * group + 1][far] = tf32_of(r.y);
        f.right[4 * group + 2][far] = tf32_of(r.z), f.right[4 * group + 3][far] = tf32_of(r.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) ldmatrix_x4_trans(f.left[i], base + (left ^ i * 32));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t pair[4];
        ldmatrix_x4_trans(pair, base + (right ^ j * 32));
        f.right[2 * j][0] = pair[0], f.right[2 * j][1] = pair[1];
        f.right[2 * j + 1][0] = pair[2], f.right[2 * j + 1][1] = pair[3];
      }
    }
  }
  /// The left column that row `row` of the i-th 16 rows of sums is.
  MOE_DEVICE static int row_of(int i, int row) {
    return kWords ? i / 2 * 32 + row % 8 * 4 + i % 2 * 2 + row / 8 : i * 16 + row;
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
template <class T, class O>
MOE_DEVICE void store_sums(const WgradSums& sum, uint32_t slice, O* out, int64_t row, int64_t n_left, int64_t k_left,
                           bool accumulate) {
  constexpr int pitch = WgradTile<T>::kPitch, each = kVector<O>, vectors = 64 / each;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __syncwarp();
    if constexpr (sizeof(T) == 4) stage_fours(slice, pitch * 4, lane, sum[i]);
    else stage_pairs(slice, pitch * 4, lane, sum[i]);
    __syncwarp();
    for (int v = lane; v < 16 * vectors; v += kWarp) {
      const int from = v / vectors, n = WgradLoads<T>::row_of(i, from), k = v % vectors * each;
      if (n >= n_left || k >= k_left) continue;
      Elements<O, each> value;
      const bool turned = each == 8 && lane / 4 % 2;  // reads its second half first: so 8 lanes meet 32 banks
#pragma unroll
      for (int half = 0; half < each; half += 4) {
        const Elements<float, 4> part =
            unpack<float, 4>(ld_shared_v4(slice + (from * pitch + k + (half ^ (turned ? 4 : 0))) * 4));
#pragma unroll
        for (int c = 0; c < 4; ++c) value.v[half + c] = part.v[c];
      }
#pragma unroll
      for (int c = 0; c < each / 2; ++c) {
        const float low = value.v[c], high = value.v[c + each / 2];
        value.v[c] = turned ? high : low, value.v[c + each / 2] = turned ? low : high;
      }
      O* to = out + n * row + k;
      if (accumulate) {
        const Elements<O, each> before = load_again<each>(to);
#pragma unroll
        for (int c = 0; c < each; ++c) value.v[c] += before.v[c];
      }
      store(to, value);
    }
  }
}

/// Which tile of which expert a block computes, over which rows, and where it goes. Blocks count the k-tiles, then the
/// n-tiles, the experts and the parts.
struct WgradBlock {
  uint32_t e, part;
  int64_t n0, k0;
  RowRange rows;
  bool idle;  // nothing is added to the gradient of this expert

  MOE_DEVICE WgradBlock(const GroupedWgradArgs& args, int width, int depth) {
    const uint32_t n_tiles = uint32_t(args.N + width - 1) / width, k_tiles = uint32_t(args.K + width - 1) / width;
    const uint32_t tile = blockIdx.x % (n_tiles * k_tiles), group = blockIdx.x / (n_tiles * k_tiles);
    e = group % uint32_t(args.E), part = group / uint32_t(args.E);
    n0 = int64_t(tile / k_tiles) * width, k0 = int64_t(tile % k_tiles) * width;
    rows = rows_of(args.ends, e, args.S);
    idle = args.accumulate && rows.begin == rows.end;
    if (args.parts <= 1) return;
    const int64_t each = ((rows.end - rows.begin + args.parts - 1) / args.parts + depth - 1) / depth * depth;
    const int64_t begin = rows.begin + part * each, end = begin + each;
    rows = {int32_t(min(begin, int64_t(rows.end))), int32_t(min(end, int64_t(rows.end)))};
  }
};

/// out_col is 1.
template <class T>
MOE_KERNEL __launch_bounds__(128, 2) grouped_wgrad_kernel(GroupedWgradArgs args, Quotient n_token, Quotient k_token) {
  using Tile = WgradTile<T>;
  MOE_SHARED(unsigned char, shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const WgradBlock block(args, Tile::kWidth, Tile::kDepth);
  if (block.idle) return;
  const RowRange rows = block.rows;
  const int steps = (rows.end - rows.begin + Tile::kDepth - 1) / Tile::kDepth;
  const uint32_t ring = cvta_to_shared(shared);

  WgradCopy<T> n_copy(args.n_side, n_token, block.n0, args.N, 0);
  WgradCopy<T> k_copy(args.k_side, k_token, block.k0, args.K, Tile::kSideBytes);
  int32_t next = rows.begin;  // row of the next stage to fill
  const auto look_up = [&] { n_copy.look_up(next, rows.end), k_copy.look_up(next, rows.end); };
  const auto fill = [&](int step) {
    if (step < steps) {
      const int slot = step % Tile::kStages;
      n_copy.start(ring + slot * Tile::kStageBytes), k_copy.start(ring + slot * Tile::kStageBytes);
      next += Tile::kDepth;
      look_up();
    }
    cp_async_commit_group();
  };
  look_up();
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) fill(step);

  WgradSums sum = {};
  const WgradLoads<T> load_fragments(lane, warp);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait_group<Tile::kStages - 2>();
    __syncthreads();
    fill(step + Tile::kStages - 1);
    const int slot = step % Tile::kStages;
#pragma unroll
    for (int k = 0; k < Tile::kDepth / load_fragments.kRows; ++k) {
      WgradFragments f;
      load_fragments(f, ring + slot * Tile::kStageBytes, k);
      multiply<T>(sum, f);
    }
  }
  __syncthreads();  // the ring becomes the slices of the epilogue; the copies that were awaited last were the last

  const uint32_t slice = ring + warp * 16 * Tile::kPitch * 4;
  const int64_t n = block.n0 + warp / 2 * Tile::kWarpWidth, k = block.k0 + warp % 2 * Tile::kWarpWidth;
  const int64_t at = block.e * args.out_expert + n * args.out_row + k;
  if (args.parts > 1) {
    float* part = static_cast<float*>(args.partial) + (int64_t(block.part) * args.E + block.e) * args.N * args.K;
    store_sums<T>(sum, slice, part + n * args.K + k, args.K, args.N - n, args.K - k, false);
  } else if (args.out_dtype == DType::f32) {
    float* out = static_cast<float*>(args.out) + at;
    store_sums<T>(sum, slice, out, args.out_row, args.N - n, args.K - k, args.accumulate);
  } else if constexpr (sizeof(T) == 2) {
    T* out = static_cast<T*>(args.out) + at;
    store_sums<T>(sum, slice, out, args.out_row, args.N - n, args.K - k, args.accumulate);
  }
}

constexpr int kAddThreads = 256;

/// out (+)= the parts in order, an element a thread, as args.out lies after the sides were exchanged.
template <class O, class A> MOE_DEVICE void add_parts(const GroupedWgradArgs& args, int64_t e) {
  const uint32_t elements = uint32_t(args.N * args.K), columns = uint32_t(args.K);
  for (uint32_t i = blockIdx.x * kAddThreads + threadIdx.x; i < elements; i += gridDim.x * kAddThreads) {
    O* to = static_cast<O*>(args.out) + e * args.out_expert + i / columns * args.out_row + i % columns * args.out_col;
    A sum = 0;
    for (int64_t part = 0; part < args.parts; ++part)
      sum += static_cast<const A*>(args.partial)[(part * args.E + e) * elements + i];
    const acc_t<O> before = args.accumulate ? widen(*to) : acc_t<O>(0);
    *to = narrow<O>(before + acc_t<O>(sum));
  }
}
template <class A> MOE_KERNEL __launch_bounds__(kAddThreads) grouped_wgrad_add_kernel(GroupedWgradArgs args) {
  for (int64_t e = blockIdx.y; e < args.E; e += gridDim.y) {
    const RowRange rows = rows_of(args.ends, e, args.S);
    if (args.accumulate && rows.begin == rows.end) continue;
    switch (args.out_dtype) {
      case DType::f64: add_parts<double, A>(args, e); break;
      case DType::f32: add_parts<float, A>(args, e); break;
      case DType::bf16: add_parts<bf16, A>(args, e); break;
      case DType::f16: add_parts<f16, A>(args, e); break;
    }
  }
}

constexpr int kWgradFmaDepth = 16, kWgradFmaThreads = 256;

/// One side of 16 rows from `row` on, in acc, zeros past the ends. Consecutive threads take what lies side by side.
template <class T> MOE_DEVICE void load_side(acc_t<T>* tile, const WgradSide& side, int32_t row, int32_t end,
                                             int64_t first, int64_t width) {
  using A = acc_t<T>;
  const bool along = side.col_stride == 1;
  for (int i = threadIdx.x; i < kWgradFmaDepth * kWgradFmaWidth; i += kWgradFmaThreads) {
    const int r = along ? i / kWgradFmaWidth : i % kWgradFmaDepth, c = along ? i % kWgradFmaWidth : i / kWgradFmaDepth;
    int64_t from = row + r < end && first + c < width ? row + r : -1;
    if (from >= 0 && side.gather) from = side.gather[from] < 0 ? -1 : side.gather[from] / side.per_token;
    A value = 0;
    if (from >= 0)
      value = widen(static_cast<const T*>(side.data)[from * side.row_stride + (first + c) * side.col_stride]);
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
  const WgradBlock block(args, kWgradFmaWidth, kWgradFmaDepth);
  if (block.idle) return;
  const RowRange rows = block.rows;
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  A sum[4][4] = {};
  for (int32_t r = rows.begin; r < rows.end; r += kWgradFmaDepth) {
    load_side<T>(n_tile, args.n_side, r, rows.end, block.n0, args.N);
    load_side<T>(k_tile, args.k_side, r, rows.end, block.k0, args.K);
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
  const int64_t n = block.n0 + y, k = block.k0 + x;
  if (args.parts > 1) {
    const int64_t part = (int64_t(block.part) * args.E + block.e) * args.N * args.K;
    GroupedWgradArgs to = args;
    to.out = static_cast<A*>(args.partial) + part, to.out_row = args.K, to.out_col = 1, to.accumulate = false;
    return store_fma<A>(to, 0, n, k, sum);
  }
  switch (args.out_dtype) {
    case DType::f64: store_fma<double>(args, block.e, n, k, sum); break;
    case DType::f32: store_fma<float>(args, block.e, n, k, sum); break;
    case DType::bf16: store_fma<bf16>(args, block.e, n, k, sum); break;
    case DType::f16: store_fma<f16>(args, block.e, n, k, sum); break;
  }
}

}  // namespace moe::cuda

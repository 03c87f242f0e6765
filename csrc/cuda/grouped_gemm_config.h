// SPDX-License-Identifier: Apache-2.0
// Which kernel computes a grouped product: one ordered table, and a model of clocks that picks a row. Plain C++, so
// that a launcher, a test and mk.explain ask the same function. No tuning files: every number below is a property of
// the processor or of the tile. The model ranks tiles, it does not predict time.
#pragma once
#include "../moe.h"

namespace moe::cuda {

/// A tile of D that a block computes, and how. mma: 16 rows by 8 columns by 32 bytes of the sum at a time, each warp
/// its part of the tile, a block a tile. wgmma (sm_90a, `consumers` > 0): 64 rows by all columns at a time; blocks
/// stay.
struct TileRow {
  const char* name;
  int rows, columns;     // of D
  int slice;             // bytes of the sum in a stage
  int stages;            // in shared memory, all but one of them in flight
  int warps_m, warps_n;  // of a block that multiply; of a consumer where tiles are its own
  bool has_tf32;
  int consumers = 0;       // warpgroups, beside one that copies
  bool ping_pong = false;  // a tile is one consumer's, and one of them finishes while the other multiplies
  int cluster = 1;         // blocks with neighbouring rows that share what they read of b
  constexpr bool wgmma() const { return consumers > 0; }
  constexpr int warps() const { return wgmma() ? 4 * (1 + consumers) : warps_m * warps_n; }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int warp_rows() const { return rows / warps_m; }
  constexpr int warp_columns() const { return columns / warps_n; }
  constexpr int stage_bytes() const { return (rows + columns) * slice; }
  constexpr int staging_stride() const { return (warp_columns() + 8) * 4; }  // rows 8 banks apart
  constexpr int shared_bytes() const {
    if (wgmma()) return 1024 + stages * (stage_bytes() + 16) + 16;  // alignment and barriers
    const int staging = warps() * 16 * staging_stride(), ring = stages * stage_bytes();
    return staging > ring ? staging : ring;
  }
  constexpr int registers() const { return wgmma() ? 168 : warp_rows() * warp_columns() / 32 + 112; }  // about
};

constexpr TileRow kTileRows[] = {
    {"wgmma 2x128x256", 128, 256, 128, 4, 8, 1, false, 2, false, 2},
    {"wgmma 128x256", 128, 256, 128, 4, 8, 1, false, 2},
    {"wgmma 2x64x256", 64, 256, 128, 5, 4, 1, false, 2, true, 2},
    {"wgmma 64x256", 64, 256, 128, 5, 4, 1, false, 2, true},
    {"mma 128x256", 128, 256, 64, 4, 2, 4, false},
    {"mma 128x128", 128, 128, 64, 3, 2, 2, true},
    {"mma 64x128", 64, 128, 64, 4, 2, 2, true},
    {"mma 16x128", 16, 128, 128, 4, 1, 4, true},
    {"fma", 32, 32, 0, 1, 1, 1, false},  // grouped_fma.cu: multiply-adds, takes everything
};
constexpr int kTileCount = sizeof(kTileRows) / sizeof(kTileRows[0]), kFma = kTileCount - 1;

/// A processor as the model sees it. The clocks are those of one multiprocessor.
struct Processor {
  int arch;           // 80, 86, 89, 90, 100, 120
  int count;          // multiprocessors
  int shared_bytes;   // a block may have at most
  int shared_in_all;  // of a multiprocessor
  int multiply_adds;  // a clock, 16-bit operands, mma.sync
  int cache_bytes;    // a clock, from L2
  int wgmma = 0;      // multiply-adds a clock by wgmma; 0: it has none
};
/// By architecture; one that is newer than all counts as the one before it.
constexpr Processor kProcessors[] = {
    {80, 108, 163 << 10, 164 << 10, 1024, 48},  {86, 84, 99 << 10, 100 << 10, 512, 24},
    {89, 128, 99 << 10, 100 << 10, 512, 24},    {90, 132, 227 << 10, 228 << 10, 1280, 40, 2048},
    {100, 148, 227 << 10, 228 << 10, 1280, 40}, {120, 170, 99 << 10, 100 << 10, 512, 24},
};
constexpr Processor processor_of(int arch) {
  Processor found{};  // arch 0: older than all
  for (const Processor& p : kProcessors)
    if (p.arch <= arch) found = p;
  return found;
}

/// A product as the choice sees it: what the host knows, never how many rows an expert has.
struct ProductShape {
  int64_t E, S, N, K;
  DType dtype;
  bool allow_tf32;
  bool in_16_bytes;     // rows of a, and of b along the sum or along N, start and end at multiples of 16 bytes
  bool in_maps = true;  // tensor maps can hold a and b
};

constexpr int64_t ceil_of(int64_t n, int64_t d) { return (n + d - 1) / d; }

/// Why this row does not take the product, or null.
constexpr const char* refusal(const TileRow& row, const ProductShape& p, const Processor& on) {
  if (row.slice == 0) return nullptr;
  if (on.arch < 80) return "the processor is older than sm_80";
  if (row.wgmma()) {
    if (on.wgmma == 0) return "wgmma is sm_90's, in a build for sm_90a";
    if (dtype_bytes(p.dtype) != 2) return "wgmma multiplies 16-bit types here";
    if (p.K == 0) return "the sum is empty";
    if (!p.in_maps) return "a tensor map cannot hold a or b";
  }
  if (p.dtype == DType::f64) return "no tensor core sums float64 here";
  if (p.dtype == DType::f32 && !p.allow_tf32) return "float32 is summed exactly unless tf32 is allowed";
  if (p.dtype == DType::f32 && !row.has_tf32) return "no tf32 kernel of this size";
  if (!p.in_16_bytes) return "rows do not start and end at multiples of 16 bytes";
  if (p.S >= int64_t(1) << 31 || p.N >= int64_t(1) << 30 || p.K >= int64_t(1) << 28) return "too large";
  if (row.shared_bytes() > on.shared_bytes) return "the stages do not fit into shared memory";
  return nullptr;
}

/// Blocks that a multiprocessor holds, by shared memory and registers.
constexpr int64_t blocks_at_once(const TileRow& row, const Processor& on) {
  const int64_t by_shared = on.shared_in_all / (row.shared_bytes() + 1024);
  const int64_t by_registers = 65536 / (row.threads() * row.registers());
  const int64_t least = by_shared < by_registers ? by_shared : by_registers;
  return least < 1 ? 1 : least;
}

/// The longest of what a slice of a tile takes: products, shared memory, the L2 cache.
constexpr int64_t slice_clocks(const TileRow& row, int64_t element, const Processor& on) {
  const int64_t products = int64_t(row.rows) * row.columns * (row.slice / element);
  const int64_t mma = row.wgmma() ? products / on.wgmma : products * (element == 4 ? 2 : 1) / on.multiply_adds;
  // wgmma reads the columns anew for every 64 rows, mma.sync the rows and columns of every warp.
  const int64_t read =
      row.wgmma() ? row.rows / 64 * (64 + row.columns) : row.warps() * (row.warp_rows() + row.warp_columns());
  const int64_t shared = read * row.slice / 128;
  const int64_t cache = (row.rows + row.columns / row.cluster) * row.slice / on.cache_bytes;
  return mma > shared ? (mma > cache ? mma : cache) : (shared > cache ? shared : cache);
}

/// Clocks of the product with this row: waves of tiles, each bound by the longest of a slice, plus what a tile pays
/// once. Rows are taken as spread evenly over the experts.
constexpr int64_t clocks_of(const TileRow& row, const ProductShape& p, const Processor& on) {
  const int64_t element = p.dtype == DType::f32 ? 4 : 2, E = p.E < p.S ? p.E : p.S;
  if (E == 0 || p.N == 0) return 0;
  const int64_t row_tiles = ceil_of(ceil_of(p.S, E), row.rows * row.cluster) * row.cluster;
  const int64_t rounds = ceil_of(E * row_tiles * ceil_of(p.N, row.columns), on.count);
  const int64_t slices = ceil_of(p.K * element, row.slice) * slice_clocks(row, element, on);
  const int64_t sums = int64_t(row.rows) * row.columns;
  if (row.wgmma()) {  // a block starts once; sums are exchanged and written while nobody multiplies, or the other one
                      // does
    const int64_t once = 1000 + sums / 8, both = (slices + once + 1) / 2;
    return row.ping_pong ? rounds * (slices > both ? slices : both) + once : rounds * (slices + once);
  }
  // Once a block: its place in the grid and the first stages, then the sums through shared memory and out.
  const int64_t once = 1200 + sums / 16;
  // Blocks of one multiprocessor share its units; what a block pays once hides behind the others.
  return rounds * slices + ceil_of(rounds, blocks_at_once(row, on)) * once;
}

/// The row of kTileRows for a product: the fewest clocks of those that do not refuse; the last one takes everything.
constexpr int choose_config(const ProductShape& p, const Processor& on) {
  int best = kFma;
  int64_t least = 0;
  for (int i = 0; i < kFma; ++i) {
    if (refusal(kTileRows[i], p, on) != nullptr) continue;
    const int64_t clocks = clocks_of(kTileRows[i], p, on);
    if (best == kFma || clocks < least) best = i, least = clocks;
  }
  return best;
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// Which kernel computes a grouped product: one ordered table, and a model of clocks that picks a row. Plain C++, so
// that a launcher, a test and mk.explain ask the same function. No tuning files: every number below is a property of
// the processor or of the tile. The model ranks tiles, it does not predict time.
#pragma once
#include "../moe.h"

namespace moe::cuda {

/// A tile of D that one block computes: 16 rows by 8 columns by 32 bytes of the sum at a time on the tensor cores.
struct TileRow {
  const char* name;
  int rows, columns;     // of D
  int slice;             // bytes of the sum in a stage
  int stages;            // in shared memory, all but one of them in flight
  int warps_m, warps_n;  // of a block
  bool has_tf32;
  constexpr int warps() const { return warps_m * warps_n; }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int warp_rows() const { return rows / warps_m; }
  constexpr int warp_columns() const { return columns / warps_n; }
  constexpr int stage_bytes() const { return (rows + columns) * slice; }
  constexpr int staging_stride() const { return (warp_columns() + 8) * 4; }  // rows 8 banks apart
  constexpr int shared_bytes() const {
    const int staging = warps() * 16 * staging_stride(), ring = stages * stage_bytes();
    return staging > ring ? staging : ring;
  }
  constexpr int registers() const { return warp_rows() * warp_columns() / 32 + 112; }  // of a thread, about
};

constexpr TileRow kTileRows[] = {
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
};
/// By architecture; one that is newer than all counts as the one before it.
constexpr Processor kProcessors[] = {
    {80, 108, 163 << 10, 164 << 10, 1024, 48},  {86, 84, 99 << 10, 100 << 10, 512, 24},
    {89, 128, 99 << 10, 100 << 10, 512, 24},    {90, 132, 227 << 10, 228 << 10, 1280, 40},
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
  bool in_16_bytes;  // rows of a, and of b along the sum or along N, start and end at multiples of 16 bytes
};

constexpr int64_t ceil_of(int64_t n, int64_t d) { return (n + d - 1) / d; }

/// Why this row does not take the product, or null.
constexpr const char* refusal(const TileRow& row, const ProductShape& p, const Processor& on) {
  if (row.slice == 0) return nullptr;
  if (on.arch < 80) return "the processor is older than sm_80";
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

/// Clocks of the product with this row: waves of blocks, each bound by the tensor cores, by shared memory or by the L2
/// cache, plus what a block pays once. Rows are taken as spread evenly over the experts.
constexpr int64_t clocks_of(const TileRow& row, const ProductShape& p, const Processor& on) {
  const int64_t element = p.dtype == DType::f32 ? 4 : 2, E = p.E < p.S ? p.E : p.S;
  if (E == 0 || p.N == 0) return 0;
  const int64_t tiles = E * ceil_of(ceil_of(p.S, E), row.rows) * ceil_of(p.N, row.columns);
  const int64_t slices = ceil_of(p.K * element, row.slice);
  const int64_t products = int64_t(row.rows) * row.columns * (row.slice / element);
  const int64_t mma = products * (element == 4 ? 2 : 1) / on.multiply_adds;
  const int64_t shared = row.warps() * (row.warp_rows() + row.warp_columns()) * row.slice / 128;
  const int64_t cache = row.stage_bytes() / on.cache_bytes;
  const int64_t slice = mma > shared ? (mma > cache ? mma : cache) : (shared > cache ? shared : cache);
  // Once a block: its place in the grid and the first stages, then the sums through shared memory and out.
  const int64_t once = 1200 + int64_t(row.rows) * row.columns / 16;
  const int64_t at_once = blocks_at_once(row, on), rounds = ceil_of(tiles, on.count);
  // Blocks of one multiprocessor share its units; what a block pays once hides behind the others.
  return rounds * slices * slice + ceil_of(rounds, at_once) * once;
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

// Columns of a tile of a weight gradient on tensor cores and with multiply-adds, and the rows that a part of an expert
// has at least: fewer do not pay for adding the parts up.
constexpr int kWgradWidth = 128, kWgradFmaWidth = 64;
constexpr int64_t kWgradLeastRows = 512;

/// Into how many parts the rows of every expert are cut for the gradients [E, N, K] of weights: so many that two blocks
/// a multiprocessor have a tile each, if the rows were spread evenly.
constexpr int64_t wgrad_parts(const ProductShape& p, const Processor& on) {
  const bool mma = p.in_16_bytes && p.dtype != DType::f64 && (p.dtype != DType::f32 || p.allow_tf32);
  const int64_t width = mma ? kWgradWidth : kWgradFmaWidth, room = 2 * on.count;
  const int64_t tiles = p.E * ceil_of(p.N, width) * ceil_of(p.K, width);
  if (tiles == 0 || tiles >= room) return 1;
  const int64_t wanted = ceil_of(room, tiles), most = p.S / p.E / kWgradLeastRows;
  return most < 1 ? 1 : most < wanted ? most : wanted;
}

}  // namespace moe::cuda

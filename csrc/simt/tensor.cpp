// SPDX-License-Identifier: Apache-2.0
// Tiles and tensor cores of a warp: ldmatrix, stmatrix, mma.sync, and the conversions that feed them. The fragment
// maps are those of tests/golden/hw, which the emulator is tested against. A product is summed exactly and rounded
// once; hardware rounds in its own order, so kernels compare with a tolerance.
#include <cmath>
#include <cstring>

#include "../dtype.h"
#include "collectives.h"
#include "report.h"

namespace moe::simt {
namespace {

struct Tile {
  uint32_t* registers;
  uint8_t* row;  // 16 bytes, null in a lane whose address is not used
  int matrices;
  bool transposed;
  const void* site;
};
Tile& tile_of(void** arguments, uint32_t lane) { return *static_cast<Tile*>(arguments[lane]); }

// The two elements of an 8x8 matrix in a lane's register: (row, column) of its low and of its high half.
void elements(uint32_t lane, bool transposed, int half, int& row, int& column) {
  const int major = int(lane / 4), minor = int(2 * (lane % 4)) + half;
  row = transposed ? minor : major;
  column = transposed ? major : minor;
}

// An element is read or written by the lane that holds it in a register, whichever lane gave its row's address.
Thread& lane_thread(uint32_t lane) { return running->block->threads[running->warp() * 32 + lane]; }

void do_ldmatrix(void** arguments, uint32_t mask) {
  for_lanes(mask, [&](uint32_t lane) {
    const Tile& tile = tile_of(arguments, lane);
    for (int m = 0; m < tile.matrices; ++m) {
      uint32_t packed = 0;
      for (int half = 0; half < 2; ++half) {
        int row, column;
        elements(lane, tile.transposed, half, row, column);
        const uint8_t* const from = tile_of(arguments, uint32_t(8 * m + row)).row + 2 * column;
        touch_shared_as(lane_thread(lane), {from, 2, Access::read, tile.site});
        uint16_t value;
        std::memcpy(&value, from, 2);
        packed |= uint32_t(value) << (16 * half);
      }
      tile.registers[m] = packed;
    }
  });
}

void do_stmatrix(void** arguments, uint32_t mask) {
  for_lanes(mask, [&](uint32_t lane) {
    const Tile& tile = tile_of(arguments, lane);
    for (int m = 0; m < tile.matrices; ++m) {
      for (int half = 0; half < 2; ++half) {
        int row, column;
        elements(lane, tile.transposed, half, row, column);
        const uint16_t value = uint16_t(tile.registers[m] >> (16 * half));
        uint8_t* const to = tile_of(arguments, uint32_t(8 * m + row)).row + 2 * column;
        touch_shared_as(lane_thread(lane), {to, 2, Access::write, tile.site});
        std::memcpy(to, &value, 2);
      }
    }
  });
}

// Lanes 8j..8j+7 name the rows of matrix j.
uint8_t* tile_row(uint32_t address, int matrices, Access kind, const char* what, const void* site) {
  running->site = site;
  if (running->lane() >= uint32_t(8 * matrices)) return nullptr;
  uint8_t* const row = shared_pointer(address, 16, 16, what);
  if (auditing) audit(site, Space::shared, kind, shared_offset(address), 16);
  return row;
}

// ---------------------------------------------------------------- mma.sync
struct Product {
  float* d;
  const uint32_t *a, *b;
};
Product& product_of(void** arguments, uint32_t lane) { return *static_cast<Product*>(arguments[lane]); }

struct F16 {
  static float value(uint32_t bits) { return cvt_f32_f16(uint16_t(bits)); }
};
struct Bf16 {
  static float value(uint32_t bits) {
    bf16 v;
    v.bits = uint16_t(bits);
    return v;
  }
};

float tf32_value(uint32_t bits) {
  float v;
  bits &= 0xffffe000;  // the hardware reads 10 bits of mantissa
  std::memcpy(&v, &bits, 4);
  return v;
}

// Value v of a lane, 16-bit types: row g + 8*(v/2 % 2), k = 2t + v%2 + 8*(v/4) in A; n = g, k = 2t + v%2 + 8*(v/2) in
// B.
template <class T, int K> void gather16(void** arguments, float (&a)[16][16], float (&b)[8][16]) {
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const Product& p = product_of(arguments, lane);
    const int g = int(lane / 4), t = int(lane % 4);
    for (int v = 0; v < K / 2; ++v) {
      a[g + 8 * (v / 2 % 2)][2 * t + v % 2 + 8 * (v / 4)] = T::value(p.a[v / 2] >> (16 * (v % 2)));
    }
    for (int v = 0; v < K / 4; ++v) b[g][2 * t + v % 2 + 8 * (v / 2)] = T::value(p.b[v / 2] >> (16 * (v % 2)));
  }
}

void gather_tf32(void** arguments, float (&a)[16][16], float (&b)[8][16]) {
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const Product& p = product_of(arguments, lane);
    const int g = int(lane / 4), t = int(lane % 4);
    for (int v = 0; v < 4; ++v) a[g + 8 * (v % 2)][t + 4 * (v / 2)] = tf32_value(p.a[v]);
    for (int v = 0; v < 2; ++v) b[g][t + 4 * v] = tf32_value(p.b[v]);
  }
}

void multiply(void** arguments, const float (&a)[16][16], const float (&b)[8][16], int depth) {
  for (uint32_t lane = 0; lane < 32; ++lane) {
    float* const d = product_of(arguments, lane).d;
    for (int v = 0; v < 4; ++v) {
      const uint32_t row = lane / 4 + 8 * uint32_t(v / 2), column = 2 * (lane % 4) + uint32_t(v % 2);
      double sum = d[v];
      for (int k = 0; k < depth; ++k) sum += double(a[row][k]) * double(b[column][k]);
      d[v] = float(sum);
    }
  }
}

template <Mma kind> void do_mma(void** arguments, uint32_t) {
  float a[16][16], b[8][16];
  if constexpr (kind == Mma::m16n8k16_bf16) gather16<Bf16, 16>(arguments, a, b);
  if constexpr (kind == Mma::m16n8k16_f16) gather16<F16, 16>(arguments, a, b);
  if constexpr (kind == Mma::m16n8k8_bf16) gather16<Bf16, 8>(arguments, a, b);
  if constexpr (kind == Mma::m16n8k8_tf32) gather_tf32(arguments, a, b);
  multiply(arguments, a, b, kind == Mma::m16n8k16_bf16 || kind == Mma::m16n8k16_f16 ? 16 : 8);
}

constexpr uint32_t kAllLanes = 0xffffffffu;

}  // namespace

void ldmatrix(uint32_t* r, int matrices, uint32_t row, bool transposed) {
  static const char* const names[] = {"", "ldmatrix.x1", "ldmatrix.x2", "", "ldmatrix.x4"};
  const void* const site = MOE_SIMT_SITE;
  Tile tile{r, tile_row(row, matrices, Access::read, names[matrices], site), matrices, transposed, site};
  meet(names[matrices], kAllLanes, &tile, do_ldmatrix, site);
}

void stmatrix(uint32_t row, const uint32_t* r, int matrices, bool transposed) {
  static const char* const names[] = {"", "stmatrix.x1", "stmatrix.x2", "", "stmatrix.x4"};
  const void* const site = MOE_SIMT_SITE;
  Tile tile{const_cast<uint32_t*>(r), tile_row(row, matrices, Access::write, names[matrices], site), matrices,
            transposed, site};
  meet(names[matrices], kAllLanes, &tile, do_stmatrix, site);
}

void mma(Mma kind, float* d, const uint32_t* a, const uint32_t* b) {
  static const char* const names[] = {"mma.m16n8k16.bf16", "mma.m16n8k16.f16", "mma.m16n8k8.bf16", "mma.m16n8k8.tf32"};
  static void (*const work[])(void**, uint32_t) = {do_mma<Mma::m16n8k16_bf16>, do_mma<Mma::m16n8k16_f16>,
                                                   do_mma<Mma::m16n8k8_bf16>, do_mma<Mma::m16n8k8_tf32>};
  Product product{d, a, b};
  meet(names[int(kind)], kAllLanes, &product, work[int(kind)], MOE_SIMT_SITE);
}

// ---------------------------------------------------------------- conversions
uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  return uint32_t(std::isnan(high) ? 0x7fff : bf16(high).bits) << 16 | (std::isnan(low) ? 0x7fff : bf16(low).bits);
}

uint32_t cvt_rn_f16x2_f32(float high, float low) {
  return uint32_t(std::isnan(high) ? 0x7fff : f16(high).bits) << 16 | (std::isnan(low) ? 0x7fff : f16(low).bits);
}

float cvt_f32_f16(uint16_t bits) {
  f16 v;
  v.bits = bits;
  return v;
}

uint32_t cvt_rna_tf32_f32(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  if (std::isnan(a)) return 0x7fffffff;
  if (!std::isinf(a)) bits += 0x1000;  // ties away from zero
  return bits & 0xffffe000;
}

}  // namespace moe::simt

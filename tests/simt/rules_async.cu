// SPDX-License-Identifier: Apache-2.0
// One small, correct kernel a rule of asynchronous copies, tiles, tensor cores and addresses, each with its expected
// values. They test the emulator, and are the ground on which the mutation suite plants its faults.
#include <sys/mman.h>

#include "../../csrc/cuda/ptx.cuh"
#include "harness.h"

namespace moe::cuda {
using test::Device;
using test::expect_equal;
using test::outcome;

uint16_t bf16_of(int v) {  // exact for small integers
  const float f = float(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return uint16_t(bits >> 16);
}

// ---------------------------------------------------------------- cp.async ring: three stages, a tail that reads
// nothing
constexpr int kStages = 3, kChunks = 64;  // chunks of 16 bytes a stage, one a thread
MOE_KERNEL copy_ring(const int4* values, int n, int steps, int* out) {
  MOE_SHARED(int, ring);
  const int thread = int(threadIdx.x);
  const uint32_t base = cvta_to_shared(ring);
  int sum = 0;
  const auto load = [&](int step) {
    const int i = step * kChunks + thread;
    const bool inside = i < n;
    cp_async_cg_16(base + uint32_t((step % kStages) * kChunks + thread) * 16, values + (inside ? i : 0),
                   inside ? 16u : 0u);
  };
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit_group();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) load(step + kStages - 1);
    cp_async_commit_group();
    const int* stage = ring + (step % kStages) * kChunks * 4;
    sum = sum * 3 + stage[(thread * 5 + 7) % (kChunks * 4)];
  }
  out[thread] = sum;
}

std::string copy_ring_of(int steps) {
  const int n = steps * kChunks - 9;
  std::vector<int> values(n * 4), want(kChunks, 0);
  for (int i = 0; i < n * 4; ++i) values[i] = i % 23 + 1;
  for (int step = 0; step < steps; ++step) {
    for (int t = 0; t < kChunks; ++t) {
      const int i = step * kChunks * 4 + (t * 5 + 7) % (kChunks * 4);
      want[t] = want[t] * 3 + (i < n * 4 ? values[i] : 0);
    }
  }
  Device<int> in(values), out(kChunks);
  const std::string report =
      outcome(launch({dim3(1), dim3(kChunks), kStages * kChunks * 16}, nullptr, copy_ring,
                     reinterpret_cast<const int4*>(static_cast<int*>(in)), n, steps, static_cast<int*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

MOE_CASE(copy_ring) {
  const std::string report = copy_ring_of(6);
  return report.empty() ? copy_ring_of(1) : report;  // one step is fewer than the ring has stages
}

// ---------------------------------------------------------------- mbarrier pipeline: a warp produces, a warp consumes
struct Pipeline {
  uint64_t full[2], empty[2];
  int slots[2][kWarp];
};
MOE_KERNEL pipeline(const int* values, int* out, int rounds) {
  MOE_SHARED(Pipeline, shared);
  const int lane = int(threadIdx.x) % kWarp;
  const uint32_t full = cvta_to_shared(shared->full), empty = cvta_to_shared(shared->empty);
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < 2; ++s) {
      mbarrier_init(full + 8 * s, kWarp);
      mbarrier_init(empty + 8 * s, kWarp);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  const bool producer = threadIdx.x < kWarp;
  for (int round = 0; round < rounds; ++round) {
    const uint32_t slot = uint32_t(round) % 2, phase = uint32_t(round) / 2 % 2;
    if (producer) {
      mbarrier_wait_parity(empty + 8 * slot, phase ^ 1);
      shared->slots[slot][lane] = values[round * kWarp + lane];
      mbarrier_arrive(full + 8 * slot);
    } else {
      mbarrier_wait_parity(full + 8 * slot, phase);
      out[round * kWarp + lane] = shared->slots[slot][(lane + 3) % kWarp];
      mbarrier_arrive(empty + 8 * slot);
    }
  }
}

std::vector<int> rotated(const std::vector<int>& values, int by) {
  std::vector<int> want(values.size());
  for (size_t i = 0; i < want.size(); ++i) want[i] = values[i / 32 * 32 + (i + size_t(by)) % 32];
  return want;
}

MOE_CASE(pipeline) {
  const int rounds = 7;
  std::vector<int> values(rounds * 32);
  for (size_t i = 0; i < values.size(); ++i) values[i] = int(i) * 7;
  Device<int> in(values), out(values.size());
  const std::string report = outcome(launch({dim3(1), dim3(64), sizeof(Pipeline)}, nullptr, pipeline,
                                            static_cast<const int*>(in), static_cast<int*>(out), rounds));
  return report.empty() ? expect_equal(out.host(), rotated(values, 3)) : report;
}

// ---------------------------------------------------------------- cp.async that arrives at an mbarrier when it has
// landed
struct Landing {
  uint64_t full;
  int slot[kWarp];
};
MOE_KERNEL copy_arrives(const int* values, int* out, int rounds) {
  MOE_SHARED(Landing, shared);
  const int lane = int(threadIdx.x);
  const uint32_t full = cvta_to_shared(&shared->full), slot = cvta_to_shared(shared->slot);
  if (lane == 0) mbarrier_init(full, kWarp);
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    cp_async_ca_4(slot + 4 * uint32_t(lane), values + round * kWarp + lane);
    cp_async_mbarrier_arrive_noinc(full);
    while (!mbarrier_test_wait_parity(full, uint32_t(round) % 2)) {
    }
    out[round * kWarp + lane] = shared->slot[(lane + 5) % kWarp];
    __syncwarp();
  }
}

MOE_CASE(copy_arrives) {
  const int rounds = 3;
  std::vector<int> values(rounds * 32);
  for (size_t i = 0; i < values.size(); ++i) values[i] = int(i) + 100;
  Device<int> in(values), out(values.size());
  const std::string report = outcome(launch({dim3(1), dim3(32), sizeof(Landing)}, nullptr, copy_arrives,
                                            static_cast<const int*>(in), static_cast<int*>(out), rounds));
  return report.empty() ? expect_equal(out.host(), rotated(values, 5)) : report;
}

// ---------------------------------------------------------------- tiles: 16x64 a, 8x64 b, rows of 128 bytes, swizzled
constexpr int kDepth = 64, kTileRows = 16 + 8;
MOE_DEVICE uint32_t swizzled(int row, int chunk) { return uint32_t(row * 128 + ((chunk ^ (row % 8)) * 16)); }

MOE_KERNEL tile_product(const uint4* a, const uint4* b, float* d) {
  MOE_SHARED(uint4, tile);
  const int lane = int(threadIdx.x);
  const uint32_t base = cvta_to_shared(tile), base_b = base + 16 * 128;
  for (int i = lane; i < kTileRows * 8; i += kWarp) {
    const int row = i / 8, chunk = i % 8;
    const uint4 v = row < 16 ? __ldg(a + row * 8 + chunk) : __ldg(b + (row - 16) * 8 + chunk);
    st_shared_v4(row < 16 ? base + swizzled(row, chunk) : base_b + swizzled(row - 16, chunk), v);
  }
  __syncwarp();
  float sum[4] = {};
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t ra[4], rb[2];
    ldmatrix_x4(ra, base + swizzled(lane % 16, 2 * k + lane / 16));
    ldmatrix_x2(rb, base_b + swizzled(lane % 8, 2 * k + lane / 8 % 2));
    mma_m16n8k16_bf16(sum, ra, rb);
  }
  for (int v = 0; v < 4; ++v) d[(lane / 4 + 8 * (v / 2)) * 8 + 2 * (lane % 4) + v % 2] = sum[v];
}

MOE_CASE(tile_product) {
  std::vector<uint16_t> a(16 * kDepth), b(8 * kDepth);
  std::vector<float> want(16 * 8, 0.f);
  const auto va = [](int i) { return i * 7 % 13 - 6; };
  const auto vb = [](int i) { return i * 5 % 11 - 5; };
  for (size_t i = 0; i < a.size(); ++i) a[i] = bf16_of(va(int(i)));
  for (size_t i = 0; i < b.size(); ++i) b[i] = bf16_of(vb(int(i)));
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < kDepth; ++k) want[m * 8 + n] += float(va(m * kDepth + k) * vb(n * kDepth + k));
    }
  }
  Device<uint16_t> da(a), db(b);
  Device<float> d(want.size());
  const std::string report =
      outcome(launch({dim3(1), dim3(32), kTileRows * 128}, nullptr, tile_product,
                     reinterpret_cast<const uint4*>(static_cast<uint16_t*>(da)),
                     reinterpret_cast<const uint4*>(static_cast<uint16_t*>(db)), static_cast<float*>(d)));
  return report.empty() ? expect_equal(d.host(), want) : report;
}

// ---------------------------------------------------------------- stmatrix and back: an 8x8 transposition through
// memory
MOE_KERNEL tile_transpose(const uint32_t* in, uint32_t* out) {
  MOE_SHARED(uint4, tile);
  const uint32_t row = cvta_to_shared(tile) + (threadIdx.x % 8) * 16;
  const uint32_t r[1] = {in[threadIdx.x]};
  stmatrix_x1_trans(row, r);
  __syncwarp();
  uint32_t back[1];
  ldmatrix_x1(back, row);
  out[threadIdx.x] = back[0];
}

MOE_CASE(tile_transpose) {
  std::vector<uint32_t> in(32), want(32);
  const auto element = [](int row, int column) { return uint32_t(row * 8 + column + 1); };
  for (int l = 0; l < 32; ++l) {
    in[l] = element(l / 4, 2 * (l % 4)) | element(l / 4, 2 * (l % 4) + 1) << 16;
    want[l] = element(2 * (l % 4), l / 4) | element(2 * (l % 4) + 1, l / 4) << 16;
  }
  Device<uint32_t> source(in), out(32);
  const std::string report = outcome(launch({dim3(1), dim3(32), 128}, nullptr, tile_transpose,
                                            static_cast<const uint32_t*>(source), static_cast<uint32_t*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

// ---------------------------------------------------------------- rows of 16-byte vectors, far apart: 64-bit offsets
MOE_KERNEL far_rows(const uint4* rows, int64_t stride, int count, int width, uint4* out) {
  for (int row = int(blockIdx.x); row < count; row += int(gridDim.x)) {
    const int64_t from = int64_t(row) * stride, to = int64_t(row) * width;
    for (int i = int(threadIdx.x); i < width; i += int(blockDim.x)) __stcs(out + to + i, __ldg(rows + from + i));
  }
}

MOE_CASE(far_rows) {
  const int width = 70, count = 2;
  const int64_t stride = int64_t(1) << 31;  // vectors: 32 GiB of address space between the rows, hardly any of it used
  const size_t bytes = (size_t(stride) + width) * 16;
#ifdef MOE_SIMT
  void* const far = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (far == MAP_FAILED) return "values: no address space";
  const simt::Registered registered(far, bytes, "rows");
  int* const rows = static_cast<int*>(far);
  std::vector<int> want(size_t(width) * count * 4);
  for (int r = 0; r < count; ++r) {
    for (int i = 0; i < width * 4; ++i) want[r * width * 4 + i] = rows[r * stride * 4 + i] = r * 1000 + i;
  }
  Device<int> out(want.size());
  const std::string report =
      outcome(launch({dim3(2), dim3(32)}, nullptr, far_rows, reinterpret_cast<const uint4*>(rows), stride, count, width,
                     reinterpret_cast<uint4*>(static_cast<int*>(out))));
  munmap(far, bytes);
  return report.empty() ? expect_equal(out.host(), want) : report;
#else
  (void)bytes;
  return "";
#endif
}

// ---------------------------------------------------------------- bytes and halves beside each other do not race
MOE_KERNEL neighbours(const uint8_t* in, uint8_t* out) {
  MOE_SHARED(uint8_t, bytes);
  bytes[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = bytes[63 - threadIdx.x];
}

MOE_CASE(neighbours) {
  std::vector<uint8_t> in(64), want(64);
  for (int i = 0; i < 64; ++i) want[63 - i] = in[i] = uint8_t(i * 3);
  Device<uint8_t> source(in), out(64);
  const std::string report = outcome(launch({dim3(1), dim3(64), 64}, nullptr, neighbours,
                                            static_cast<const uint8_t*>(source), static_cast<uint8_t*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// One small, correct kernel a rule of Hopper, each with its expected values: TMA, wgmma, registers, clusters.
#include "sm90.h"

namespace moe::cuda {
using test::aligned_shared;
using test::bf16_of;
using test::descriptor;
using test::Device;
using test::expect_equal;
using test::map_of;
using test::outcome;

// ---------------------------------------------------------------- a pipeline: one warpgroup loads, two multiply, 128 x
// N
constexpr int kRows = 128, kDepth = 64, kStages = 2, kColumns = 64;
constexpr uint32_t kTileA = kRows * kDepth * 2, kTileB = kColumns * kDepth * 2, kTileD = kRows * kColumns * 2;

struct Layout {  // from a multiple of 1024
  static constexpr uint32_t a = 0, b = kStages * kTileA, d = b + kStages * kTileB, full = d + kTileD,
                            empty = full + 8 * kStages, bytes = empty + 8 * kStages;
};

MOE_DEVICE void produce(const TensorMap* a, const TensorMap* b, uint32_t shared, int steps) {
  for (int step = 0; step < steps; ++step) {
    const uint32_t stage = uint32_t(step % kStages), full = shared + Layout::full + 8 * stage;
    mbarrier_wait_parity(shared + Layout::empty + 8 * stage, uint32_t(step / kStages & 1) ^ 1);
    mbarrier_arrive_expect_tx(full, kTileA + kTileB);
    const int32_t at[2] = {step * kDepth, 0};
    tma_load(shared + Layout::a + stage * kTileA, a, at, full);
    tma_load(shared + Layout::b + stage * kTileB, b, at, full);
  }
}

MOE_DEVICE void consume(float (&d)[kColumns / 2], uint32_t shared, int steps, int warpgroup) {
  for (int step = 0; step < steps; ++step) {
    const uint32_t stage = uint32_t(step % kStages);
    mbarrier_wait_parity(shared + Layout::full + 8 * stage, uint32_t(step / kStages & 1));
    const uint32_t a = shared + Layout::a + stage * kTileA + uint32_t(warpgroup) * 64 * 128;
    const uint32_t b = shared + Layout::b + stage * kTileB;
    wgmma_fence();
    for (uint32_t k = 0; k < kDepth / 16; ++k) {
      wgmma<bf16, kColumns>(d, descriptor(a + 32 * k, 16, 1024, 1), descriptor(b + 32 * k, 16, 1024, 1),
                            step > 0 || k > 0);
    }
    wgmma_commit_group();
    wgmma_wait_group<0>();
    if (threadIdx.x % 128 == 0) mbarrier_arrive(shared + Layout::empty + 8 * stage);
  }
}

MOE_KERNEL __launch_bounds__(384, 1) pipeline(const MOE_GRID_CONSTANT TensorMap a, const MOE_GRID_CONSTANT TensorMap b,
                                              const MOE_GRID_CONSTANT TensorMap out, int steps) {
#if MOE_SM90A
  const uint32_t shared = aligned_shared();
  const int thread = int(threadIdx.x), warpgroup = thread / 128 - 1;
  if (thread == 0) {
    for (uint32_t s = 0; s < kStages; ++s) {
      mbarrier_init(shared + Layout::full + 8 * s, 1);
      mbarrier_init(shared + Layout::empty + 8 * s, 2);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warpgroup < 0) {
    setmaxnreg_dec<40>();
    if (thread == 0) produce(&a, &b, shared, steps);
    return;
  }
  setmaxnreg_inc<232>();
  float d[kColumns / 2] = {};
  consume(d, shared, steps, warpgroup);
  const int t = thread % 128;
  for (int i = 0; i < kColumns / 2; i += 2) {
    const int row = warpgroup * 64 + 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (t % 4);
    const uint32_t at = shared + Layout::d + uint32_t(row * 128 + ((column * 2) ^ (row % 8 * 16)));
    const uint32_t both = cvt_rn_bf16x2_f32(d[i + 1], d[i]);
    MOE_SHARED(uint8_t, base);
    *reinterpret_cast<uint32_t*>(base + (at - cvta_to_shared(base))) = both;
  }
  fence_proxy_async();
  bar_sync(1 + warpgroup, 128);
  if (t == 0) {
    const int32_t at[2] = {0, warpgroup * 64};
    tma_store(&out, at, shared + Layout::d + uint32_t(warpgroup) * 64 * 128);
    bulk_commit_group();
    bulk_wait_group_read<0>();
  }
#endif
}

// a[m][k], b[n][k] and a b^T, small integers.
struct Problem {
  std::vector<uint16_t> a, b;
  std::vector<uint16_t> want;
  Problem(int m, int n, int k) : a(size_t(m * k)), b(size_t(n * k)), want(size_t(m * n)) {
    const auto va = [&](int i) { return i * 7 % 5 - 2; };
    const auto vb = [&](int i) { return i * 5 % 7 - 3; };
    for (size_t i = 0; i < a.size(); ++i) a[i] = bf16_of(va(int(i)));
    for (size_t i = 0; i < b.size(); ++i) b[i] = bf16_of(vb(int(i)));
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        int sum = 0;
        for (int l = 0; l < k; ++l) sum += va(i * k + l) * vb(j * k + l);
        want[size_t(i * n + j)] = bf16_of(sum);
      }
    }
  }
};

std::string run_pipeline(int rows, int columns, int depth) {
  const Problem p(rows, columns, depth);
  Device<uint16_t> a(p.a), b(p.b), out(p.want.size());
  const LaunchShape shape{dim3(1), dim3(384), Layout::bytes + 1024};
  const std::string report =
      outcome(launch(shape, nullptr, pipeline, map_of(a, DType::bf16, {depth, rows}, {kDepth, kRows}, 128),
                     map_of(b, DType::bf16, {depth, columns}, {kDepth, kColumns}, 128),
                     map_of(out, DType::bf16, {columns, rows}, {kColumns, 64}, 128), (depth + kDepth - 1) / kDepth));
  return report.empty() ? expect_equal(out.host(), p.want) : report;
}

MOE_CASE(pipeline) { return run_pipeline(128, 64, 320); }
/// Zeros beyond the tensor, whose bytes count; nothing stored there.
MOE_CASE(pipeline_tails) { return run_pipeline(100, 40, 200); }

}  // namespace moe::cuda

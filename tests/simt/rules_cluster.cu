// SPDX-License-Identifier: Apache-2.0
// One small, correct kernel a rule of clusters and of what else Hopper has: see rules_sm90.cu.
#include "sm90.h"

namespace moe::cuda {
using test::aligned_shared;
using test::bf16_of;
using test::descriptor;
using test::Device;
using test::expect_equal;
using test::map_of;
using test::outcome;

MOE_DEVICE uint16_t* pointer_to(uint32_t address) {
  MOE_SHARED(uint8_t, base);
  return reinterpret_cast<uint16_t*>(base + (address - cvta_to_shared(base)));
}

// ---------------------------------------------------------------- multicast: each block loads half for both
constexpr uint32_t kHalf = 32 * 64 * 2;  // bytes
MOE_KERNEL multicast(const MOE_GRID_CONSTANT TensorMap map, int rounds, uint32_t* sums) {
#if MOE_SM90A
  const uint32_t shared = aligned_shared(), full = shared + 2 * kHalf, empty = full + 8, rank = cluster_ctarank();
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 2);  // one consumer of each block
    fence_mbarrier_init();
  }
  cluster_arrive();
  cluster_wait();
  uint32_t sum = 0;
  for (int round = 0; round < rounds; ++round) {
    const uint32_t phase = uint32_t(round) & 1;
    if (threadIdx.x == 0) {
      mbarrier_wait_parity(empty, phase ^ 1);  // both halves go to both: nobody reads any more
      mbarrier_arrive_expect_tx(full, 2 * kHalf);
      const int32_t at[3] = {0, int32_t(rank) * 32, round};
      tma_load_multicast(shared + rank * kHalf, &map, at, full, uint16_t(3));
    }
    mbarrier_wait_parity(full, phase);
    for (int i = int(threadIdx.x); i < int(kHalf); i += int(blockDim.x)) sum += pointer_to(shared)[i];
    __syncthreads();
    if (threadIdx.x < 2) mbarrier_arrive_remote(empty, threadIdx.x);
  }
  cluster_arrive();
  cluster_wait();
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
#endif
}

MOE_CASE(multicast) {
  const int rounds = 3, threads = 64;
  std::vector<uint16_t> values(size_t(rounds) * kHalf);
  std::vector<uint32_t> want(2 * threads, 0);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = uint16_t(i * 13 % 1009);
    for (size_t block = 0; block < 2; ++block) {
      // Swizzled by 128 bytes: the chunk of a row goes to chunk ^ row % 8.
      const size_t in_round = i % kHalf, row = in_round / 64, column = (in_round % 64) ^ (row % 8 * 8);
      want[block * threads + (row * 64 + column) % threads] += values[i];
    }
  }
  Device<uint16_t> tensor(values);
  Device<uint32_t> sums(2 * threads);
  LaunchShape shape{dim3(2), dim3(threads), 1024 + 2 * kHalf + 16};
  shape.cluster = 2;
  const std::string report =
      outcome(launch(shape, nullptr, multicast, map_of(tensor, DType::bf16, {64, 64, rounds}, {64, 32, 1}, 128), rounds,
                     static_cast<uint32_t*>(sums)));
  return report.empty() ? expect_equal(sums.host(), want) : report;
}

// ---------------------------------------------------------------- words of other blocks' shared memory
MOE_KERNEL remote_words(uint32_t* out) {
#if MOE_SM90A
  MOE_SHARED(uint32_t, words);
  const uint32_t rank = cluster_ctarank(), me = threadIdx.x, address = cvta_to_shared(words);
  cluster_arrive();  // the others have started
  cluster_wait();
  st_shared_cluster(mapa(address + 4 * me, (rank + 1) % 4), rank * 100 + me);
  cluster_arrive();
  cluster_wait();
  const uint32_t sum = words[me] + ld_shared_cluster(mapa(address + 4 * (31 - me), (rank + 2) % 4));
  cluster_arrive();  // nobody ends before all have read
  cluster_wait();
  out[blockIdx.x * 32 + me] = sum;
#endif
}

MOE_CASE(remote_words) {
  Device<uint32_t> out(8 * 32);
  std::vector<uint32_t> want(8 * 32);
  for (uint32_t i = 0; i < want.size(); ++i) {
    const uint32_t rank = i / 32 % 4, me = i % 32;
    want[i] = (rank + 3) % 4 * 100 + me + (rank + 1) % 4 * 100 + 31 - me;
  }
  LaunchShape shape{dim3(8), dim3(32), 128};
  shape.cluster = 4;
  const std::string report = outcome(launch(shape, nullptr, remote_words, static_cast<uint32_t*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

// ---------------------------------------------------------------- sums of blocks by TMA, beyond the tensor nothing
MOE_KERNEL reduce_boxes(const MOE_GRID_CONSTANT TensorMap map, int turns) {
#if MOE_SM90A
  const uint32_t shared = aligned_shared();
  for (int turn = 0; turn < turns; ++turn) {
    float* const tile = reinterpret_cast<float*>(pointer_to(shared));
    for (int i = int(threadIdx.x); i < 8 * 32; i += int(blockDim.x)) tile[i] = float(i + turn);
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      const int32_t at[4] = {8, 4, 0, int32_t(blockIdx.x) % 2};
      tma_reduce_add(&map, at, shared);
      bulk_commit_group();
      bulk_wait_group_read<0>();
    }
    __syncthreads();
  }
#endif
}

MOE_CASE(reduce_boxes) {
  const int turns = 2, width = 36, rows = 9;
  std::vector<float> values(size_t(2 * rows * width), 1.f), want = values;
  for (int block = 0; block < 4; ++block) {
    for (int turn = 0; turn < turns; ++turn) {
      for (int i = 0; i < 8 * 32; ++i) {
        const int row = 4 + i / 32, column = 8 + i % 32;
        if (row < rows && column < width) want[size_t((block % 2 * rows + row) * width + column)] += float(i + turn);
      }
    }
  }
  Device<float> sums(values);
  const std::string report = outcome(launch({dim3(4), dim3(96), 2048}, nullptr, reduce_boxes,
                                            map_of(sums, DType::f32, {width, rows, 1, 2}, {32, 8, 1, 1}, 0), turns));
  return report.empty() ? expect_equal(sums.host(), want) : report;
}

// ---------------------------------------------------------------- both operands MN-major: a^T b of row-major matrices
constexpr int kTokens = 64, kFeatures = 128, kOutputs = 64;
MOE_KERNEL transposed(const MOE_GRID_CONSTANT TensorMap a, const MOE_GRID_CONSTANT TensorMap b, float* out) {
#if MOE_SM90A
  const uint32_t shared = aligned_shared(), tile_b = shared + kTokens * kFeatures * 2,
                 full = tile_b + kTokens * kOutputs * 2;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, kTokens * (kFeatures + kOutputs) * 2);
    const int32_t left[2] = {0, 0}, right[2] = {64, 0};
    tma_load(shared, &a, left, full);
    tma_load(shared + kTokens * 128, &a, right, full);
    tma_load(tile_b, &b, left, full);
  }
  __syncthreads();
  mbarrier_wait_parity(full, 0);
  float d[2][kOutputs / 2] = {};
  wgmma_fence();
  for (uint32_t half = 0; half < 2; ++half) {
    for (uint32_t k = 0; k < kTokens / 16; ++k) {
      wgmma<bf16, kOutputs, 1, 1>(d[half], descriptor(shared + half * kTokens * 128 + 2048 * k, 0, 1024, 1),
                                  descriptor(tile_b + 2048 * k, 0, 1024, 1), true);
    }
    wgmma_commit_group();
  }
  const int t = int(threadIdx.x);
  const auto write = [&](int half) {
    for (int i = 0; i < kOutputs / 2; ++i) {
      const int row = half * 64 + 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2),
                column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
      out[row * kOutputs + column] = d[half][i];
    }
  };
  wgmma_wait_group<1>();
  write(0);  // while the other half is on its way
  wgmma_wait_group<0>();
  write(1);
#endif
}

MOE_CASE(transposed) {
  const int tokens = 50;  // the rest of the tile is zero
  std::vector<uint16_t> a(size_t(tokens * kFeatures)), b(size_t(tokens * kOutputs));
  const auto value = [](size_t i) { return int(i * 11 % 9) - 4; };
  for (size_t i = 0; i < a.size(); ++i) a[i] = bf16_of(value(i));
  for (size_t i = 0; i < b.size(); ++i) b[i] = bf16_of(value(i + 3));
  std::vector<float> want(size_t(kFeatures * kOutputs), 0.f);
  for (int f = 0; f < kFeatures; ++f) {
    for (int o = 0; o < kOutputs; ++o) {
      for (int t = 0; t < tokens; ++t) {
        want[size_t(f * kOutputs + o)] += float(value(size_t(t * kFeatures + f)) * value(size_t(t * kOutputs + o) + 3));
      }
    }
  }
  Device<uint16_t> da(a), db(b);
  Device<float> out(want.size());
  const LaunchShape shape{dim3(1), dim3(128), 1024 + kTokens * (kFeatures + kOutputs) * 2 + 8};
  const std::string report =
      outcome(launch(shape, nullptr, transposed, map_of(da, DType::bf16, {kFeatures, tokens}, {64, kTokens}, 128),
                     map_of(db, DType::bf16, {kOutputs, tokens}, {64, kTokens}, 128), static_cast<float*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

// ---------------------------------------------------------------- cp.async feeds wgmma: by its writer or its reader
// fenced
template <bool ByWriter> MOE_KERNEL gathered(const uint4* a, const uint4* b, float* out) {
#if MOE_SM90A
  const uint32_t shared = aligned_shared(), tile_b = shared + 64 * 32, full = tile_b + 16 * 32;
  const int t = int(threadIdx.x);
  if (t == 0) mbarrier_init(full, 256);
  __syncthreads();
  if (t >= 128) {  // cores of 8x8: [row / 8][k / 8][row % 8]
    const int i = t - 128, row = i / 2, half = i % 2;
    cp_async_cg_16(shared + uint32_t(row / 8 * 256 + half * 128 + row % 8 * 16), a + i);
    if (i < 32) cp_async_cg_16(tile_b + uint32_t(row / 8 * 256 + half * 128 + row % 8 * 16), b + i);
    if (ByWriter) {
      cp_async_wait_all();
      fence_proxy_async();
      mbarrier_arrive(full);
    } else {
      cp_async_mbarrier_arrive_noinc(full);
    }
    cp_async_wait_all();
    return;
  }
  mbarrier_arrive(full);
  mbarrier_wait_parity(full, 0);
  if (!ByWriter) fence_proxy_async();
  float d[8];
  wgmma_fence();
  wgmma<bf16, 16>(d, descriptor(shared, 128, 256, 0), descriptor(tile_b, 128, 256, 0), false);
  wgmma_commit_group();
  wgmma_wait_group<0>();
  for (int i = 0; i < 8; ++i) out[t * 8 + i] = d[i];
#endif
}

template <bool ByWriter> std::string run_gathered() {
  std::vector<uint16_t> a(64 * 16), b(16 * 16);
  for (size_t i = 0; i < a.size(); ++i) a[i] = bf16_of(int(i * 7 % 11) - 5);
  for (size_t i = 0; i < b.size(); ++i) b[i] = bf16_of(i / 16 == i % 16 ? 1 : 0);
  std::vector<float> want(128 * 8);
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 8; ++i) {
      const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
      want[size_t(t * 8 + i)] = float((row * 16 + column) * 7 % 11 - 5);
    }
  }
  Device<uint16_t> da(a), db(b);
  Device<float> out(want.size());
  const std::string report =
      outcome(launch({dim3(1), dim3(256), 1024 + 80 * 32 + 8}, nullptr, gathered<ByWriter>,
                     reinterpret_cast<const uint4*>(static_cast<uint16_t*>(da)),
                     reinterpret_cast<const uint4*>(static_cast<uint16_t*>(db)), static_cast<float*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}
MOE_CASE(gathered) { return run_gathered<true>(); }
MOE_CASE(gathered_arrives) { return run_gathered<false>(); }

}  // namespace moe::cuda

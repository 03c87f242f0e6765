// SPDX-License-Identifier: Apache-2.0
// One small, correct kernel a rule of synchronisation, each with its expected values. They test the emulator, and are
// the ground on which the mutation suite plants its faults.
#include "../../csrc/cuda/ptx.cuh"
#include "harness.h"

namespace moe::cuda {
using test::Device;
using test::expect_equal;
using test::outcome;

// ---------------------------------------------------------------- block barriers, shared atomics, tails
MOE_KERNEL histogram(const int* values, int n, int* counts, int bins) {
  MOE_SHARED(int, local);
  for (int i = int(threadIdx.x); i < bins; i += int(blockDim.x)) local[i] = 0;
  __syncthreads();
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) atomicAdd(&local[values[i]], 1);
  __syncthreads();
  for (int bin = int(threadIdx.x); bin < bins; bin += int(blockDim.x)) {
    if (local[bin] != 0) atomicAdd(&counts[bin], local[bin]);
  }
}

MOE_CASE(histogram) {
  const int n = 150, bins = 7;
  std::vector<int> values(n), want(bins, 0);
  for (int i = 0; i < n; ++i) ++want[values[i] = (i * i + i / 3) % bins];
  Device<int> in(values), counts(std::vector<int>(bins, 0));
  const std::string report = outcome(launch({dim3(3), dim3(64), bins * sizeof(int)}, nullptr, histogram,
                                            static_cast<const int*>(in), n, static_cast<int*>(counts), bins));
  return report.empty() ? expect_equal(counts.host(), want) : report;
}

// ---------------------------------------------------------------- warp barrier, shuffles: inclusive scan, rotated
MOE_KERNEL warp_scan(const int* values, int* sums) {
  MOE_SHARED(int, shared);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int sum = values[threadIdx.x];
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, sum, unsigned(step));
    if (lane >= step) sum += other;
  }
  shared[threadIdx.x] = sum;
  __syncwarp();
  sums[threadIdx.x] = shared[warp * kWarp + (lane + 1) % kWarp];
}

MOE_CASE(warp_scan) {
  std::vector<int> values(64), want(64);
  for (int i = 0; i < 64; ++i) values[i] = i % 5 + 1;
  for (int w = 0; w < 64; w += 32) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) want[w + (i + 31) % 32] = sum += values[w + i];
  }
  Device<int> in(values), out(64);
  const std::string report = outcome(launch({dim3(1), dim3(64), 64 * sizeof(int)}, nullptr, warp_scan,
                                            static_cast<const int*>(in), static_cast<int*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

// ---------------------------------------------------------------- every collective at once
MOE_KERNEL collectives(const int* values, int* out) {
  const int lane = int(threadIdx.x), v = values[lane];
  int digest = int(__popc(__ballot_sync(kFullWarp, v > 3)));
  digest = digest * 37 + __all_sync(kFullWarp, v >= 0) * 2 + __any_sync(kFullWarp, v == 1000);
  digest = digest * 37 + int(__match_any_sync(kFullWarp, v) % 101u);
  digest = digest * 37 + __reduce_add_sync(kFullWarp, v) + __reduce_max_sync(kFullWarp, -v);
  digest = digest * 37 + __shfl_sync(kFullWarp, v, lane + 1, 8) + __shfl_down_sync(kFullWarp, v, 3u);
  digest = digest * 37 + __shfl_xor_sync(kFullWarp, v, 5);
  if (lane < 8) digest += int(__match_any_sync(0xffu, v & 1));
  out[lane] = digest;
}

MOE_CASE(collectives) {
  std::vector<int> v(32), want(32);
  for (int i = 0; i < 32; ++i) v[i] = i * 7 % 11;
  int above = 0, sum = 0, least = v[0];
  for (int x : v) {
    above += x > 3;
    sum += x;
    least = x < least ? x : least;
  }
  for (int i = 0; i < 32; ++i) {
    uint32_t same = 0, low = 0;
    for (int j = 0; j < 32; ++j) same |= uint32_t(v[j] == v[i]) << j;
    for (int j = 0; j < 8; ++j) low |= uint32_t((v[j] & 1) == (v[i] & 1)) << j;
    int digest = above * 37 + 2;
    digest = digest * 37 + int(same % 101u);
    digest = digest * 37 + sum - least;
    digest = digest * 37 + v[i / 8 * 8 + (i + 1) % 8] + v[i + 3 > 31 ? i : i + 3];
    digest = digest * 37 + v[i ^ 5];
    want[i] = digest + (i < 8 ? int(low) : 0);
  }
  Device<int> in(v), out(32);
  const std::string report =
      outcome(launch({dim3(1), dim3(32)}, nullptr, collectives, static_cast<const int*>(in), static_cast<int*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

// ---------------------------------------------------------------- named barriers: one warp fills, one empties a slot
MOE_KERNEL named_barriers(const int* values, int* out, int rounds) {
  MOE_SHARED(int, slot);
  const int lane = int(threadIdx.x) % kWarp;
  constexpr int kFull = 1, kEmpty = 2;
  const int both = 2 * kWarp;
  if (threadIdx.x < kWarp) {
    for (int round = 0; round < rounds; ++round) {
      if (round > 0) bar_sync(kEmpty, both);
      slot[lane] = values[round * kWarp + lane];
      bar_arrive(kFull, both);
    }
  } else {
    for (int round = 0; round < rounds; ++round) {
      bar_sync(kFull, both);
      out[round * kWarp + lane] = slot[kWarp - 1 - lane] + 1;
      if (round + 1 < rounds) bar_arrive(kEmpty, both);
    }
  }
}

MOE_CASE(named_barriers) {
  const int rounds = 4;
  std::vector<int> values(rounds * 32), want(rounds * 32);
  for (int i = 0; i < rounds * 32; ++i) values[i] = i * 3;
  for (int i = 0; i < rounds * 32; ++i) want[i] = values[i / 32 * 32 + 31 - i % 32] + 1;
  Device<int> in(values), out(want.size());
  const std::string report = outcome(launch({dim3(1), dim3(64), 128}, nullptr, named_barriers,
                                            static_cast<const int*>(in), static_cast<int*>(out), rounds));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

// ---------------------------------------------------------------- flags: a chain through the blocks, in ticket order
MOE_KERNEL chained_sum(const int* values, int n, int* sums, uint32_t* tickets, uint32_t* flags) {
  MOE_SHARED(int, shared);  // [0] ticket, [1] sum of the blocks before, then the values
  if (threadIdx.x == 0) shared[0] = int(atomicAdd(tickets, 1u));
  __syncthreads();
  const int ticket = shared[0], i = ticket * int(blockDim.x) + int(threadIdx.x);
  shared[2 + threadIdx.x] = i < n ? values[i] : 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (ticket > 0) {
      while (ld_acquire_gpu(&flags[ticket - 1]) == 0) {
      }
    }
    int sum = ticket > 0 ? sums[ticket - 1] : 0;
    shared[1] = sum;
    for (int j = 0; j < int(blockDim.x); ++j) sum += shared[2 + j];
    sums[ticket] = sum;
    st_release_gpu(&flags[ticket], 1u);
  }
}

MOE_CASE(chained_sum) {
  const int blocks = 6, threads = 32, n = blocks * threads - 5;
  std::vector<int> values(n), want(blocks, 0);
  for (int i = 0; i < n; ++i) values[i] = i % 9;
  for (int b = 0, sum = 0; b < blocks; ++b) {
    for (int i = b * threads; i < (b + 1) * threads && i < n; ++i) sum += values[i];
    want[b] = sum;
  }
  Device<int> in(values), sums(blocks);
  Device<uint32_t> tickets(std::vector<uint32_t>(1, 0)), flags(std::vector<uint32_t>(blocks, 0));
  const std::string report = outcome(launch({dim3(blocks), dim3(threads), (2 + threads) * sizeof(int)}, nullptr,
                                            chained_sum, static_cast<const int*>(in), n, static_cast<int*>(sums),
                                            static_cast<uint32_t*>(tickets), static_cast<uint32_t*>(flags)));
  return report.empty() ? expect_equal(sums.host(), want) : report;
}

// ---------------------------------------------------------------- fences: the last block to finish adds up
MOE_KERNEL last_block(const int* values, int* partial, uint32_t* done, int* total) {
  MOE_SHARED(int, is_last);
  const int sum = __reduce_add_sync(kFullWarp, values[blockIdx.x * kWarp + threadIdx.x]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    *is_last = atomicAdd(done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (*is_last == 0) return;
  if (threadIdx.x == 0) {
    __threadfence();
    int all = 0;
    for (uint32_t b = 0; b < gridDim.x; ++b) all += partial[b];
    *total = all;
  }
}

MOE_CASE(last_block) {
  const int blocks = 5;
  std::vector<int> values(blocks * 32);
  int sum = 0;
  for (size_t i = 0; i < values.size(); ++i) sum += values[i] = int(i * i % 17);
  Device<int> in(values), partial(blocks), total(1);
  Device<uint32_t> done(std::vector<uint32_t>(1, 0));
  const std::string report =
      outcome(launch({dim3(blocks), dim3(32), 16}, nullptr, last_block, static_cast<const int*>(in),
                     static_cast<int*>(partial), static_cast<uint32_t*>(done), static_cast<int*>(total)));
  return report.empty() ? expect_equal(total.host(), {sum}) : report;
}

// ---------------------------------------------------------------- all blocks wait for each other: cooperative only
MOE_KERNEL grid_barrier(int* cells, uint32_t* arrived, int* out) {
  if (threadIdx.x == 5) cells[blockIdx.x] = int(blockIdx.x) * 3;
  __syncthreads();
  if (threadIdx.x == 0) {
    atom_add_acq_rel_gpu(arrived, 1u);
    while (ld_acquire_gpu(arrived) < gridDim.x) __nanosleep(20);
  }
  __syncthreads();
  if (threadIdx.x == 9) out[blockIdx.x] = cells[(blockIdx.x + 1) % gridDim.x];
}

MOE_CASE(grid_barrier) {
  const int blocks = 7;
  std::vector<int> want(blocks);
  for (int b = 0; b < blocks; ++b) want[b] = (b + 1) % blocks * 3;
  Device<int> cells(blocks), out(blocks);
  Device<uint32_t> arrived(std::vector<uint32_t>(1, 0));
  LaunchShape shape{dim3(blocks), dim3(32)};
  shape.cooperative = true;
  const std::string report = outcome(launch(shape, nullptr, grid_barrier, static_cast<int*>(cells),
                                            static_cast<uint32_t*>(arrived), static_cast<int*>(out)));
  return report.empty() ? expect_equal(out.host(), want) : report;
}

// ---------------------------------------------------------------- programmatic dependent launch
MOE_KERNEL dependent_first(int* cells, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  griddepcontrol_launch_dependents();
  if (i < n) cells[i] = i + 1;
}
MOE_KERNEL dependent_second(const int* cells, int n, int* out) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  griddepcontrol_wait();
  if (i < n) out[i] = cells[n - 1 - i];
}

MOE_CASE(dependent_launch) {
  const int n = 50;
  std::vector<int> want(n);
  for (int i = 0; i < n; ++i) want[i] = n - i;
  Device<int> cells(n), out(n);
  LaunchShape shape{dim3(2), dim3(32)};
  std::string report = outcome(launch(shape, nullptr, dependent_first, static_cast<int*>(cells), n));
  shape.programmatic = true;
  if (report.empty()) {
    report =
        outcome(launch(shape, nullptr, dependent_second, static_cast<const int*>(cells), n, static_cast<int*>(out)));
  }
  return report.empty() ? expect_equal(out.host(), want) : report;
}

// ---------------------------------------------------------------- reducing barriers and election
MOE_KERNEL vote_block(const int* values, int* out) {
  const int odd = __syncthreads_count(values[threadIdx.x] & 1);
  const int any = __syncthreads_or(values[threadIdx.x] == 9), all = __syncthreads_and(values[threadIdx.x] < 100);
  if (elect_sync(kFullWarp)) out[threadIdx.x / kWarp] = odd * 4 + any * 2 + all;
}

MOE_CASE(vote_block) {
  std::vector<int> values(64);
  int odd = 0;
  for (int i = 0; i < 64; ++i) odd += (values[i] = i * 5 % 23) & 1;
  Device<int> in(values), out(2);
  const std::string report =
      outcome(launch({dim3(1), dim3(64)}, nullptr, vote_block, static_cast<const int*>(in), static_cast<int*>(out)));
  return report.empty() ? expect_equal(out.host(), {odd * 4 + 3, odd * 4 + 3}) : report;
}

}  // namespace moe::cuda

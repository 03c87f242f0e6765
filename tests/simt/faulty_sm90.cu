// SPDX-License-Identifier: Apache-2.0
// Kernels for Hopper that are wrong on purpose, one a kind of report: see faulty.cu. All work on one tile: 64 x 64 of
// bf16, swizzled by 128 bytes, loaded by thread 0.
#include "sm90.h"

namespace moe::cuda {
using test::aligned_shared;
using test::descriptor;
using test::Device;
using test::map_of;
using test::outcome;

constexpr uint32_t kTile = 64 * 64 * 2, kFull = 2 * kTile, kShared = kFull + 64;

MOE_DEVICE uint32_t* word_at(uint32_t address) {
  MOE_SHARED(uint8_t, base);
  return reinterpret_cast<uint32_t*>(base + (address - cvta_to_shared(base)));
}
MOE_DEVICE void prepare(uint32_t full, uint32_t count = 1) {
  if (threadIdx.x == 0) {
    mbarrier_init(full, count);
    fence_mbarrier_init();
  }
  __syncthreads();
}
MOE_DEVICE void load_tile(const TensorMap& map, uint32_t shared, uint32_t bytes = kTile) {
  const int32_t at[2] = {0, 0};
  if (threadIdx.x != 0) return;
  mbarrier_arrive_expect_tx(shared + kFull, bytes);
  tma_load(shared, &map, at, shared + kFull);
}
MOE_DEVICE void product(float (&d)[32], uint32_t tile) {
  wgmma<bf16, 64>(d, descriptor(tile, 16, 1024, 1), descriptor(tile, 16, 1024, 1), true);
}
MOE_DEVICE void write_words(uint32_t start, uint32_t words = kTile / 4) {
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) word_at(start)[i] = 0;  // write_words
}

#define MOE_FAULTY(name) MOE_KERNEL name(const MOE_GRID_CONSTANT TensorMap map, float* out)
#define MOE_START                           \
  const uint32_t shared = aligned_shared(); \
  (void)shared, (void)map, (void)out;       \
  prepare(shared + kFull);

// ---------------------------------------------------------------- proxies
MOE_FAULTY(unfenced_store) {
  MOE_START write_words(shared);
  __syncthreads();
  const int32_t at[2] = {0, 0};
  if (threadIdx.x == 0) {
    tma_store(&map, at, shared);  // unfenced_store here
    bulk_commit_group();
    bulk_wait_group<0>();
  }
}
MOE_FAULTY(unfenced_wgmma) {
  MOE_START write_words(shared);
  __syncthreads();
  float d[32] = {};
  wgmma_fence();
  product(d, shared);  // unfenced_wgmma here
  wgmma_commit_group();
  wgmma_wait_group<0>();
}
MOE_FAULTY(unfenced_copy) {
  MOE_START for (uint32_t i = threadIdx.x; i < kTile / 16; i += 128) cp_async_cg_16(shared + 16 * i, out);
  cp_async_commit_group();
  fence_proxy_async();  // too early: the copies have not landed
  cp_async_wait_group<0>();
  __syncthreads();
  float d[32] = {};
  wgmma_fence();
  product(d, shared);  // unfenced_copy here
  wgmma_commit_group();
  wgmma_wait_group<0>();
}
MOE_FAULTY(unfenced_overwrite) {
  MOE_START write_words(shared);
  __syncthreads();
  load_tile(map, shared);  // unfenced_overwrite here
  mbarrier_wait_parity(shared + kFull, 0);
}
MOE_KERNEL unfenced_global(const MOE_GRID_CONSTANT TensorMap map, uint32_t* tensor) {
  const uint32_t shared = aligned_shared();
  prepare(shared + kFull);
  tensor[threadIdx.x] = 0;
  fence_proxy_async();  // of shared memory alone
  __syncthreads();
  load_tile(map, shared);  // unfenced_global here
  mbarrier_wait_parity(shared + kFull, 0);
}

// ---------------------------------------------------------------- registers of wgmma
MOE_DEVICE void loaded(const TensorMap& map, uint32_t shared) {
  load_tile(map, shared);
  mbarrier_wait_parity(shared + kFull, 0);
}
MOE_FAULTY(no_wgmma_fence) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  product(d, shared);  // no_wgmma_fence here
  wgmma_commit_group();
  wgmma_wait_group<0>();
}
MOE_FAULTY(touched_accumulator) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  wgmma_fence();
  for (int turn = 0; turn < 2; ++turn) {
    product(d, shared);  // touched_accumulator here
    wgmma_commit_group();
    wgmma_wait_group<0>();
    for (int i = 0; i < 32; ++i) d[i] *= 2.f;
  }
  out[threadIdx.x] = d[0];
}
MOE_FAULTY(early_accumulator) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  wgmma_fence();
  product(d, shared);
  wgmma_commit_group();
  wgmma_wait_group<1>();                   // one group may still fly: this one
  out[threadIdx.x] = d[threadIdx.x % 32];  // early_accumulator here
  wgmma_wait_group<0>();
}
MOE_FAULTY(touched_a) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  uint32_t a[4] = {};
  wgmma_fence();
  for (uint32_t turn = 0; turn < 2; ++turn) {
    wgmma_a_registers<bf16, 64>(d, a, descriptor(shared, 16, 1024, 1), true);  // touched_a here
    wgmma_commit_group();
    wgmma_wait_group<0>();
    a[threadIdx.x % 4] = turn;
  }
}

// ---------------------------------------------------------------- what is still read or written
MOE_FAULTY(unwaited_load) {
  MOE_START load_tile(map, shared);
  float d[32] = {};
  wgmma_fence();
  product(d, shared);  // unwaited_load here
  wgmma_commit_group();
  wgmma_wait_group<0>();
  mbarrier_wait_parity(shared + kFull, 0);
}
MOE_FAULTY(overwritten_operand) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  wgmma_fence();
  product(d, shared);  // overwritten_operand earlier
  wgmma_commit_group();
  load_tile(map, shared);  // overwritten_operand here
  wgmma_wait_group<0>();
  mbarrier_wait_parity(shared + kFull, 1);
}
MOE_FAULTY(overwritten_staging) {
  MOE_START write_words(shared);
  fence_proxy_async();
  __syncthreads();
  const int32_t at[2] = {0, 0};
  if (threadIdx.x == 0) {
    tma_store(&map, at, shared);  // overwritten_staging earlier
    bulk_commit_group();
    *word_at(shared) = 1;  // overwritten_staging here
    bulk_wait_group<0>();
  }
}
MOE_KERNEL unwaited_store(const MOE_GRID_CONSTANT TensorMap map, const uint32_t* tensor, float* out) {
  const uint32_t shared = aligned_shared();
  write_words(shared);
  fence_proxy_async();
  __syncthreads();
  const int32_t at[2] = {0, 0};
  if (threadIdx.x == 0) {
    tma_store(&map, at, shared);  // unwaited_store earlier
    bulk_commit_group();
    bulk_wait_group_read<0>();  // the source is free, the target not written
    out[0] = float(tensor[0]);  // unwaited_store here
    bulk_wait_group<0>();
  }
}
MOE_FAULTY(exit_wgmma) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  wgmma_fence();
  product(d, shared);
  wgmma_commit_group();
}
MOE_FAULTY(exit_load) {
  MOE_START load_tile(map, shared);  // exit_load here
}
MOE_FAULTY(exit_store) {
  MOE_START write_words(shared);
  fence_proxy_async();
  __syncthreads();
  const int32_t at[2] = {0, 0};
  if (threadIdx.x == 0) {
    tma_store(&map, at, shared);
    bulk_commit_group();
  }
}

// ---------------------------------------------------------------- bytes of a phase
MOE_FAULTY(few_bytes) {
  MOE_START load_tile(map, shared, kTile / 2);
  mbarrier_wait_parity(shared + kFull, 0);  // few_bytes here
}
MOE_FAULTY(many_bytes) {
  MOE_START load_tile(map, shared, kTile + 16);
  mbarrier_wait_parity(shared + kFull, 0);  // many_bytes here
}

// ---------------------------------------------------------------- alignment, shapes
template <int Bytes, uint32_t Layout> MOE_FAULTY(unaligned_tile) {
  MOE_START write_words(shared);
  fence_proxy_async();
  __syncthreads();
  float d[32] = {};
  wgmma_fence();
  const uint64_t a = descriptor(shared + Bytes, 16, 1024, Layout);
  wgmma<bf16, 64>(d, a, a, true);  // unaligned_tile here
  wgmma_commit_group();
  wgmma_wait_group<0>();
}
MOE_FAULTY(unaligned_box) {
  MOE_START const int32_t at[2] = {0, 0};
  if (threadIdx.x == 0) tma_load(shared + 128, &map, at, shared + kFull);  // unaligned_box here
}
MOE_FAULTY(odd_columns) {
  MOE_START loaded(map, shared);
  float d[6] = {};
  wgmma_fence();
  wgmma<bf16, 12>(d, descriptor(shared, 16, 1024, 1), descriptor(shared, 16, 1024, 1), false);  // odd_columns here
}
MOE_FAULTY(tile_outside) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  wgmma_fence();
  wgmma<bf16, 64>(d, descriptor(shared, 16, 65536, 1), descriptor(shared, 16, 1024, 1), false);  // tile_outside here
}
MOE_FAULTY(no_map) {
  MOE_START TensorMap other{};
  const int32_t at[2] = {0, 0};
  if (threadIdx.x == 0) tma_load(shared, &other, at, shared + kFull);  // no_map here
}
MOE_FAULTY(narrow_box) {
  MOE_START load_tile(map, shared, 64 * 64);  // narrow_box here
  mbarrier_wait_parity(shared + kFull, 0);
}
MOE_FAULTY(half_warpgroup) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  wgmma_fence();
  if (threadIdx.x < 64) product(d, shared);  // half_warpgroup here
}
MOE_FAULTY(unequal_operands) {
  MOE_START loaded(map, shared);
  float d[32] = {};
  wgmma_fence();
  product(d, shared + (threadIdx.x < 64 ? 0 : 32));  // unequal_operands here
}

// ---------------------------------------------------------------- registers per thread; three warpgroups have 168
MOE_FAULTY(uneven_registers) {
  if (threadIdx.x / 128 == 0) {
    if (threadIdx.x < 64) setmaxnreg_dec<40>();  // uneven_registers here
    else setmaxnreg_dec<48>();                   // uneven_registers here
  }
  (void)map, (void)out;
}
MOE_FAULTY(registers_of_nobody) {
  if (threadIdx.x < 128) setmaxnreg_dec<48>();
  else setmaxnreg_inc<232>();  // registers_of_nobody here
  (void)map, (void)out;
}
MOE_FAULTY(decrease_up) {
  setmaxnreg_dec<176>();  // decrease_up here
  (void)map, (void)out;
}
MOE_FAULTY(increase_down) {
  setmaxnreg_inc<160>();  // increase_down here
  (void)map, (void)out;
}
MOE_FAULTY(registers_by_four) {
  setmaxnreg_dec<44>();  // registers_by_four here
  (void)map, (void)out;
}
MOE_FAULTY(too_few_registers) {
  setmaxnreg_dec<16>();  // too_few_registers here
  (void)map, (void)out;
}

// ---------------------------------------------------------------- clusters of two, dependent launches
MOE_FAULTY(early_exit) {
  MOE_START cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0 && cluster_ctarank() == 0) mbarrier_arrive_remote(shared + kFull, 1);  // early_exit here
}
MOE_FAULTY(foreign_multicast) {
  MOE_START const int32_t at[2] = {0, 0};
  if (threadIdx.x == 0) tma_load_multicast(shared, &map, at, shared + kFull, 4);  // foreign_multicast here
}
MOE_FAULTY(unmet_neighbour) {
  const uint32_t shared = aligned_shared();
  prepare(shared + kFull);
  if (threadIdx.x == 0) mbarrier_arrive_remote(shared + kFull, cluster_ctarank() ^ 1);  // unmet_neighbour here
  cluster_arrive();
  cluster_wait();
  (void)map, (void)out;
}
MOE_FAULTY(overwritten_neighbour) {
  MOE_START cluster_arrive();
  cluster_wait();
  if (cluster_ctarank() == 1 && threadIdx.x == 0) *word_at(shared) = 1;  // overwritten_neighbour earlier
  const int32_t at[2] = {0, 0};
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(shared + kFull, kTile);
    if (cluster_ctarank() == 0) tma_load_multicast(shared, &map, at, shared + kFull, 3);  // overwritten_neighbour here
  }
  mbarrier_wait_parity(shared + kFull, 0);
}
MOE_FAULTY(independent) {
  if (blockIdx.x != 0) return;
  griddepcontrol_wait();
  (void)map, (void)out;
}

// ---------------------------------------------------------------- their launches
template <class Kernel> std::string run(Kernel kernel, int threads = 128, unsigned cluster = 1, int inner = 64) {
  Device<uint16_t> tensor(std::vector<uint16_t>(64 * 64, 0));
  Device<float> out(std::vector<float>(1024, 0.f));
  LaunchShape shape{dim3(cluster), dim3(unsigned(threads)), 1024 + kShared};
  shape.cluster = cluster;
  const TensorMap map = map_of(tensor, DType::bf16, {64, 64}, {inner, 64}, 128);
  return outcome(launch(shape, nullptr, kernel, map, static_cast<float*>(out)));
}
#define MOE_FAULT(name, ...) \
  MOE_CASE(name) { return run(name __VA_ARGS__); }
MOE_FAULT(unfenced_store)
MOE_FAULT(unfenced_wgmma)
MOE_FAULT(unfenced_copy)
MOE_FAULT(unfenced_overwrite)
MOE_FAULT(no_wgmma_fence)
MOE_FAULT(touched_accumulator)
MOE_FAULT(early_accumulator)
MOE_FAULT(touched_a)
MOE_FAULT(unwaited_load)
MOE_FAULT(overwritten_operand)
MOE_FAULT(overwritten_staging)
MOE_FAULT(exit_wgmma)
MOE_FAULT(exit_load)
MOE_FAULT(exit_store)
MOE_FAULT(few_bytes)
MOE_FAULT(many_bytes)
MOE_FAULT(unaligned_box)
MOE_FAULT(odd_columns)
MOE_FAULT(tile_outside)
MOE_FAULT(no_map)
MOE_FAULT(half_warpgroup)
MOE_FAULT(unequal_operands)
MOE_FAULT(narrow_box, , 128, 1, 32)
MOE_FAULT(uneven_registers, , 384)
MOE_FAULT(registers_of_nobody, , 384)
MOE_FAULT(decrease_up, , 384)
MOE_FAULT(increase_down, , 384)
MOE_FAULT(registers_by_four, , 384)
MOE_FAULT(too_few_registers, , 384)
MOE_FAULT(early_exit, , 128, 2)
MOE_FAULT(foreign_multicast, , 128, 2)
MOE_FAULT(unmet_neighbour, , 128, 2)
MOE_FAULT(overwritten_neighbour, , 128, 2)
MOE_CASE(unaligned_128) { return run(unaligned_tile<512, 1>); }
MOE_CASE(unaligned_64) { return run(unaligned_tile<256, 2>); }
MOE_CASE(unaligned_32) { return run(unaligned_tile<128, 3>); }
MOE_CASE(independent) {
  Device<uint16_t> tensor(std::vector<uint16_t>(64 * 64, 0));
  LaunchShape shape{dim3(3), dim3(32)};
  shape.programmatic = true;
  return outcome(launch(shape, nullptr, independent, map_of(tensor, DType::bf16, {64, 64}, {64, 64}, 128),
                        static_cast<float*>(nullptr)));
}
MOE_CASE(unfenced_global) {
  Device<uint16_t> tensor(std::vector<uint16_t>(64 * 64, 0));
  return outcome(launch({dim3(1), dim3(128), 1024 + kShared}, nullptr, unfenced_global,
                        map_of(tensor, DType::bf16, {64, 64}, {64, 64}, 128),
                        reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(tensor))));
}
MOE_CASE(unwaited_store) {
  Device<uint16_t> tensor(std::vector<uint16_t>(64 * 64, 0));
  Device<float> out(1);
  return outcome(launch({dim3(1), dim3(128), 1024 + kShared}, nullptr, unwaited_store,
                        map_of(tensor, DType::bf16, {64, 64}, {64, 64}, 128),
                        reinterpret_cast<const uint32_t*>(static_cast<uint16_t*>(tensor)), static_cast<float*>(out)));
}
MOE_CASE(large_shared) {
  Device<uint16_t> tensor(std::vector<uint16_t>(64 * 64, 0));
  const TensorMap map = map_of(tensor, DType::bf16, {64, 64}, {64, 64}, 128);
  return outcome(launch({dim3(1), dim3(384), 232448 + 16}, nullptr, decrease_up, map, static_cast<float*>(nullptr)));
}
MOE_CASE(odd_cluster) {
  Device<uint16_t> tensor(std::vector<uint16_t>(64 * 64, 0));
  LaunchShape shape{dim3(3), dim3(32)};
  shape.cluster = 2;
  const TensorMap map = map_of(tensor, DType::bf16, {64, 64}, {64, 64}, 128);
  return outcome(launch(shape, nullptr, independent, map, static_cast<float*>(nullptr)));
}

}  // namespace moe::cuda

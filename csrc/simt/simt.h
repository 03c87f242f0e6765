// SPDX-License-Identifier: Apache-2.0
// The emulator's face to kernels: what ptx.cuh and cuda_names.h call. A launch runs every thread of a grid as a fiber
// on the calling thread, in an order drawn from a seed, and reports the first fault it finds (report.h). host_api.h is
// the face to launchers.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 { uint32_t x, y, z; };
struct dim3 {
  uint32_t x, y, z;
  constexpr dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

namespace moe::simt {

// Who the running thread is. Constant for a fiber, hence the attribute.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();

/// This block's dynamic shared memory; a fault if it is smaller than `bytes`.
void* shared_memory(size_t bytes);
uint32_t cvta_to_shared(const void* p);

// Accesses of one request each. Plain loads and stores reach the detector through hooks.cpp instead.
void ld_shared(void* value, uint32_t address, uint32_t bytes);
void st_shared(uint32_t address, const void* value, uint32_t bytes);
void ld_global(void* value, const void* p, uint32_t bytes, bool read_only);
void st_global(void* p, const void* value, uint32_t bytes);

// Barriers of a block and of a warp.
void block_barrier();
enum class Reduce { none, popc, all, any };
int block_barrier_reduce(int predicate, Reduce reduce);
void bar_sync(int id, int threads);
void bar_arrive(int id, int threads);
void warp_barrier(uint32_t mask);

// Warp collectives. They exchange registers and order no memory.
enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, uint32_t operand, uint32_t width);
enum class Vote { ballot, all, any };
uint32_t vote(uint32_t mask, bool predicate, Vote kind);
uint32_t match_any(uint32_t mask, uint64_t value);
uint32_t match_all(uint32_t mask, uint64_t value, int* all_equal);
enum class Redux { add, min_unsigned, max_unsigned, min_signed, max_signed, bit_and, bit_or, bit_xor };
uint32_t redux(uint32_t mask, uint32_t value, Redux kind);
uint32_t elect_sync(uint32_t mask);

// Atomics, on shared and global memory.
enum class Order { relaxed, acquire, release, acq_rel };
enum class Scope { block, device };
enum class AtomicOp { add, exch, min, max, bit_and, bit_or, bit_xor, cas };
/// Relaxed read-modify-write; `compare` is for cas alone. Defined for int, unsigned, unsigned long long, float, double.
template <class T> T atomic(T* p, T operand, T compare, AtomicOp op, Scope scope);
void fence(Scope scope);
uint32_t ld_acquire_gpu(const uint32_t* p);
uint64_t ld_acquire_gpu(const uint64_t* p);
uint32_t ld_relaxed_gpu(const uint32_t* p);
void st_release_gpu(uint32_t* p, uint32_t v);
void st_release_gpu(uint64_t* p, uint64_t v);
void st_relaxed_gpu(uint32_t* p, uint32_t v);
uint32_t atom_add_acq_rel_gpu(uint32_t* p, uint32_t v);
void red_release_gpu_add(uint32_t* p, uint32_t v);

// Conversions.
uint32_t cvt_rn_bf16x2_f32(float high, float low);
uint32_t cvt_rn_f16x2_f32(float high, float low);
float cvt_f32_f16(uint16_t bits);
uint32_t cvt_rna_tf32_f32(float a);

// Asynchronous copies, tiles, tensor cores.
void cp_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t read);
void cp_async_commit_group();
void cp_async_wait_group(int n);
void cp_async_wait_all();
void ldmatrix(uint32_t* r, int matrices, uint32_t row, bool transposed);
void stmatrix(uint32_t row, const uint32_t* r, int matrices, bool transposed);
enum class Mma { m16n8k16_bf16, m16n8k16_f16, m16n8k8_bf16, m16n8k8_tf32 };
void mma(Mma kind, float* d, const uint32_t* a, const uint32_t* b);

// mbarrier.
void mbarrier_init(uint32_t bar, uint32_t count);
void mbarrier_inval(uint32_t bar);
void mbarrier_arrive(uint32_t bar);
void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes);
bool mbarrier_test_wait_parity(uint32_t bar, uint32_t parity);
void mbarrier_wait_parity(uint32_t bar, uint32_t parity);
void cp_async_mbarrier_arrive_noinc(uint32_t bar);
void fence_mbarrier_init();
void fence_proxy_async();
void fence_proxy_async_global();

// Bulk copies of tensor maps. `map` is what cuTensorMapEncodeTiled of host_api.h has encoded.
void prefetch_tensor_map(const void* map);
void tma_load(uint32_t shared, const void* map, const int32_t* at, int rank, uint32_t bar);
void tma_load_multicast(uint32_t shared, const void* map, const int32_t* at, int rank, uint32_t bar, uint16_t ctas);
void tma_store(const void* map, const int32_t* at, int rank, uint32_t shared);
void tma_reduce_add(const void* map, const int32_t* at, int rank, uint32_t shared);
void bulk_commit_group();
void bulk_wait_group(int n, bool read);

// Warpgroups.
enum class Wgmma { bf16, f16, tf32 };
void wgmma_fence();
void wgmma_commit_group();
void wgmma_wait_group(int n);
void wgmma(Wgmma type, int n, float* d, uint64_t a, uint64_t b, bool accumulate, bool a_mn_major, bool b_mn_major);
void wgmma_a_registers(Wgmma type, int n, float* d, const uint32_t* a, uint64_t b, bool accumulate, bool b_mn_major);
void setmaxnreg(int registers, bool increase);

// Clusters.
uint32_t cluster_ctarank();
void cluster_arrive();
void cluster_wait();
uint32_t mapa(uint32_t shared, uint32_t cta);
uint32_t ld_shared_cluster(uint32_t address);
void st_shared_cluster(uint32_t address, uint32_t v);
void mbarrier_arrive_remote(uint32_t bar, uint32_t cta);

// Grids.
void griddepcontrol_wait();
void griddepcontrol_launch_dependents();
void nanosleep();
[[noreturn]] void trap(const char* what);

}  // namespace moe::simt

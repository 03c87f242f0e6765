// SPDX-License-Identifier: Apache-2.0
// Every PTX instruction the kernels use, one function each, named after its mnemonic. This is the only file with asm.
// Each has two bodies: the instruction, and its twin in the emulator (csrc/simt). "sm_xx" is the first architecture
// that has it, the section is that of the PTX ISA. Shared-memory operands are 32-bit addresses of the shared window.
#pragma once

#include "device.h"

#ifdef MOE_SIMT
#define MOE_TWIN(emulated, ...) emulated
#else
#define MOE_TWIN(emulated, ...) __VA_ARGS__
#endif

namespace moe::cuda {

// ---------------------------------------------------------------- addresses and vector accesses (sm_70)

/// cvta.to.shared (Data Movement: cvta). The shared-window address of a generic pointer into shared memory.
MOE_DEVICE uint32_t cvta_to_shared(const void* p) {
  MOE_TWIN(return simt::cvta_to_shared(p), return static_cast<uint32_t>(__cvta_generic_to_shared(p)));
}

/// ld.shared.v4.u32 (Data Movement: ld). `address` is a multiple of 16.
MOE_DEVICE uint4 ld_shared_v4(uint32_t address) {
  uint4 v;
  MOE_TWIN(simt::ld_shared(&v, address, 16), asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x),
                                                          "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory"));
  return v;
}

/// st.shared.v4.u32 (Data Movement: st). `address` is a multiple of 16.
MOE_DEVICE void st_shared_v4(uint32_t address, uint4 v) {
  MOE_TWIN(simt::st_shared(address, &v, 16), asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address),
                                                          "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"));
}

/// st.shared.v2.u32 (Data Movement: st). `address` is a multiple of 8.
MOE_DEVICE void st_shared_v2(uint32_t address, uint2 v) {
  MOE_TWIN(simt::st_shared(address, &v, 8),
           asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory"));
}

/// ld.shared.v2.u32 (Data Movement: ld). `address` is a multiple of 8.
MOE_DEVICE uint2 ld_shared_v2(uint32_t address) {
  uint2 v;
  MOE_TWIN(simt::ld_shared(&v, address, 8),
           asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory"));
  return v;
}

/// ld.shared.u32 (Data Movement: ld). `address` is a multiple of 4.
MOE_DEVICE uint32_t ld_shared(uint32_t address) {
  uint32_t v;
  MOE_TWIN(simt::ld_shared(&v, address, 4),
           asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory"));
  return v;
}

// ---------------------------------------------------------------- conversions (sm_80)

/// cvt.rn.bf16x2.f32 (Data Movement: cvt). `low` fills the low half.
MOE_DEVICE uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  uint32_t d;
  MOE_TWIN(d = simt::cvt_rn_bf16x2_f32(high, low),
           asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)));
  return d;
}

/// cvt.rn.f16x2.f32 (Data Movement: cvt). `low` fills the low half.
MOE_DEVICE uint32_t cvt_rn_f16x2_f32(float high, float low) {
  uint32_t d;
  MOE_TWIN(d = simt::cvt_rn_f16x2_f32(high, low), asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low)));
  return d;
}

/// cvt.f32.f16 (Data Movement: cvt, sm_53).
MOE_DEVICE float cvt_f32_f16(uint16_t bits) {
  float d;
  MOE_TWIN(d = simt::cvt_f32_f16(bits), asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(bits)));
  return d;
}

/// bfloat16 is the upper half of a float: a shift, on every architecture.
MOE_DEVICE float cvt_f32_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

/// cvt.rna.tf32.f32 (Data Movement: cvt).
MOE_DEVICE uint32_t cvt_rna_tf32_f32(float a) {
  uint32_t d;
  MOE_TWIN(d = simt::cvt_rna_tf32_f32(a), asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(a)));
  return d;
}

// ---------------------------------------------------------------- ordered accesses to flags in global memory (sm_70)

/// ld.acquire.gpu.global.u32 (Data Movement: ld).
MOE_DEVICE uint32_t ld_acquire_gpu(const uint32_t* p) {
  uint32_t v;
  MOE_TWIN(v = simt::ld_acquire_gpu(p),
           asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"));
  return v;
}

/// ld.relaxed.gpu.global.u32 (Data Movement: ld).
MOE_DEVICE uint32_t ld_relaxed_gpu(const uint32_t* p) {
  uint32_t v;
  MOE_TWIN(v = simt::ld_relaxed_gpu(p),
           asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"));
  return v;
}

/// ld.acquire.gpu.global.u64 (Data Movement: ld).
MOE_DEVICE uint64_t ld_acquire_gpu(const uint64_t* p) {
  uint64_t v;
  MOE_TWIN(v = simt::ld_acquire_gpu(p),
           asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory"));
  return v;
}

/// st.release.gpu.global.u32 (Data Movement: st).
MOE_DEVICE void st_release_gpu(uint32_t* p, uint32_t v) {
  MOE_TWIN(simt::st_release_gpu(p, v), asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"));
}

/// st.relaxed.gpu.global.u32 (Data Movement: st).
MOE_DEVICE void st_relaxed_gpu(uint32_t* p, uint32_t v) {
  MOE_TWIN(simt::st_relaxed_gpu(p, v), asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"));
}

/// st.release.gpu.global.u64 (Data Movement: st).
MOE_DEVICE void st_release_gpu(uint64_t* p, uint64_t v) {
  MOE_TWIN(simt::st_release_gpu(p, v), asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory"));
}

/// atom.add.acq_rel.gpu.global.u32 (Synchronization: atom). Returns the old value.
MOE_DEVICE uint32_t atom_add_acq_rel_gpu(uint32_t* p, uint32_t v) {
  uint32_t old;
  MOE_TWIN(old = simt::atom_add_acq_rel_gpu(p, v),
           asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory"));
  return old;
}

/// red.release.gpu.global.add.u32 (Synchronization: red).
MOE_DEVICE void red_release_gpu_add(uint32_t* p, uint32_t v) {
  MOE_TWIN(simt::red_release_gpu_add(p, v),
           asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"));
}

// ---------------------------------------------------------------- named barriers (sm_70)

/// bar.sync id, threads (Synchronization: bar). `threads` is a multiple of 32; barrier 0 is that of __syncthreads.
MOE_DEVICE void bar_sync(int id, int threads) {
  MOE_TWIN(simt::bar_sync(id, threads), asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

/// bar.arrive id, threads (Synchronization: bar). Arrives and goes on.
MOE_DEVICE void bar_arrive(int id, int threads) {
  MOE_TWIN(simt::bar_arrive(id, threads), asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"));
}

// ---------------------------------------------------------------- asynchronous copies (sm_80)

/// cp.async.ca.shared.global (Data Movement: cp.async). 4 bytes through L1; only `read` are read, the rest is zero.
MOE_DEVICE void cp_async_ca_4(uint32_t shared, const void* global, uint32_t read = 4) {
  MOE_TWIN(
      simt::cp_async(shared, global, 4, read),
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(read) : "memory"));
}

/// cp.async.ca.shared.global, 16 bytes through L1.
MOE_DEVICE void cp_async_ca_16(uint32_t shared, const void* global, uint32_t read = 16) {
  MOE_TWIN(
      simt::cp_async(shared, global, 16, read),
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(read) : "memory"));
}

/// cp.async.cg.shared.global, 16 bytes, past L1.
MOE_DEVICE void cp_async_cg_16(uint32_t shared, const void* global, uint32_t read = 16) {
  MOE_TWIN(
      simt::cp_async(shared, global, 16, read),
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(read) : "memory"));
}

/// cp.async.commit_group (Data Movement: cp.async.commit_group).
MOE_DEVICE void cp_async_commit_group() {
  MOE_TWIN(simt::cp_async_commit_group(), asm volatile("cp.async.commit_group;" :: : "memory"));
}

/// cp.async.wait_group N (Data Movement: cp.async.wait_group). At most the last N groups of this thread still fly.
template <int N> MOE_DEVICE void cp_async_wait_group() {
  MOE_TWIN(simt::cp_async_wait_group(N), asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"));
}

/// cp.async.wait_all (Data Movement: cp.async.wait_all).
MOE_DEVICE void cp_async_wait_all() {
  MOE_TWIN(simt::cp_async_wait_all(), asm volatile("cp.async.wait_all;" :: : "memory"));
}

// ---------------------------------------------------------------- matrix tiles between shared memory and registers

/// ldmatrix.sync.aligned.m8n8 (Matrix: ldmatrix, sm_75). Lanes 8j..8j+7 give the row addresses of matrix j.
MOE_DEVICE void ldmatrix_x1(uint32_t (&r)[1], uint32_t row) {
  MOE_TWIN(simt::ldmatrix(r, 1, row, false),
           asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory"));
}
MOE_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
  MOE_TWIN(simt::ldmatrix(r, 2, row, false),
           asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                        "=r"(r[1]) : "r"(row) : "memory"));
}
MOE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  MOE_TWIN(simt::ldmatrix(r, 4, row, false),
           asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]),
                        "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory"));
}
MOE_DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t row) {
  MOE_TWIN(
      simt::ldmatrix(r, 1, row, true),
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory"));
}
MOE_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
  MOE_TWIN(simt::ldmatrix(r, 2, row, true),
           asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]),
                        "=r"(r[1]) : "r"(row) : "memory"));
}
MOE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  MOE_TWIN(simt::ldmatrix(r, 4, row, true),
           asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]),
                        "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory"));
}

/// stmatrix.sync.aligned.m8n8 (Matrix: stmatrix, sm_90). The map of ldmatrix the other way.
MOE_DEVICE void stmatrix_x1(uint32_t row, const uint32_t (&r)[1]) {
  MOE_TWIN(simt::stmatrix(row, r, 1, false),
           asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row), "r"(r[0]) : "memory"));
}
MOE_DEVICE void stmatrix_x2(uint32_t row, const uint32_t (&r)[2]) {
  MOE_TWIN(simt::stmatrix(row, r, 2, false),
           asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r[0]),
                        "r"(r[1]) : "memory"));
}
MOE_DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  MOE_TWIN(simt::stmatrix(row, r, 4, false),
           asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                        "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}
MOE_DEVICE void stmatrix_x1_trans(uint32_t row, const uint32_t (&r)[1]) {
  MOE_TWIN(simt::stmatrix(row, r, 1, true),
           asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row), "r"(r[0]) : "memory"));
}
MOE_DEVICE void stmatrix_x2_trans(uint32_t row, const uint32_t (&r)[2]) {
  MOE_TWIN(simt::stmatrix(row, r, 2, true),
           asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(r[0]),
                        "r"(r[1]) : "memory"));
}
MOE_DEVICE void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
  MOE_TWIN(simt::stmatrix(row, r, 4, true),
           asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
                        "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}

// ---------------------------------------------------------------- tensor cores of a warp: d += a b (sm_80)

#define MOE_MMA_4_2(mnemonic)                                                              \
  asm volatile(mnemonic " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#define MOE_MMA_2_1(mnemonic)                                                  \
  asm volatile(mnemonic " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                \
               : "r"(a[0]), "r"(a[1]), "r"(b[0]))

/// mma.sync.aligned.m16n8k16 bf16 (Matrix: mma).
MOE_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MOE_TWIN(simt::mma(simt::Mma::m16n8k16_bf16, d, a, b),
           MOE_MMA_4_2("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"));
}
/// mma.sync.aligned.m16n8k16 f16 (Matrix: mma).
MOE_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MOE_TWIN(simt::mma(simt::Mma::m16n8k16_f16, d, a, b),
           MOE_MMA_4_2("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"));
}
/// mma.sync.aligned.m16n8k8 bf16 (Matrix: mma).
MOE_DEVICE void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  MOE_TWIN(simt::mma(simt::Mma::m16n8k8_bf16, d, a, b),
           MOE_MMA_2_1("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32"));
}
/// mma.sync.aligned.m16n8k8 tf32 (Matrix: mma).
MOE_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MOE_TWIN(simt::mma(simt::Mma::m16n8k8_tf32, d, a, b),
           MOE_MMA_4_2("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"));
}
#undef MOE_MMA_4_2
#undef MOE_MMA_2_1

// ---------------------------------------------------------------- mbarrier (sm_80; expect_tx and try_wait sm_90)

/// mbarrier.init (Synchronization: mbarrier.init). Publish it with a fence or a block barrier before use.
MOE_DEVICE void mbarrier_init(uint32_t bar, uint32_t count) {
  MOE_TWIN(simt::mbarrier_init(bar, count),
           asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"));
}
/// mbarrier.inval (Synchronization: mbarrier.inval).
MOE_DEVICE void mbarrier_inval(uint32_t bar) {
  MOE_TWIN(simt::mbarrier_inval(bar), asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(bar) : "memory"));
}
/// mbarrier.arrive (Synchronization: mbarrier.arrive), release at block scope.
MOE_DEVICE void mbarrier_arrive(uint32_t bar) {
  MOE_TWIN(simt::mbarrier_arrive(bar),
           asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(bar) : "memory"));
}
/// mbarrier.arrive.expect_tx (sm_90): this phase also waits for `bytes` of asynchronous copies.
MOE_DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  MOE_TWIN(simt::mbarrier_arrive_expect_tx(bar, bytes),
           asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory"));
}
/// mbarrier.test_wait.parity (Synchronization: mbarrier.test_wait): has the phase of this parity ended?
MOE_DEVICE bool mbarrier_test_wait_parity(uint32_t bar, uint32_t parity) {
  uint32_t done;
  MOE_TWIN(done = simt::mbarrier_test_wait_parity(bar, parity),
           asm volatile(
               "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(
                   done) : "r"(bar),
               "r"(parity) : "memory"));
  return done != 0;
}
/// mbarrier.try_wait.parity (sm_90), repeated until the phase of this parity has ended.
MOE_DEVICE void mbarrier_wait_parity(uint32_t bar, uint32_t parity) {
  MOE_TWIN(simt::mbarrier_wait_parity(bar, parity),
           asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                        "@p bra done;\nbra again;\ndone:\n}" ::"r"(bar),
                        "r"(parity) : "memory"));
}
/// cp.async.mbarrier.arrive.noinc (Synchronization: cp.async.mbarrier.arrive, sm_80): one of the expected arrivals
/// happens when this thread's earlier cp.async have landed.
MOE_DEVICE void cp_async_mbarrier_arrive_noinc(uint32_t bar) {
  MOE_TWIN(simt::cp_async_mbarrier_arrive_noinc(bar),
           asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory"));
}
/// fence.mbarrier_init.release.cluster (Synchronization: membar/fence, sm_90).
MOE_DEVICE void fence_mbarrier_init() {
  MOE_TWIN(simt::fence_mbarrier_init(), asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
/// fence.proxy.async.shared::cta (Synchronization: membar/fence, sm_90): ordinary writes become visible to the
/// asynchronous proxy (TMA, wgmma).
MOE_DEVICE void fence_proxy_async() {
  MOE_TWIN(simt::fence_proxy_async(), asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

// ---------------------------------------------------------------- grids and warps (sm_90)

/// griddepcontrol.wait (Parallel Synchronization: griddepcontrol): the kernel before in the stream has ended and its
/// writes are visible. Nothing to do on older architectures, where a kernel never starts before that.
MOE_DEVICE void griddepcontrol_wait() {
#if MOE_ARCH >= 900
  MOE_TWIN(simt::griddepcontrol_wait(), asm volatile("griddepcontrol.wait;" :: : "memory"));
#endif
}
/// griddepcontrol.launch_dependents: the next kernel may start.
MOE_DEVICE void griddepcontrol_launch_dependents() {
#if MOE_ARCH >= 900
  MOE_TWIN(simt::griddepcontrol_launch_dependents(), asm volatile("griddepcontrol.launch_dependents;" :: : "memory"));
#endif
}
/// elect.sync (Parallel Synchronization: elect.sync): true in exactly one lane of the mask.
MOE_DEVICE bool elect_sync(uint32_t mask) {
  uint32_t elected;
  MOE_TWIN(elected = simt::elect_sync(mask),
           asm volatile("{\n.reg .pred p;\nelect.sync _|p, %1;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected) : "r"(mask)));
  return elected != 0;
}

}  // namespace moe::cuda

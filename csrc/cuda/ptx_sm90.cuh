// SPDX-License-Identifier: Apache-2.0
// The PTX instructions of Hopper, beside ptx.cuh: bulk copies of tensor maps (TMA), the tensor cores of a warpgroup
// (wgmma), register counts and clusters. wgmma and setmaxnreg exist for sm_90a alone, so the body of a kernel that uses
// them stands under `#if MOE_SM90A`; ptxas refuses it elsewhere.
#pragma once

#include "../dtype.h"
#include "ptx.cuh"

namespace moe::cuda {

struct TensorMap;  // tensor_map.h

// ---------------------------------------------------------------- TMA: boxes of a tensor (sm_90)

/// prefetch.tensormap (Data Movement: prefetch).
MOE_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  MOE_TWIN(simt::prefetch_tensor_map(map), asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}

#define MOE_COORDINATES_2 "r"(at[0]), "r"(at[1])
#define MOE_COORDINATES_3 MOE_COORDINATES_2, "r"(at[2])
#define MOE_COORDINATES_4 MOE_COORDINATES_3, "r"(at[3])
#define MOE_TMA_LOAD(d, names, ...)                                                                                  \
  asm volatile("cp.async.bulk.tensor." #d "d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" names \
               "}], [%2];" ::"r"(shared),                                                                            \
               "l"(map), "r"(bar), __VA_ARGS__                                                                       \
               : "memory")

/// cp.async.bulk.tensor (Data Movement: cp.async.bulk.tensor). Copies the box whose corner is `at`, innermost
/// coordinate first, to `shared`; when it has landed its bytes, all of the box, count at `bar`. What lies outside is
/// zero.
template <int D>
MOE_DEVICE void tma_load(uint32_t shared, const TensorMap* map, const int32_t (&at)[D], uint32_t bar) {
  static_assert(2 <= D && D <= 4, "2 to 4 dimensions");
  MOE_TWIN(simt::tma_load(shared, map, at, D, bar), if constexpr (D == 2) MOE_TMA_LOAD(2, "%3, %4", MOE_COORDINATES_2);
           if constexpr (D == 3) MOE_TMA_LOAD(3, "%3, %4, %5", MOE_COORDINATES_3);
           if constexpr (D == 4) MOE_TMA_LOAD(4, "%3, %4, %5, %6", MOE_COORDINATES_4););
}

#define MOE_TMA_MULTICAST(d, names, ...)                                                                     \
  asm volatile("cp.async.bulk.tensor." #d                                                                    \
               "d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {" names \
               "}], [%2], %3;" ::"r"(shared),                                                                \
               "l"(map), "r"(bar), "h"(ctas), __VA_ARGS__                                                    \
               : "memory")

/// The same box into the shared memory of every block of the cluster whose bit is set in `ctas`, at the same offset,
/// and its bytes at the barrier there at the offset of `bar`.
template <int D>
MOE_DEVICE void tma_load_multicast(uint32_t shared, const TensorMap* map, const int32_t (&at)[D], uint32_t bar,
                                   uint16_t ctas) {
  static_assert(2 <= D && D <= 4, "2 to 4 dimensions");
  MOE_TWIN(simt::tma_load_multicast(shared, map, at, D, bar, ctas),
           if constexpr (D == 2) MOE_TMA_MULTICAST(2, "%4, %5", MOE_COORDINATES_2);
           if constexpr (D == 3) MOE_TMA_MULTICAST(3, "%4, %5, %6", MOE_COORDINATES_3);
           if constexpr (D == 4) MOE_TMA_MULTICAST(4, "%4, %5, %6, %7", MOE_COORDINATES_4););
}

#define MOE_TMA_STORE(start, d, kind, names, ...)                                                    \
  asm volatile(start ".async.bulk.tensor." #d "d.global.shared::cta" kind ".bulk_group [%0, {" names \
                     "}], [%1];" ::"l"(map),                                                         \
               "r"(shared), __VA_ARGS__                                                              \
               : "memory")

/// cp.async.bulk.tensor (Data Movement: cp.async.bulk.tensor). Copies the box at `shared` to where its corner is `at`;
/// nothing outside of the tensor is written. Belongs to this thread's next bulk group.
template <int D> MOE_DEVICE void tma_store(const TensorMap* map, const int32_t (&at)[D], uint32_t shared) {
  static_assert(2 <= D && D <= 4, "2 to 4 dimensions");
  MOE_TWIN(simt::tma_store(map, at, D, shared),
           if constexpr (D == 2) MOE_TMA_STORE("cp", 2, "", "%2, %3", MOE_COORDINATES_2);
           if constexpr (D == 3) MOE_TMA_STORE("cp", 3, "", "%2, %3, %4", MOE_COORDINATES_3);
           if constexpr (D == 4) MOE_TMA_STORE("cp", 4, "", "%2, %3, %4, %5", MOE_COORDINATES_4););
}

/// cp.reduce.async.bulk.tensor (Data Movement: cp.reduce.async.bulk.tensor): as tma_store, but adds, atomically.
template <int D> MOE_DEVICE void tma_reduce_add(const TensorMap* map, const int32_t (&at)[D], uint32_t shared) {
  static_assert(2 <= D && D <= 4, "2 to 4 dimensions");
  MOE_TWIN(simt::tma_reduce_add(map, at, D, shared),
           if constexpr (D == 2) MOE_TMA_STORE("cp.reduce", 2, ".add", "%2, %3", MOE_COORDINATES_2);
           if constexpr (D == 3) MOE_TMA_STORE("cp.reduce", 3, ".add", "%2, %3, %4", MOE_COORDINATES_3);
           if constexpr (D == 4) MOE_TMA_STORE("cp.reduce", 4, ".add", "%2, %3, %4, %5", MOE_COORDINATES_4););
}
#undef MOE_COORDINATES_2
#undef MOE_COORDINATES_3
#undef MOE_COORDINATES_4
#undef MOE_TMA_LOAD
#undef MOE_TMA_MULTICAST
#undef MOE_TMA_STORE

/// cp.async.bulk.commit_group (Data Movement: cp.async.bulk.commit_group).
MOE_DEVICE void bulk_commit_group() {
  MOE_TWIN(simt::bulk_commit_group(), asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
}
/// cp.async.bulk.wait_group (Data Movement: cp.async.bulk.wait_group). At most the last N groups of this thread still
/// fly; what the others have written is visible to this thread.
template <int N> MOE_DEVICE void bulk_wait_group() {
  MOE_TWIN(simt::bulk_wait_group(N, false), asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"));
}
/// cp.async.bulk.wait_group.read: the others have read their shared memory, which may be written again.
template <int N> MOE_DEVICE void bulk_wait_group_read() {
  MOE_TWIN(simt::bulk_wait_group(N, true), asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"));
}
/// fence.proxy.async.global (Synchronization: membar/fence): as fence_proxy_async, for global memory.
MOE_DEVICE void fence_proxy_async_global() {
  MOE_TWIN(simt::fence_proxy_async_global(), asm volatile("fence.proxy.async.global;" :: : "memory"));
}

// ---------------------------------------------------------------- tensor cores of a warpgroup (sm_90a)

/// wgmma.fence.sync.aligned (Asynchronous Warpgroup Matrix: wgmma.fence). Before the first wgmma, and whenever
/// registers that one reads or adds to were touched by anything else.
MOE_DEVICE void wgmma_fence() {
  MOE_TWIN(simt::wgmma_fence(), asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
}
/// wgmma.commit_group.sync.aligned.
MOE_DEVICE void wgmma_commit_group() {
  MOE_TWIN(simt::wgmma_commit_group(), asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}
/// wgmma.wait_group.sync.aligned. At most the last N groups still fly: until then neither their accumulators nor the
/// shared memory they read may be touched.
template <int N> MOE_DEVICE void wgmma_wait_group() {
  MOE_TWIN(simt::wgmma_wait_group(N), asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"));
}
/// No instruction: the compiler may not move accesses of these registers across.
template <int N> MOE_DEVICE void wgmma_fence_operands(float (&d)[N]) {
  MOE_TWIN((void)d, _Pragma("unroll") for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory"););
}

/// tf32 as the type of a product: the operands are floats, of which 10 bits of mantissa are read.
struct tf32 {};

namespace wgmma_detail {
#define MOE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOE_D8(i) MOE_D4(i), MOE_D4(i + 4)
#define MOE_D16(i) MOE_D8(i), MOE_D8(i + 8)
#define MOE_D32(i) MOE_D16(i), MOE_D16(i + 16)
#define MOE_D64(i) MOE_D32(i), MOE_D32(i + 32)
// The accumulators of N columns: their constraints, then their names.
#define MOE_OUT_8 MOE_D4(0)
#define MOE_OUT_16 MOE_D8(0)
#define MOE_OUT_32 MOE_D16(0)
#define MOE_OUT_64 MOE_D32(0)
#define MOE_OUT_96 MOE_D32(0), MOE_D16(32)
#define MOE_OUT_128 MOE_D64(0)
#define MOE_OUT_160 MOE_D64(0), MOE_D16(64)
#define MOE_OUT_192 MOE_D64(0), MOE_D32(64)
#define MOE_OUT_256 MOE_D64(0), MOE_D64(64)
#define MOE_NAMES_8 "%0,%1,%2,%3"
#define MOE_NAMES_16 MOE_NAMES_8 ",%4,%5,%6,%7"
#define MOE_NAMES_32 MOE_NAMES_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define MOE_NAMES_64 \
  MOE_NAMES_32       \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MOE_NAMES_96 \
  MOE_NAMES_64       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define MOE_NAMES_128 \
  MOE_NAMES_96        \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MOE_NAMES_160 \
  MOE_NAMES_128       \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define MOE_NAMES_192 \
  MOE_NAMES_160       \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define MOE_NAMES_256                                                            \
  MOE_NAMES_192                                                                  \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// Operands behind the accumulators by their numbers, as text; the scales of a and b are 1.
#define MOE_TEXT(n, type, a, b, add, trans)                                                                    \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n type " {" MOE_NAMES_##n \
      "}, " a ", " b ", p, 1, 1" trans ";\n}"
#define MOE_IN_SHARED "l"(a), "l"(b), "r"(int(accumulate))
#define MOE_IN_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate))

template <class T> constexpr int kind = T::kBrain ? 0 : 1;
template <> constexpr int kind<tf32> = 2;

// One struct for every N, since the operands are text. TransA, TransB: 0 K-major, 1 MN-major.
template <class T, int N, int TransA, int TransB> struct Product;
#define MOE_PRODUCT(n, r0, r1, r2, r3, r4, r5, r6)                                                       \
  template <class T, int TransA, int TransB> struct Product<T, n, TransA, TransB> {                      \
    static MOE_DEVICE void run(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {             \
      if constexpr (kind<T> == 0)                                                                        \
        asm volatile(MOE_TEXT(n, "k16.f32.bf16.bf16", r0, r1, r2, ", " r3 ", " r4)                       \
                     : MOE_OUT_##n                                                                       \
                     : MOE_IN_SHARED, "n"(TransA), "n"(TransB));                                         \
      if constexpr (kind<T> == 1)                                                                        \
        asm volatile(MOE_TEXT(n, "k16.f32.f16.f16", r0, r1, r2, ", " r3 ", " r4)                         \
                     : MOE_OUT_##n                                                                       \
                     : MOE_IN_SHARED, "n"(TransA), "n"(TransB));                                         \
      if constexpr (kind<T> == 2)                                                                        \
        asm volatile(MOE_TEXT(n, "k8.f32.tf32.tf32", r0, r1, r2, "") : MOE_OUT_##n : MOE_IN_SHARED);     \
    }                                                                                                    \
    static MOE_DEVICE void run(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      if constexpr (kind<T> == 0)                                                                        \
        asm volatile(MOE_TEXT(n, "k16.f32.bf16.bf16", "{" r0 "," r1 "," r2 "," r3 "}", r4, r5, ", " r6)  \
                     : MOE_OUT_##n                                                                       \
                     : MOE_IN_REGISTERS, "n"(TransB));                                                   \
      if constexpr (kind<T> == 1)                                                                        \
        asm volatile(MOE_TEXT(n, "k16.f32.f16.f16", "{" r0 "," r1 "," r2 "," r3 "}", r4, r5, ", " r6)    \
                     : MOE_OUT_##n                                                                       \
                     : MOE_IN_REGISTERS, "n"(TransB));                                                   \
      if constexpr (kind<T> == 2)                                                                        \
        asm volatile(MOE_TEXT(n, "k8.f32.tf32.tf32", "{" r0 "," r1 "," r2 "," r3 "}", r4, r5, "")        \
                     : MOE_OUT_##n                                                                       \
                     : MOE_IN_REGISTERS);                                                                \
    }                                                                                                    \
  };
#ifndef MOE_SIMT
MOE_PRODUCT(8, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
MOE_PRODUCT(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
MOE_PRODUCT(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
MOE_PRODUCT(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
MOE_PRODUCT(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
MOE_PRODUCT(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
MOE_PRODUCT(160, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
MOE_PRODUCT(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
MOE_PRODUCT(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#endif
#undef MOE_TEXT
#undef MOE_IN_SHARED
#undef MOE_IN_REGISTERS
#undef MOE_PRODUCT
}  // namespace wgmma_detail

/// wgmma.mma_async.sync.aligned.m64nNk16 (Asynchronous Warpgroup Matrix: wgmma.mma_async): d = a b, or d += a b, of the
/// warpgroup. T is bf16, f16 or tf32 (k8); a and b are matrix descriptors of shared memory, TransA and TransB 0 if they
/// are K-major, 1 if MN-major. Register i of thread t of the warpgroup is row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2),
/// column 8 (i / 4) + 2 (t % 4) + i % 2 of d.
template <class T, int N, int TransA = 0, int TransB = 0>
MOE_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(wgmma_detail::kind<T> != 2 || (TransA == 0 && TransB == 0), "only 16-bit types are MN-major");
  MOE_TWIN(simt::wgmma(simt::Wgmma(wgmma_detail::kind<T>), N, d, a, b, accumulate, TransA != 0, TransB != 0),
           wgmma_detail::Product<T, N, TransA, TransB>::run(d, a, b, accumulate));
}

/// The same with a in registers, K-major: those of mma_m16n8k16's a, each warp its 16 rows.
template <class T, int N, int TransB = 0>
MOE_DEVICE void wgmma_a_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(wgmma_detail::kind<T> != 2 || TransB == 0, "only 16-bit types are MN-major");
  MOE_TWIN(simt::wgmma_a_registers(simt::Wgmma(wgmma_detail::kind<T>), N, d, a, b, accumulate, TransB != 0),
           wgmma_detail::Product<T, N, 0, TransB>::run(d, a, b, accumulate));
}

/// setmaxnreg (Miscellaneous: setmaxnreg, sm_90a): this warpgroup's registers per thread, a multiple of 8 from 24 to
/// 256; all its warps run the same one. The larger number waits until the block has the registers.
template <int R> MOE_DEVICE void setmaxnreg_inc() {
  MOE_TWIN(simt::setmaxnreg(R, true), asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R)));
}
template <int R> MOE_DEVICE void setmaxnreg_dec() {
  MOE_TWIN(simt::setmaxnreg(R, false), asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R)));
}

// ---------------------------------------------------------------- clusters of blocks (sm_90)

/// %cluster_ctarank: which block of its cluster this is.
MOE_DEVICE uint32_t cluster_ctarank() {
  uint32_t rank;
  MOE_TWIN(rank = simt::cluster_ctarank(), asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}
/// barrier.cluster.arrive.release (Parallel Synchronization: barrier.cluster). All threads of all blocks, each once.
MOE_DEVICE void cluster_arrive() {
  MOE_TWIN(simt::cluster_arrive(), asm volatile("barrier.cluster.arrive.release;" :: : "memory"));
}
/// barrier.cluster.wait.acquire: until all threads of the cluster have arrived.
MOE_DEVICE void cluster_wait() {
  MOE_TWIN(simt::cluster_wait(), asm volatile("barrier.cluster.wait.acquire;" :: : "memory"));
}
/// mapa.shared::cluster (Data Movement: mapa): the address in block `cta` of what is at `shared` in this one.
MOE_DEVICE uint32_t mapa(uint32_t shared, uint32_t cta) {
  uint32_t address;
  MOE_TWIN(address = simt::mapa(shared, cta),
           asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(cta)));
  return address;
}
/// ld.shared::cluster.u32 and st.shared::cluster.u32 (Data Movement: ld, st), at an address from mapa.
MOE_DEVICE uint32_t ld_shared_cluster(uint32_t address) {
  uint32_t v;
  MOE_TWIN(v = simt::ld_shared_cluster(address),
           asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory"));
  return v;
}
MOE_DEVICE void st_shared_cluster(uint32_t address, uint32_t v) {
  MOE_TWIN(simt::st_shared_cluster(address, v),
           asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"));
}
/// mbarrier.arrive.shared::cluster (Synchronization: mbarrier.arrive) at the barrier of block `cta`: that this warp has
/// read. Written data it does not order at the scope of the cluster, which would cost a fence of all memory.
MOE_DEVICE void mbarrier_arrive_remote(uint32_t bar, uint32_t cta) {
  MOE_TWIN(simt::mbarrier_arrive_remote(bar, cta),
           asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
                        "r"(cta) : "memory"));
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// Kernels that are wrong on purpose, one a kind of report. tests/test_simt.py looks for the line marked "here" of each
// and asks whether the report names it.
#include "../../csrc/cuda/ptx.cuh"
#include "harness.h"

namespace moe::cuda {
using test::Device;
using test::outcome;

MOE_KERNEL race_shared(int* out) {
  MOE_SHARED(int, cells);
  cells[threadIdx.x] = 0;
  __syncthreads();
  cells[threadIdx.x] = int(threadIdx.x);       // race_shared earlier
  out[threadIdx.x] = cells[threadIdx.x ^ 32];  // race_shared here
}
MOE_KERNEL race_global(int* out) { out[threadIdx.x] = int(blockIdx.x); }  // race_global here
MOE_KERNEL bounds_global(int* out, int n) {
  const int i = int(threadIdx.x);
  if (i <= n) out[i] = i;  // bounds_global here
}
MOE_KERNEL bounds_shared(int* out) {
  MOE_SHARED(int, cells);
  cells[threadIdx.x + 1] = 1;  // bounds_shared here
  out[threadIdx.x] = 0;
}
MOE_KERNEL misaligned(int* out) {
  const int2 v = make_int2(1, 2);
  __stcs(reinterpret_cast<int2*>(out + 1), v);  // misaligned here
}
MOE_KERNEL uninitialised_shared(int* out) {
  MOE_SHARED(int, cells);
  out[threadIdx.x] = cells[threadIdx.x];  // uninitialised_shared here
}
MOE_KERNEL uninitialised_global(int* out) { out[0] = out[1]; }  // uninitialised_global here
MOE_KERNEL read_only(int* out) {
  if (threadIdx.x == 0) out[0] = 1;
  __syncthreads();
  if (threadIdx.x == 0) out[1] = __ldg(out);  // read_only here
}
MOE_KERNEL deadlock_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();  // deadlock_barrier here
  out[threadIdx.x] = 0;
}
MOE_KERNEL deadlock_flag(uint32_t* flag, int* out) {
  while (ld_acquire_gpu(flag) == 0) {  // deadlock_flag here
  }
  out[0] = 0;
}
MOE_KERNEL divergent_barrier(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}
MOE_KERNEL in_flight(const int* in, int* out) {
  MOE_SHARED(int4, cells);
  const uint32_t at = cvta_to_shared(cells) + 16 * threadIdx.x;
  cp_async_cg_16(at, in + 4 * threadIdx.x);
  cp_async_commit_group();
  out[threadIdx.x] = int(ld_shared_v4(at).x);  // in_flight here
}
MOE_KERNEL stack_of_another(int** place, int* out) {
  int local[4] = {1, 2, 3, 4};
  if (threadIdx.x == 0) *place = &local[out == nullptr];
  __syncthreads();
  if (threadIdx.x == 1) out[0] = (*place)[1];  // stack_of_another here
  __syncthreads();
}

MOE_CASE(race_shared) {
  Device<int> out(64);
  return outcome(launch({dim3(1), dim3(64), 256}, nullptr, race_shared, static_cast<int*>(out)));
}
MOE_CASE(race_global) {
  Device<int> out(32);
  return outcome(launch({dim3(2), dim3(32)}, nullptr, race_global, static_cast<int*>(out)));
}
MOE_CASE(bounds_global) {
  Device<int> out(20);
  return outcome(launch({dim3(1), dim3(32)}, nullptr, bounds_global, static_cast<int*>(out), 20));
}
MOE_CASE(bounds_shared) {
  Device<int> out(32);
  return outcome(launch({dim3(1), dim3(32), 128}, nullptr, bounds_shared, static_cast<int*>(out)));
}
MOE_CASE(misaligned) {
  Device<int> out(32);
  return outcome(launch({dim3(1), dim3(1)}, nullptr, misaligned, static_cast<int*>(out)));
}
MOE_CASE(uninitialised_shared) {
  Device<int> out(32);
  return outcome(launch({dim3(1), dim3(32), 128}, nullptr, uninitialised_shared, static_cast<int*>(out)));
}
MOE_CASE(uninitialised_global) {
  Device<int> out(2);
  return outcome(launch({dim3(1), dim3(1)}, nullptr, uninitialised_global, static_cast<int*>(out)));
}
MOE_CASE(read_only) {
  Device<int> out(2);
  return outcome(launch({dim3(1), dim3(32)}, nullptr, read_only, static_cast<int*>(out)));
}
MOE_CASE(deadlock_barrier) {
  Device<int> out(64);
  return outcome(launch({dim3(1), dim3(64)}, nullptr, deadlock_barrier, static_cast<int*>(out)));
}
MOE_CASE(deadlock_flag) {
  Device<int> out(1);
  Device<uint32_t> flag(std::vector<uint32_t>(1, 0));
  return outcome(
      launch({dim3(1), dim3(1)}, nullptr, deadlock_flag, static_cast<uint32_t*>(flag), static_cast<int*>(out)));
}
MOE_CASE(divergent_barrier) {
  Device<int> out(64);
  return outcome(launch({dim3(1), dim3(64)}, nullptr, divergent_barrier, static_cast<int*>(out)));
}
MOE_CASE(in_flight) {
  Device<int> in(std::vector<int>(128, 1)), out(32);
  return outcome(
      launch({dim3(1), dim3(32), 512}, nullptr, in_flight, static_cast<const int*>(in), static_cast<int*>(out)));
}
MOE_CASE(stack_of_another) {
  Device<int*> place(1);
  Device<int> out(1);
  return outcome(
      launch({dim3(1), dim3(2)}, nullptr, stack_of_another, static_cast<int**>(place), static_cast<int*>(out)));
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// What every kernel includes first: the CUDA language, whichever compiler reads it.
//   nvcc   the toolkit's own headers.
//   NVRTC  no host header at all: the integer types are defined here.
//   g++ -DMOE_SIMT  csrc/simt/cuda_names.h gives threadIdx, __syncthreads, atomicAdd ... to plain C++.
//   g++ -DMOE_NVRTC  the same for the launchers of a build without nvcc: they need a kernel's name and its parameters'
//                    types, never its body, so nothing of it is compiled (csrc/nvrtc/driver.h).
// Kernels use dynamic shared memory only, through MOE_SHARED, and no asm: that stands in ptx.cuh.
#pragma once

#ifdef MOE_NVRTC
#define MOE_SIMT
#endif

#if defined(MOE_SIMT)
#include "../simt/cuda_names.h"
#elif defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#define INFINITY __int_as_float(0x7f800000)
#else
#include <cuda_runtime.h>

#include <cstdint>
#endif

#if defined(MOE_SIMT)
#define MOE_DEVICE inline __attribute__((always_inline))
#ifdef MOE_NVRTC
#define MOE_KERNEL inline void
#else
#define MOE_KERNEL __attribute__((noinline)) void
#endif
/// Declares `type* name`, this block's dynamic shared memory, aligned to 128 bytes and no more.
#define MOE_SHARED(type, name) type* const name = static_cast<type*>(::moe::simt::shared_memory(sizeof(type)))
#define MOE_ARCH 900
#define MOE_SM90A 1
#define MOE_GRID_CONSTANT
#else
#define MOE_DEVICE __device__ __forceinline__
#define MOE_KERNEL __global__ void
#define MOE_SHARED(type, name)                                        \
  extern __shared__ __align__(128) unsigned char moe_shared_memory[]; \
  type* const name = reinterpret_cast<type*>(moe_shared_memory)
#ifdef __CUDA_ARCH__
#define MOE_ARCH __CUDA_ARCH__
#else
#define MOE_ARCH 0
#endif
/// sm_90a alone: wgmma and setmaxnreg. Later architectures have neither.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MOE_SM90A 1
#else
#define MOE_SM90A 0
#endif
/// Before a parameter that a kernel takes the address of, such as a tensor map.
#define MOE_GRID_CONSTANT __grid_constant__
#endif

namespace moe::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

}  // namespace moe::cuda

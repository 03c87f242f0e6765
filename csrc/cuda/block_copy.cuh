// SPDX-License-Identifier: Apache-2.0
// A block moves a stretch of elements between global and shared memory, 16 bytes a request wherever it may. The stretch
// keeps its place within 16 bytes: shared memory begins with as many unused bytes as the global address is past one.
#pragma once
#include "ptx.cuh"

namespace moe::cuda {

constexpr int kCopyBytes = 16;

MOE_DEVICE int misalignment(const void* p) { return int(reinterpret_cast<uintptr_t>(p) % kCopyBytes); }

/// Starts the copy of count elements and returns where they will lie; `space` is aligned to 16 bytes, with 16 to spare.
/// They have landed after land() and a barrier.
template <class T> MOE_DEVICE T* copy_in(const T* global, int count, void* space) {
  T* shared = reinterpret_cast<T*>(static_cast<unsigned char*>(space) + misalignment(global));
  constexpr int width = kCopyBytes / int(sizeof(T));
  const int head = min(count, (kCopyBytes - misalignment(global)) % kCopyBytes / int(sizeof(T)));
  const int vectors = (count - head) / width, tail = head + vectors * width;
  for (int i = threadIdx.x; i < head; i += blockDim.x) shared[i] = global[i];
  for (int i = threadIdx.x; i < vectors; i += blockDim.x)
    cp_async_cg_16(cvta_to_shared(shared + head + i * width), global + head + i * width);
  for (int i = tail + threadIdx.x; i < count; i += blockDim.x) shared[i] = global[i];
  return shared;
}
MOE_DEVICE void land() { cp_async_wait_all(); }

/// `shared` may lie anywhere; 16 bytes a request where it stands as `global` does.
template <class T> MOE_DEVICE void copy_out(T* global, const T* shared, int count) {
  constexpr int width = kCopyBytes / int(sizeof(T));
  const int head = misalignment(global) == misalignment(shared)
                       ? min(count, (kCopyBytes - misalignment(global)) % kCopyBytes / int(sizeof(T)))
                       : count;
  const int vectors = (count - head) / width, tail = head + vectors * width;
  for (int i = threadIdx.x; i < head; i += blockDim.x) global[i] = shared[i];
  for (int i = threadIdx.x; i < vectors; i += blockDim.x)
    __stcg(reinterpret_cast<uint4*>(global + head + i * width),
           ld_shared_v4(cvta_to_shared(shared + head + i * width)));
  for (int i = tail + threadIdx.x; i < count; i += blockDim.x) global[i] = shared[i];
}

}  // namespace moe::cuda

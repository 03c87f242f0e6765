// SPDX-License-Identifier: Apache-2.0
// One warp, one access pattern: audit SPACE STRIDE WIDTH OFFSET prints the address audit of 32 lanes that each read
// WIDTH bytes, STRIDE bytes apart, OFFSET bytes past an aligned base. audit rounds STRIDE 4 COUNT: twice a loop over
// COUNT numbers, the last round of which has fewer lanes.
#include <cstdlib>

#include "../../csrc/cuda/ptx.cuh"
#include "harness.h"

namespace moe::cuda {

template <class T> MOE_KERNEL read_global(const uint8_t* base, int stride, T* out) {
  out[threadIdx.x] = __ldg(reinterpret_cast<const T*>(base + int(threadIdx.x) * stride));
}

template <class T> MOE_KERNEL read_shared(int bytes, int offset, int stride, T* out) {
  MOE_SHARED(uint8_t, shared);
  for (int i = int(threadIdx.x); i < bytes; i += kWarp) shared[i] = 0;
  __syncthreads();
  if constexpr (sizeof(T) == 16) {
    out[threadIdx.x] = ld_shared_v4(cvta_to_shared(shared + offset + int(threadIdx.x) * stride));
  } else {
    out[threadIdx.x] = *reinterpret_cast<const T*>(shared + offset + int(threadIdx.x) * stride);
  }
}

MOE_KERNEL read_rounds(int count, int stride, uint32_t* out) {
  MOE_SHARED(uint32_t, shared);
  for (int i = int(threadIdx.x); i < count * stride; i += kWarp) shared[i] = 1;
  __syncthreads();
  uint32_t sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    for (int i = int(threadIdx.x); i < count; i += kWarp) sum += shared[i * stride];
    __syncwarp();
  }
  out[threadIdx.x] = sum;
}

std::string audited_rounds(int stride, int count) {
  test::Device<uint32_t> out(32);
  moe_simt_audit_start();
  const cudaError_t error = launch({dim3(1), dim3(32), uint32_t(count * stride * 4)}, nullptr, read_rounds, count,
                                   stride, static_cast<uint32_t*>(out));
  const std::string json = moe_simt_audit_stop();
  return error == cudaSuccess ? json : cudaGetErrorString(error);
}

template <class T> std::string audited(bool shared, int stride, int offset) {
  const int bytes = offset + 31 * stride + int(sizeof(T));
  test::Device<uint8_t> in(std::vector<uint8_t>(size_t(bytes), 0));
  test::Device<T> out(32);
  moe_simt_audit_start();
  const cudaError_t error =
      shared ? launch({dim3(1), dim3(32), uint32_t(bytes)}, nullptr, read_shared<T>, bytes, offset, stride,
                      static_cast<T*>(out))
             : launch({dim3(1), dim3(32)}, nullptr, read_global<T>,
                      static_cast<const uint8_t*>(static_cast<uint8_t*>(in)) + offset, stride, static_cast<T*>(out));
  const std::string json = moe_simt_audit_stop();
  return error == cudaSuccess ? json : cudaGetErrorString(error);
}

}  // namespace moe::cuda

int main(int count, char** words) {
  if (count != 5) return 2;
  const bool shared = std::string(words[1]) == "shared";
  const int stride = std::atoi(words[2]), width = std::atoi(words[3]), offset = std::atoi(words[4]);
  if (std::string(words[1]) == "rounds") {
    std::printf("%s\n", moe::cuda::audited_rounds(stride, offset).c_str());
    return 0;
  }
  const std::string json = width == 16  ? moe::cuda::audited<uint4>(shared, stride, offset)
                           : width == 8 ? moe::cuda::audited<double>(shared, stride, offset)
                                        : moe::cuda::audited<uint32_t>(shared, stride, offset);
  std::printf("%s\n", json.c_str());
  return 0;
}

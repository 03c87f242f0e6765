// SPDX-License-Identifier: Apache-2.0
// The runtime calls of a launcher by the CUDA driver alone, for a build without nvcc: no toolkit header, nothing
// linked. A kernel is known by name until its first launch on a device. Then Python compiles it (moe_kernels/nvrtc.py),
// and the driver, already loaded by torch, gives its function. Host code only.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "../simt/simt.h"
#include "runtime_types.h"
#include "tensor_map_types.h"

/// The driver's words, or after cudaErrorUnknown those of the compiler that failed on this thread.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);

namespace moe::nvrtc {

constexpr int kDevices = 64;

/// A kernel that some launcher of this library names, and its function on each device that has asked for it.
struct Kernel {
  explicit Kernel(const char* signature);
  const char* signature;  // "... [with auto kernel = NAME]"
  std::atomic<void*> functions[kDevices] = {};
  const Kernel* next;  // of all that there are
};

struct LaunchConfig {
  dim3 grid, block;
  uint32_t shared_bytes;
  bool cooperative, programmatic;
  uint32_t cluster;  // blocks along x
};
cudaError_t launch(Kernel& kernel, const LaunchConfig& config, cudaStream_t stream, void** arguments);

/// Makes torch's context of the device current on a thread that has none yet: the driver, unlike the runtime, does not.
cudaError_t use_device(int device);

/// Writes the image (cubin) of a kernel and its name in it, both alive until the process ends; or returns nonzero and
/// writes what went wrong to `lowered_name`. Called on any thread, at most once a kernel and device unless threads
/// race.
using Compile = int (*)(const char* kernel, int major, int minor, const void** image, const char** lowered_name);

}  // namespace moe::nvrtc

extern "C" {
__attribute__((visibility("default"))) void moe_nvrtc_install(moe::nvrtc::Compile compile);
/// The names of all kernels that a launch may ask for, a line each.
__attribute__((visibility("default"))) const char* moe_nvrtc_kernels();
}

// SPDX-License-Identifier: Apache-2.0
// The emulator's face to launchers and tests: stand-ins for the few runtime calls a launcher makes, the launch itself,
// and the registry of device memory that the bounds check reads. One launch runs at a time, under a mutex.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../nvrtc/runtime_types.h"
#include "../nvrtc/tensor_map_types.h"
#include "simt.h"

/// After a failed launch the text of its report.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
/// Registered memory between guard bytes, marked as never written.
cudaError_t cudaMalloc(void** p, size_t bytes);
template <class T> cudaError_t cudaMalloc(T** p, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(p), bytes);
}
cudaError_t cudaFree(void* p);
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaDeviceSynchronize();

namespace moe::simt {

struct LaunchConfig {
  dim3 grid, block;
  uint32_t shared_bytes;
  bool cooperative, programmatic;
  uint32_t cluster;    // blocks along x
  const void* kernel;  // names it in reports
};
/// Runs `body(arguments)` once a thread of the grid. `arguments` is where the launch keeps the kernel's parameters.
cudaError_t launch(const LaunchConfig& config, void (*body)(const void* arguments), const void* arguments,
                   size_t arguments_bytes);

/// MOE_KERNELS_SIMT_ROW, or -1: the row of kTileRows that a test wants wherever it does not refuse the product, since
/// the shapes of a test are too small for the choice to name every row.
int wished_row();

/// Makes [p, p + bytes) device memory under `name`; kernels may touch nothing else once anything is registered.
/// `written` says whether it holds values that may be read. Nested and repeated registration is allowed.
void register_buffer(const void* p, size_t bytes, const char* name, bool written);
void unregister_buffer(const void* p);

/// Registers for the life of a scope, as a binding does with every tensor of a call.
class Registered {
 public:
  Registered(const void* p, size_t bytes, const char* name, bool written = true) : p_(p) {
    register_buffer(p, bytes, name, written);
  }
  ~Registered() { unregister_buffer(p_); }
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;

 private:
  const void* p_;
};

}  // namespace moe::simt

#define MOE_SIMT_EXPORT __attribute__((visibility("default")))
extern "C" {
/// The last fault as text, empty if there was none. It names what, where (source line, block, thread) and the seed.
MOE_SIMT_EXPORT const char* moe_simt_report();
/// Address audit: switches it on or off and forgets what was counted; then the counts as JSON, one record a site.
MOE_SIMT_EXPORT void moe_simt_audit_start();
MOE_SIMT_EXPORT const char* moe_simt_audit_stop();
}

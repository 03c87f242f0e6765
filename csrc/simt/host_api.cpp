// SPDX-License-Identifier: Apache-2.0
// The stand-ins for the runtime calls of a launcher, and the environment.
#include "host_api.h"

#include <cstdlib>
#include <cstring>
#include <map>

#include "machine.h"

namespace moe::simt {
namespace {

constexpr uint64_t kDefaultSeed = 4;  // random schedule, copies land late
constexpr int kMultiprocessors = 4;

/// 10 * major + minor of the GPU that the emulator stands for. Whatever it is, every instruction is emulated; launchers
/// choose by it.
int arch() {
  const char* const text = std::getenv("MOE_KERNELS_SIMT_ARCH");
  return text != nullptr && *text != 0 ? std::atoi(text) : 80;
}
int shared_bytes() { return arch() / 10 == 9 || arch() / 10 == 10 ? 232448 : arch() == 80 ? 166912 : 101376; }

// Between guard bytes that belong to nobody, so that an overrun is out of bounds and not in a neighbour.
std::map<void*, void*> allocations;  // user pointer -> malloc's

}  // namespace

Options options_from_environment() {
  const char* const text = std::getenv("MOE_KERNELS_SIMT_SEED");
  Options options;
  options.seed = text != nullptr && *text != 0 ? std::strtoull(text, nullptr, 0) : kDefaultSeed;
  options.schedule = Schedule(options.seed % 3);
  options.landing = Landing(options.seed / 3 % 3);
  return options;
}

int wished_row() {
  const char* const text = std::getenv("MOE_KERNELS_SIMT_ROW");
  return text != nullptr && *text != 0 ? std::atoi(text) : -1;
}

}  // namespace moe::simt

using namespace moe::simt;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    default: return machine.report.c_str();
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = arch() / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = arch() % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_bytes(); return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  void* const raw = std::malloc(bytes + 2 * kGuardBytes);
  if (raw == nullptr) return cudaErrorMemoryAllocation;
  const auto begin = (reinterpret_cast<uintptr_t>(raw) + kGuardBytes) / 256 * 256;
  *p = reinterpret_cast<void*>(begin);
  std::memset(*p, 0xff, bytes);
  allocations[*p] = raw;
  const std::string name = "cudaMalloc " + std::to_string(allocations.size());
  register_buffer(*p, bytes, name.c_str(), false);
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  const auto found = allocations.find(p);
  if (found == allocations.end()) return cudaErrorInvalidValue;
  std::free(found->second);
  allocations.erase(found);
  unregister_buffer(p);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  mark_written(p, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  mark_written(to, bytes);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

extern "C" const char* moe_simt_report() { return machine.report.c_str(); }

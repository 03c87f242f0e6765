// SPDX-License-Identifier: Apache-2.0
// See driver.h. Types and numbers below are the driver's ABI, as in cuda.h since CUDA 12.
#include "driver.h"

#include <dlfcn.h>

#include <string>

namespace moe::nvrtc {
namespace {

using Result = int;  // CUresult; those of the runtime that a caller tells apart have the same numbers
constexpr int kMaxDynamicSharedBytes = 8;                                                     // CUfunction_attribute
constexpr int kCooperative = 2, kClusterDimension = 4, kProgrammaticStreamSerialization = 6;  // CUlaunchAttributeID

struct alignas(8) LaunchAttribute {  // CUlaunchAttribute
  int id;
  char pad[4];
  union {
    char bytes[64];
    int value;
    unsigned cluster[3];
  };
};
struct LaunchParameters {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchParameters) == 56, "the driver's layout");

/// The driver's functions, from the library that torch has loaded or, failing that, the system's.
struct Driver {
  Result (*cuInit)(unsigned);
  Result (*cuGetErrorString)(Result, const char**);
  Result (*cuCtxGetCurrent)(void**);
  Result (*cuCtxSetCurrent)(void*);
  Result (*cuCtxGetDevice)(int*);
  Result (*cuDeviceGet)(int*, int);
  Result (*cuDeviceGetAttribute)(int*, int, int);
  Result (*cuDevicePrimaryCtxRetain)(void**, int);
  Result (*cuMemsetD8Async)(void*, unsigned char, size_t, void*);
  Result (*cuModuleLoadData)(void**, const void*);
  Result (*cuModuleGetFunction)(void**, void*, const char*);
  Result (*cuFuncSetAttribute)(void*, int, int);
  Result (*cuLaunchKernelEx)(const LaunchParameters*, void*, void**, void**);
  Result (*cuDriverGetVersion)(int*);
  decltype(&cuTensorMapEncodeTiled) encode;  // of sm_90: null in an old driver
  std::string missing;                       // empty: all there

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      missing = "the CUDA driver is not here: libcuda.so.1 could not be loaded";
      return;
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      if (!function && missing.empty()) missing = std::string("the CUDA driver is too old: it has no ") + name;
    };
    find(cuInit, "cuInit"), find(cuGetErrorString, "cuGetErrorString"), find(cuCtxGetCurrent, "cuCtxGetCurrent");
    find(cuCtxSetCurrent, "cuCtxSetCurrent"), find(cuCtxGetDevice, "cuCtxGetDevice"), find(cuDeviceGet, "cuDeviceGet");
    find(cuDeviceGetAttribute, "cuDeviceGetAttribute"), find(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(cuMemsetD8Async, "cuMemsetD8Async"), find(cuModuleLoadData, "cuModuleLoadData");
    find(cuModuleGetFunction, "cuModuleGetFunction"), find(cuFuncSetAttribute, "cuFuncSetAttribute");
    find(cuLaunchKernelEx, "cuLaunchKernelEx"), find(cuDriverGetVersion, "cuDriverGetVersion");
    encode = reinterpret_cast<decltype(encode)>(dlsym(library, "cuTensorMapEncodeTiled"));
    if (missing.empty()) cuInit(0);
  }
};

const Driver& driver() {
  static const Driver table;
  return table;
}

thread_local std::string words;  // of the failure that cudaErrorUnknown stands for
cudaError_t failed(std::string why) {
  words = std::move(why);
  return cudaErrorUnknown;
}

Compile compile = nullptr;

Kernel*& last_kernel() {
  static Kernel* last = nullptr;
  return last;
}

/// NAME of "... kernel = NAME]", as g++ and clang++ write it.
std::string name_of(const Kernel& kernel) {
  std::string text = kernel.signature;
  text = text.substr(text.rfind("kernel = ") + 9);
  text.pop_back();
  return text.substr(text.find_first_not_of("(& "));
}

cudaError_t compile_for(const Kernel& kernel, int device, void** function) {
  const std::string name = name_of(kernel);
  if (!compile) return failed(name + ": nobody has installed a compiler");
  int major = 0, minor = 0;
  Result error = driver().cuDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = driver().cuDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error) return cudaError_t(error);
  const void* image = nullptr;
  const char* lowered = nullptr;
  if (compile(name.c_str(), major, minor, &image, &lowered)) return failed(lowered ? lowered : name + ": not compiled");
  void* module = nullptr;  // never unloaded: the function is used until the process ends
  error = driver().cuModuleLoadData(&module, image);
  if (!error) error = driver().cuModuleGetFunction(function, module, lowered);
  return cudaError_t(error);
}

}  // namespace

Kernel::Kernel(const char* signature) : signature(signature), next(last_kernel()) { last_kernel() = this; }

cudaError_t use_device(int device) {
  if (!driver().missing.empty()) return failed(driver().missing);
  void* context = nullptr;
  Result error = driver().cuCtxGetCurrent(&context);
  if (error || context) return cudaError_t(error);
  if (device < 0 || device >= kDevices) return cudaErrorInvalidValue;
  static std::atomic<void*> contexts[kDevices] = {};
  context = contexts[device].load();
  if (!context) {
    int handle = 0;
    error = driver().cuDeviceGet(&handle, device);
    if (!error) error = driver().cuDevicePrimaryCtxRetain(&context, handle);  // torch's own; kept until the end
    if (error) return cudaError_t(error);
    contexts[device].store(context);
  }
  return cudaError_t(driver().cuCtxSetCurrent(context));
}

cudaError_t launch(Kernel& kernel, const LaunchConfig& config, cudaStream_t stream, void** arguments) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device < 0 || device >= kDevices) return cudaErrorInvalidValue;
  void* function = kernel.functions[device].load(std::memory_order_acquire);
  if (!function) {  // no lock: the compiler takes Python's, and two threads that race get equal functions
    error = compile_for(kernel, device, &function);
    if (error != cudaSuccess) return error;
    kernel.functions[device].store(function, std::memory_order_release);
  }
  if (config.shared_bytes > 48 * 1024) {
    const Result result = driver().cuFuncSetAttribute(function, kMaxDynamicSharedBytes, int(config.shared_bytes));
    if (result) return cudaError_t(result);
  }
  LaunchAttribute attributes[3] = {};
  const dim3 &grid = config.grid, &block = config.block;
  LaunchParameters parameters{
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config.shared_bytes, stream, attributes, 0};
  const auto ask = [&](int id) {
    attributes[parameters.attribute_count].id = id;
    attributes[parameters.attribute_count++].value = 1;
  };
  if (config.cooperative) ask(kCooperative);
  if (config.programmatic) ask(kProgrammaticStreamSerialization);
  if (config.cluster > 1) {
    LaunchAttribute& cluster = attributes[parameters.attribute_count++];
    cluster.id = kClusterDimension, cluster.cluster[0] = config.cluster, cluster.cluster[1] = cluster.cluster[2] = 1;
  }
  return cudaError_t(driver().cuLaunchKernelEx(&parameters, function, arguments, nullptr));
}

}  // namespace moe::nvrtc

using moe::nvrtc::driver;
using moe::nvrtc::failed;

const char* cudaGetErrorString(cudaError_t error) {
  const char* text = nullptr;
  if (error == cudaErrorUnknown && !moe::nvrtc::words.empty()) return moe::nvrtc::words.c_str();
  if (!driver().missing.empty()) return driver().missing.c_str();
  return driver().cuGetErrorString(error, &text) == 0 && text ? text : "an error that the driver does not know";
}

cudaError_t cudaDriverGetVersion(int* version) {
  if (!driver().missing.empty()) return failed(driver().missing);
  return cudaError_t(driver().cuDriverGetVersion(version));
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* size, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  if (!driver().missing.empty() || !driver().encode) return CUDA_ERROR_INVALID_VALUE;
  return driver().encode(map, type, rank, base, size, strides, box, step, interleave, swizzle, promotion, fill);
}

cudaError_t cudaGetDevice(int* device) {
  if (!driver().missing.empty()) return failed(driver().missing);
  return cudaError_t(driver().cuCtxGetDevice(device));
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!driver().missing.empty()) return failed(driver().missing);
  return cudaError_t(driver().cuDeviceGetAttribute(value, attribute, device));
}

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  if (!driver().missing.empty()) return failed(driver().missing);
  if (bytes == 0) return cudaSuccess;
  return cudaError_t(driver().cuMemsetD8Async(p, static_cast<unsigned char>(value), bytes, stream));
}

void moe_nvrtc_install(moe::nvrtc::Compile compile) { moe::nvrtc::compile = compile; }

const char* moe_nvrtc_kernels() {
  static const std::string names = [] {
    std::string all;
    for (const moe::nvrtc::Kernel* k = moe::nvrtc::last_kernel(); k; k = k->next) all += moe::nvrtc::name_of(*k) + "\n";
    return all;
  }();
  return names.c_str();
}

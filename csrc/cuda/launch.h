// SPDX-License-Identifier: Apache-2.0
// The one way to start a kernel: on a GPU, or on the emulator. Host code only; the arguments are converted to the
// kernel's parameter types and copied, as a launch does.
#pragma once

#include "device.h"
#include "runtime.h"
#ifdef MOE_NVRTC
#include <type_traits>
#endif

namespace moe::cuda {

constexpr int64_t kMostBlocks = 132 * 8;  // eight on each processor of an H100; each goes round and round

struct LaunchShape {
  dim3 grid, block;
  uint32_t shared_bytes = 0;
  bool cooperative = false;   // all blocks run at the same time: blocks may wait for each other
  bool programmatic = false;  // may start before its predecessor in the stream ends: see griddepcontrol_wait
  unsigned cluster = 1;       // blocks along x that share their memory (sm_90); the grid is a multiple of it
};

#ifdef MOE_NVRTC
/// The name of `kernel` as a compiler of the kernels resolves it: `kernel = NAME]` ends this function's own.
template <auto kernel> constexpr const char* signature_of() { return __PRETTY_FUNCTION__; }
template <auto kernel> inline nvrtc::Kernel compiled_later{signature_of<kernel>()};

template <auto kernel, class... P, class... A>
cudaError_t launch_later(const LaunchShape& shape, cudaStream_t stream, void (*)(P...), A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument a kernel parameter");
  if (uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z == 0) return cudaSuccess;
  const nvrtc::LaunchConfig config{shape.grid,        shape.block,        shape.shared_bytes,
                                   shape.cooperative, shape.programmatic, shape.cluster};
  const auto start = [&](std::remove_const_t<P>... values) {
    void* pointers[] = {&values..., nullptr};
    return nvrtc::launch(compiled_later<kernel>, config, stream, pointers);
  };
  return start(P(args)...);
}
#else
/// Starts `kernel`; an empty grid starts nothing. Returns what the launch said, never waits.
template <class... P, class... A>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, void (*kernel)(P...), A... args) {
  static_assert(sizeof...(P) == sizeof...(A), "one argument a kernel parameter");
  if (uint64_t(shape.grid.x) * shape.grid.y * shape.grid.z == 0) return cudaSuccess;
#ifdef MOE_SIMT
  (void)stream;
  auto call = [=] { kernel(P(args)...); };
  return simt::launch(
      {shape.grid, shape.block, shape.shared_bytes, shape.cooperative, shape.programmatic, shape.cluster,
       reinterpret_cast<const void*>(kernel)},
      [](const void* body) { (*static_cast<const decltype(call)*>(body))(); }, &call, sizeof call);
#else
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.programmatic) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {shape.cluster, 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, P(args)...);
#endif
}
#endif

/// Starts `kernel`, known when the launcher is compiled, as every kernel of this library is: so that it can be compiled
/// at its first use where no nvcc was. Returns what the launch said, never waits.
template <auto kernel, class... A> cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, A... args) {
#ifdef MOE_NVRTC
  return launch_later<kernel>(shape, stream, decltype(kernel)(nullptr), args...);
#else
  return launch(shape, stream, kernel, args...);
#endif
}

}  // namespace moe::cuda

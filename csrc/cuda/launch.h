// SPDX-License-Identifier: Apache-2.0
// The one way to start a kernel: on a GPU, or on the emulator. Host code only; the arguments are converted to the
// kernel's parameter types and copied, as a launch does.
#pragma once

#include "device.h"
#ifdef MOE_SIMT
#include "../simt/host_api.h"
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

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// Launcher of grouped_fma.
#include "grouped_fma.cuh"

#include <type_traits>

#include "launch.h"

namespace moe::cuda {
namespace {

template <class T, int kHalves> cudaError_t start(const GroupedRows& g, cudaStream_t stream) {
  const int64_t parts = (g.N / kHalves + kFmaColumns - 1) / kFmaColumns;
  const dim3 grid(unsigned(g.S / kFmaRows + g.E), unsigned(parts < 65535 ? parts : 65535));
  return launch<grouped_fma_kernel<T, kHalves>>(
      {grid, dim3(kFmaThreads), uint32_t(sizeof(FmaShared<acc_t<T>, kHalves>))}, stream, g);
}

}  // namespace

cudaError_t grouped_fma(const GroupedRows& g, cudaStream_t stream) {
  if (g.S == 0 || g.N == 0) return cudaSuccess;
  cudaError_t result = cudaSuccess;
  visit_dtype(g.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool halves = g.epilogue.kind == Epilogue::activation && g.epilogue.gated;
    result = halves ? start<T, 2>(g, stream) : start<T, 1>(g, stream);
  });
  return result;
}

}  // namespace moe::cuda

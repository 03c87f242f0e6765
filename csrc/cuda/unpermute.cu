// SPDX-License-Identifier: Apache-2.0
// Launchers of unpermute and its backward.
#include "unpermute.cuh"

#include <initializer_list>
#include <type_traits>

#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

constexpr int64_t kWarps = 8;

unsigned ceil_div(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

/// True where every row may be moved 16 bytes at a time.
bool aligned(int64_t bytes, std::initializer_list<const void*> pointers, std::initializer_list<int64_t> lengths) {
  uintptr_t all = 0;
  for (const void* p : pointers) all |= reinterpret_cast<uintptr_t>(p);
  for (int64_t length : lengths) all |= uintptr_t(length * bytes);
  return all % 16 == 0;
}

/// Calls f(type tag, elements of one access).
template <class F> cudaError_t visit_width(DType dtype, bool wide, F&& f) {
  cudaError_t result = cudaSuccess;
  visit_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    result = wide ? f(tag, std::integral_constant<int, kVector<T>>{}) : f(tag, std::integral_constant<int, 1>{});
  });
  return result;
}

}  // namespace

cudaError_t unpermute(const UnpermuteArgs& args, cudaStream_t stream) {
  const bool wide = aligned(dtype_bytes(args.dtype), {args.rows, args.y}, {args.rows_stride, args.H});
  return visit_width(args.dtype, wide, [&](auto tag, auto width) {
    constexpr int N = decltype(width)::value;
    const int64_t parts = ceil_div(args.H, kWarp * N);
    const dim3 grid(ceil_div(args.T, kWarps), unsigned(parts < 65535 ? parts : 65535));
    return launch<unpermute_kernel<decltype(tag), N>>({grid, dim3(kWarps * kWarp)}, stream, args);
  });
}

int64_t unpermute_backward_workspace_bytes(int64_t P) { return 2 * P * 4; }

cudaError_t unpermute_backward(const UnpermuteBackwardArgs& args, cudaStream_t stream) {
  auto* owners = static_cast<int32_t*>(args.workspace);
  const bool wide = aligned(dtype_bytes(args.dtype), {args.rows, args.grad_y, args.grad_rows},
                            {args.rows_stride, args.grad_y_stride, args.H});
  cudaError_t error = launch<unpermute_clear_kernel>({dim3(ceil_div(args.P, 256)), dim3(256)}, stream, args.P, owners);
  if (error != cudaSuccess) return error;
  return visit_width(args.dtype, wide, [&](auto tag, auto width) {
    using T = decltype(tag);
    constexpr int N = decltype(width)::value;
    error = launch<unpermute_owners_kernel<acc_t<T>>>({dim3(ceil_div(args.T * args.K, 256)), dim3(256)}, stream, args,
                                                      owners);
    if (error != cudaSuccess) return error;
    return launch<unpermute_backward_kernel<T, N>>({dim3(ceil_div(args.P, kWarps)), dim3(kWarps * kWarp)}, stream, args,
                                                   static_cast<const int32_t*>(owners));
  });
}

}  // namespace moe::cuda

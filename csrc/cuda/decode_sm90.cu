// SPDX-License-Identifier: Apache-2.0
// Launchers of decode by wgmma.
#include "decode_sm90.cuh"

#include <algorithm>

#include "grouped_gemm_sm90.h"
#include "launch.h"

namespace moe::cuda {
namespace {

unsigned ceil_div(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }

/// A weight of `width` rows, or of twice as many of which the second half is `up`: coordinates k, row, half, expert.
BoxedTensor boxed(const ExpertMlp& p, const Weight& w, int64_t k, int64_t width, int halves) {
  const int64_t row = w.row_stride * 2;
  return {w.data,
          p.dtype,
          4,
          {k, width, halves, p.E},
          {0, row, width * row, w.expert_stride * 2},
          {kSliceElements, kDecodeBoxRows, 1, 1},
          kSliceBytes};
}
BoxedTensor boxed_w13(const ExpertMlp& p) {
  const bool halves = p.gated && !p.interleaved;
  return boxed(p, p.w13, p.H, p.gated && p.interleaved ? 2 * p.I : p.I, halves ? 2 : 1);
}
BoxedTensor boxed_w2(const ExpertMlp& p) { return boxed(p, p.w2, p.I, p.H, 1); }

template <class T, int N> cudaError_t start(const DecodeArgs& args, const RowsEpilogue& epilogue, cudaStream_t stream) {
  using D = DecodeWgmma<N>;
  const ExpertMlp& p = args.mlp;
  const int64_t S = p.T * p.K, most = std::min(p.E, S);
  TensorMap w13, w2;
  cudaError_t error = encode_tensor_map(boxed_w13(p), &w13);
  if (error == cudaSuccess) error = encode_tensor_map(boxed_w2(p), &w2);
  if (error != cudaSuccess) return error;
  LaunchShape shape{dim3(ceil_div(p.I, p.gated ? 32 : 64), unsigned(most)), dim3(D::kThreads),
                    D::kRingBytes + N * D::kPitch * 4};
  shape.programmatic = true;
  error = launch<decode_w13_sm90_kernel<T, N>>(shape, stream, w13, p, epilogue);
  if (error != cudaSuccess) return error;
  DecodeClusterLayout layout{};
  layout.count = uint32_t((most * int64_t(sizeof(ActiveExpert)) + 15) / 16 * 16), layout.sums = layout.count + 16;
  layout.bytes = layout.sums + uint32_t(S * kDecodeColumns * 4);
  shape.grid = dim3(ceil_div(p.H, 64) * kDecodeCluster), shape.cluster = kDecodeCluster;
  shape.shared_bytes = D::kRingBytes + 2 * kDecodeTokens * D::kPitch * 4 + layout.bytes;
  return launch<decode_w2_sm90_kernel<T, N>>(shape, stream, w2, p, layout, static_cast<const T*>(args.act),
                                             static_cast<T*>(args.y));
}

template <class T>
cudaError_t start_tile(const DecodeArgs& args, const RowsEpilogue& epilogue, cudaStream_t stream) {
  return args.mlp.T <= 8 ? start<T, 8>(args, epilogue, stream) : start<T, 32>(args, epilogue, stream);
}

}  // namespace

bool decode_uses_wgmma(const ExpertMlp& p) {
  if (std::max(p.H, p.I) >= int64_t(1) << 29 || !has_wgmma()) return false;
  return tensor_map_refusal(boxed_w13(p)) == nullptr && tensor_map_refusal(boxed_w2(p)) == nullptr;
}

cudaError_t decode_sm90(const DecodeArgs& args, const RowsEpilogue& epilogue, cudaStream_t stream) {
  return args.mlp.dtype == DType::bf16 ? start_tile<bf16>(args, epilogue, stream)
                                       : start_tile<f16>(args, epilogue, stream);
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// Launchers of decode.
#include "decode.cuh"

#include <algorithm>

#include "launch.h"

namespace moe::cuda {
namespace {

unsigned ceil_div(int64_t a, int64_t b) { return unsigned((a + b - 1) / b); }
int64_t slots_of(const ExpertMlp& p) { return p.T * p.K; }

RowsEpilogue epilogue_of(const DecodeArgs& args) {
  const ExpertMlp& p = args.mlp;
  RowsEpilogue e{};
  e.kind = Epilogue::activation, e.row_to_slot = p.row_to_slot, e.topk_weights = p.topk_weights, e.bias = p.w13_bias;
  e.activation = p.activation, e.gated = p.gated, e.interleaved = p.interleaved;
  e.weight_on_input = p.weight_on_input, e.limit = p.limit, e.alpha = p.alpha;
  e.hidden_mask = p.hidden_mask, e.act = args.act;
  return e;
}

/// Of a block that owns `columns` of y.
DecodeW2Layout w2_layout(const ExpertMlp& p, int64_t columns, int64_t acc_bytes, int64_t part_bytes) {
  const auto up = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  DecodeW2Layout layout{};
  layout.count = uint32_t(up(std::min(p.E, slots_of(p)) * int64_t(sizeof(ActiveExpert))));
  layout.sums = layout.count + 16;
  layout.parts = layout.sums + uint32_t(up(slots_of(p) * columns * acc_bytes));
  layout.bytes = layout.parts + uint32_t(part_bytes);
  return layout;
}

/// N: groups of eight rows that one pass over an expert's weights multiplies.
template <class T, int N> cudaError_t with_mma(const DecodeArgs& args, cudaStream_t stream) {
  const ExpertMlp& p = args.mlp;
  const int units = p.gated ? kDecodeRows : 2 * kDecodeRows;
  LaunchShape shape{dim3(ceil_div(p.I, units), unsigned(std::min(p.E, slots_of(p)))), dim3(kDecodeWarps * kWarp)};
  shape.shared_bytes = N * 8 * DecodeParts<2>::kPitch * 4, shape.programmatic = true;
  const cudaError_t error = launch<decode_w13_kernel<T, N>>(shape, stream, p, epilogue_of(args));
  if (error != cudaSuccess) return error;
  const DecodeW2Layout layout = w2_layout(p, kDecodeRows, 4, kDecodeTokens * DecodeParts<1>::kPitch * 4);
  shape.grid = dim3(ceil_div(p.H, kDecodeRows)), shape.shared_bytes = layout.bytes;
  return launch<decode_w2_kernel<T, N>>(shape, stream, p, layout, static_cast<const T*>(args.act),
                                        static_cast<T*>(args.y));
}

template <class T> cudaError_t plain(const DecodeArgs& args, cudaStream_t stream) {
  const ExpertMlp& p = args.mlp;
  LaunchShape shape{dim3(ceil_div(p.I, kDecodeWarps), unsigned(std::min(p.E, slots_of(p)))),
                    dim3(kDecodeWarps * kWarp)};
  shape.programmatic = true;
  const cudaError_t error = launch<decode_w13_plain_kernel<T>>(shape, stream, p, epilogue_of(args));
  if (error != cudaSuccess) return error;
  const DecodeW2Layout layout = w2_layout(p, kDecodeWarps, sizeof(acc_t<T>), 0);
  shape.grid = dim3(ceil_div(p.H, kDecodeWarps)), shape.shared_bytes = layout.bytes;
  return launch<decode_w2_plain_kernel<T>>(shape, stream, p, layout, static_cast<const T*>(args.act),
                                           static_cast<T*>(args.y));
}

bool rows_of_16_bytes(const void* data, int64_t lengths) {
  return (reinterpret_cast<uintptr_t>(data) | uintptr_t(lengths * 2)) % 16 == 0;
}

}  // namespace

bool decode_takes(const ExpertMlp& p) {
  return slots_of(p) <= kDecodeSlots && p.dtype == p.weight_dtype && !p.w13.padded && !p.w2.padded;
}

bool decode_uses_mma(const ExpertMlp& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return false;
  return p.w13.col_stride == 1 && p.w2.col_stride == 1 && rows_of_16_bytes(p.x, p.x_stride | p.H) &&
         rows_of_16_bytes(p.w13.data, p.w13.row_stride | p.w13.expert_stride) &&
         rows_of_16_bytes(p.w2.data, p.w2.row_stride | p.w2.expert_stride | p.I);
}

int64_t decode_workspace_bytes(const ExpertMlp& p) { return slots_of(p) * p.I * dtype_bytes(p.dtype); }

cudaError_t decode(const DecodeArgs& args, cudaStream_t stream) {
  const ExpertMlp& p = args.mlp;
  if (!decode_takes(p)) return cudaErrorInvalidValue;
  if (p.T == 0 || p.H == 0) return cudaSuccess;
  if (slots_of(p) == 0 || p.I == 0) return cudaMemsetAsync(args.y, 0, size_t(p.T * p.H * dtype_bytes(p.dtype)), stream);
  cudaError_t result = cudaErrorInvalidValue;
  visit_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == 2) {
      if (decode_uses_mma(p) && decode_uses_wgmma(p)) {
        result = decode_sm90(args, epilogue_of(args), stream);
        return;
      }
      if (decode_uses_mma(p)) {
        result = p.T <= 8 ? with_mma<T, 1>(args, stream) : with_mma<T, 8>(args, stream);
        return;
      }
    }
    result = plain<T>(args, stream);
  });
  return result;
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// Launcher of grouped products: which kernel, and the rows that no expert owns.
#include "grouped_gemm.h"

#include "expert_rows.cuh"
#include "grouped_gemm_config.h"
#include "grouped_gemm_sm90.h"
#include "launch.h"

namespace moe::cuda {

cudaError_t grouped_rows_bf16(int row, const GroupedRows&, cudaStream_t);
cudaError_t grouped_rows_f16(int row, const GroupedRows&, cudaStream_t);
cudaError_t grouped_rows_tf32(int row, const GroupedRows&, cudaStream_t);

namespace {

/// The current device as choose_config wants it.
cudaError_t current_processor(Processor& p) {
  int device = 0, major = 0, minor = 0, count = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(major, cudaDevAttrComputeCapabilityMajor), ask(minor, cudaDevAttrComputeCapabilityMinor);
  ask(count, cudaDevAttrMultiProcessorCount), ask(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p = processor_of(10 * major + minor);
  p.count = count, p.shared_bytes = shared;
  if (p.wgmma && !has_wgmma()) p.wgmma = 0;
  return error;
}

bool in_16_bytes(const GroupedRows& g) {
  const int64_t bytes = dtype_bytes(g.dtype);
  const bool along_sum = g.b.col_stride == 1;
  if (!along_sum && g.b.row_stride != 1) return false;
  const bool halves = g.epilogue.kind == Epilogue::activation && g.epilogue.gated && !g.epilogue.interleaved;
  const int64_t b_row = along_sum ? g.K
                        : halves  ? g.N / 2
                                  : g.N,
                b_stride = along_sum ? g.b.row_stride : g.b.col_stride;
  const int64_t all = reinterpret_cast<intptr_t>(g.a) | reinterpret_cast<intptr_t>(g.b.data) | g.K * bytes |
                      g.a_stride * bytes | (g.ends ? 0 : g.a_expert * bytes) | b_row * bytes | b_stride * bytes |
                      g.b.expert_stride * bytes;
  return all % 16 == 0;
}

ProductShape shape_of(const GroupedRows& g) {
  return {g.E, g.S, g.N, g.K, g.dtype, g.allow_tf32, in_16_bytes(g), in_tensor_maps(g)};
}

/// By a row of kTileRows that is wgmma's.
cudaError_t rows_by_wgmma(int row, const GroupedRows& g, cudaStream_t stream) {
  const bool bf16 = g.dtype == DType::bf16;
  if (g.gather) return bf16 ? gathered_rows_sm90_bf16(row, g, stream) : gathered_rows_sm90_f16(row, g, stream);
  return bf16 ? grouped_rows_sm90_bf16(row, g, stream) : grouped_rows_sm90_f16(row, g, stream);
}

template <class V> cudaError_t zero_rows(const int32_t* ends, int64_t E, int64_t S, void* out, int64_t bytes,
                                         cudaStream_t stream) {
  const int64_t blocks = S < 1024 ? S : 1024;
  return launch<zero_rows_kernel<V>>({dim3(unsigned(blocks)), dim3(256)}, stream, ends, E, S, static_cast<V*>(out),
                                     bytes / int64_t(sizeof(V)));
}

}  // namespace

int choose_row(const GroupedRows& g) {
  Processor on;
  if (current_processor(on) != cudaSuccess) return kFma;
  const ProductShape shape = shape_of(g);
#if defined(MOE_SIMT) && !defined(MOE_NVRTC)
  const int wished = simt::wished_row();
  if (wished >= 0 && wished < kTileCount && !refusal(kTileRows[wished], shape, on)) return wished;
#endif
  return choose_config(shape, on);
}

cudaError_t grouped_rows_by(int row, const GroupedRows& g, cudaStream_t stream) {
  if (g.S <= 0 || g.N <= 0 || g.E <= 0) return cudaSuccess;
  Processor on;
  const cudaError_t error = current_processor(on);
  if (error != cudaSuccess) return error;
  if (row < 0 || row >= kTileCount || refusal(kTileRows[row], shape_of(g), on)) return cudaErrorInvalidValue;
  if (row == kFma) return grouped_fma(g, stream);
  if (kTileRows[row].wgmma()) return rows_by_wgmma(row, g, stream);
  if (g.dtype == DType::f32) return grouped_rows_tf32(row, g, stream);
  return g.dtype == DType::bf16 ? grouped_rows_bf16(row, g, stream) : grouped_rows_f16(row, g, stream);
}

cudaError_t grouped_rows(const GroupedRows& g, cudaStream_t stream) {
  return grouped_rows_by(choose_row(g), g, stream);
}

int64_t weight_part_count(const GroupedRows& g) {
  const int row = choose_row(g);
  return ceil_of(g.N, row == kFma ? kFmaColumns : kTileRows[row].warp_columns());
}

cudaError_t zero_rows_from(const int32_t* ends, int64_t E, int64_t S, void* out, int64_t bytes, cudaStream_t stream) {
  if (S <= 0 || bytes <= 0) return cudaSuccess;
  const int64_t all = reinterpret_cast<intptr_t>(out) | bytes;
  if (all % 16 == 0) return zero_rows<uint4>(ends, E, S, out, bytes, stream);
  if (all % 4 == 0) return zero_rows<uint32_t>(ends, E, S, out, bytes, stream);
  return zero_rows<uint16_t>(ends, E, S, out, bytes, stream);
}

}  // namespace moe::cuda

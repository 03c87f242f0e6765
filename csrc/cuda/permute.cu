// SPDX-License-Identifier: Apache-2.0
// Launchers of permute: ids, index maps, rows.
#include "permute.cuh"

#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

dim3 blocks_for(int64_t threads) {
  const int64_t blocks = (threads + 255) / 256;
  return dim3(unsigned(blocks < 1056 ? blocks : 1056));  // eight on each processor of an H100, then round again
}

template <class V> cudaError_t copy_rows(const PermuteArgs& args, cudaStream_t stream) {
  constexpr int64_t warps = 8;
  const int64_t bytes = dtype_bytes(args.dtype), vectors = args.H * bytes / int64_t(sizeof(V));
  const int64_t parts = (vectors + kWarp * kRowVectors - 1) / (kWarp * kRowVectors);
  return launch<permute_rows_kernel<V>>(
      {dim3(unsigned((args.P + warps - 1) / warps), unsigned(parts < 65535 ? parts : 65535)),
       dim3(unsigned(warps * kWarp))},
      stream, args, vectors, args.x_stride * bytes / int64_t(sizeof(V)));
}

}  // namespace

cudaError_t narrow_ids(const NarrowIdsArgs& args, cudaStream_t stream) {
  return launch<narrow_ids_kernel>({blocks_for(args.S), dim3(256)}, stream, args);
}

int64_t permute_index_workspace_bytes(int64_t S, int64_t E) {
  const IndexTile tile = index_tile(S, E);
  return tile.tiles == 1 ? 0 : (tile.tiles + int64_t(1)) * E * 4;
}

cudaError_t permute_index(const PermuteIndexArgs& args, cudaStream_t stream) {
  const IndexTile tile = index_tile(args.S, args.E);
  const LaunchShape shape{dim3(unsigned(tile.tiles)), dim3(unsigned(tile.warps * kWarp)), tile.bytes};
  if (tile.tiles == 1) return launch<permute_index_kernel>(shape, stream, args, tile);
  auto* tile_counts = static_cast<int32_t*>(args.workspace);
  cudaError_t error = launch<permute_count_kernel>(shape, stream, args, tile, tile_counts);
  if (error != cudaSuccess) return error;
  constexpr int scan_warps = 32;
  error = launch<permute_scan_kernel>(
      {dim3(unsigned((args.E + kWarp - 1) / kWarp)), dim3(scan_warps * kWarp), scan_warps * kWarp * 4}, stream,
      int(args.E), int(tile.tiles), tile_counts);
  if (error != cudaSuccess) return error;
  return launch<permute_place_kernel>(shape, stream, args, tile, static_cast<const int32_t*>(tile_counts));
}

cudaError_t permute(const PermuteArgs& args, cudaStream_t stream) {
  if (args.P == 0 || args.H == 0) return cudaSuccess;
  // The widest access that the addresses and the length of a row allow.
  const int64_t bytes = dtype_bytes(args.dtype);
  const uintptr_t all = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.x_rows) |
                        uintptr_t(args.x_stride * bytes) | uintptr_t(args.H * bytes);
  if (all % 16 == 0) return copy_rows<uint4>(args, stream);
  if (all % 8 == 0) return copy_rows<uint2>(args, stream);
  if (all % 4 == 0) return copy_rows<unsigned int>(args, stream);
  return copy_rows<unsigned short>(args, stream);
}

}  // namespace moe::cuda

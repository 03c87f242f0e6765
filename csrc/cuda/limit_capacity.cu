// SPDX-License-Identifier: Apache-2.0
// Launchers of limit_capacity.
#include "limit_capacity.cuh"

#include "launch.h"
#include "launchers.h"

namespace moe::cuda {
namespace {

/// The tiles of a group; one warp where a few slots are all there is.
IndexTile tile_of(const LimitCapacityArgs& args) {
  const int64_t slots = (args.group_size < args.T ? args.group_size : args.T) * args.K;
  IndexTile tile = index_tile(slots, args.E);
  while (tile.warps > 1 && tile.warps / 2 * kWarp >= slots) tile.warps /= 2;
  tile.bytes = uint32_t(tile.warps * args.E * 4);
  return tile;
}
int64_t groups_of(const LimitCapacityArgs& args) { return (args.T + args.group_size - 1) / args.group_size; }

}  // namespace

int64_t limit_capacity_workspace_bytes(const LimitCapacityArgs& args) {
  const IndexTile tile = tile_of(args);
  return tile.tiles == 1 ? 0 : groups_of(args) * (tile.tiles + int64_t(1)) * args.E * 4;
}

cudaError_t limit_capacity(const LimitCapacityArgs& args, cudaStream_t stream) {
  const IndexTile tile = tile_of(args);
  const LaunchShape shape{dim3(unsigned(groups_of(args) * tile.tiles)), dim3(unsigned(tile.warps * kWarp)), tile.bytes};
  if (tile.tiles == 1) return launch<limit_capacity_kernel>(shape, stream, args, tile);
  auto* tile_counts = static_cast<int32_t*>(args.workspace);
  cudaError_t error = launch<limit_count_kernel>(shape, stream, args, tile, tile_counts);
  if (error != cudaSuccess) return error;
  constexpr int scan_warps = 32;
  const int64_t scans = groups_of(args) * ((args.E + kWarp - 1) / kWarp);
  error = launch<limit_scan_kernel>({dim3(unsigned(scans)), dim3(scan_warps * kWarp), scan_warps * kWarp * 4}, stream,
                                    int(args.E), int(tile.tiles), tile_counts);
  if (error != cudaSuccess) return error;
  return launch<limit_drop_kernel>(shape, stream, args, tile, static_cast<const int32_t*>(tile_counts));
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// limit_capacity, for the mutation suite: groups of one block and of several tiles, the last group shorter.
#include "stage_cases.h"

namespace moe::faults {
namespace {

cudaError_t limited(int T, int E, int K, int capacity, int group_size, Outputs& out) {
  test::Device<int32_t> chosen(ids(size_t(T) * K, E, 9));
  test::Device<uint8_t> dropped(size_t(T) * K);
  LimitCapacityArgs args{T, E, K, capacity, group_size, raw(chosen), raw(dropped), nullptr};
  test::Device<uint8_t> workspace(size_t(cuda::limit_capacity_workspace_bytes(args)));
  args.workspace = raw(workspace);
  const cudaError_t error = cuda::limit_capacity(args, nullptr);
  out.add(dropped);
  return error;
}

}  // namespace

MOE_CASE(one_group) {
  return compare([](Outputs& out) { return limited(49, 5, 3, 7, 100, out); });
}
MOE_CASE(groups) {
  return compare([](Outputs& out) { return limited(70, 37, 2, 2, 32, out); });
}
MOE_CASE(tiles) {
  return compare([](Outputs& out) { return limited(333, 6, 2, 40, 333, out); });
}
MOE_CASE(groups_of_tiles) {
  return compare([](Outputs& out) { return limited(300, 40, 2, 5, 160, out); });
}

}  // namespace moe::faults

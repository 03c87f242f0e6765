// SPDX-License-Identifier: Apache-2.0
// limit_capacity: one walk over the slots of a group with a counter an expert. Groups are independent tasks.
#include "parallel.h"

namespace moe::cpu {
namespace {

int32_t* cut(Workspace& space, const LimitCapacityArgs& args, const Workers& workers) {
  return space.take<int32_t>(workers.count * args.E);
}

}  // namespace

int64_t limit_capacity_workspace_bytes(const LimitCapacityArgs& args, const Workers& workers) {
  Workspace space(nullptr);
  cut(space, args, workers);
  return space.bytes();
}

void limit_capacity(const LimitCapacityArgs& args, const Workers& workers) {
  Workspace space(args.workspace);
  int32_t* counters = cut(space, args, workers);
  for_tasks(workers, ceil_div(args.T, args.group_size), [&](int32_t worker, int64_t group) {
    const int64_t begin = group * args.group_size, end = std::min(begin + args.group_size, args.T);
    int32_t* taken = counters + worker * args.E;
    std::fill_n(taken, args.E, 0);
    for (int64_t k = 0; k < args.K; ++k)
      for (int64_t t = begin; t < end; ++t) {
        const int32_t e = args.topk_ids[t * args.K + k];
        args.dropped[t * args.K + k] = e >= 0 && taken[e]++ >= args.capacity;
      }
  });
}

}  // namespace moe::cpu

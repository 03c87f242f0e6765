// SPDX-License-Identifier: Apache-2.0
// How route and sum_scores cut the tokens: one answer for the launchers, the kernels and the workspace.
#pragma once
#include "route_tile.h"

namespace moe::cuda {

/// A run is what one block takes at a time: consecutive tokens of one group, whole tiles but for the last.
struct TokenRuns {
  int64_t group, per_group, count;  // tokens of a group, runs of a group, runs
  int32_t tokens;                   // of a run

  MOE_BOTH int64_t group_of(int64_t run) const { return per_group == count ? 0 : run / per_group; }
  MOE_BOTH int64_t begin(int64_t run) const {
    const int64_t g = group_of(run);
    return g * group + (run - g * per_group) * tokens;
  }
  MOE_BOTH int64_t end(int64_t run) const {
    const int64_t last = (group_of(run) + 1) * group, next = begin(run) + tokens;
    return next < last ? next : last;
  }
};

/// A tile a run where nothing is summed (B = 0). Else runs as long as leaves enough of them, so that a row of sums is
/// small beside the logits that it is of. They depend on T and B alone, and so does the order of the sums.
inline TokenRuns token_runs(int64_t T, int64_t B, const RouteTile& tile) {
  TokenRuns runs{B > 0 ? T / B : T, 0, 0, tile.tokens};
  if (B > 0)
    for (runs.tokens = 8; runs.tokens < 128 && 2 * runs.tokens * kFewBlocks <= T;) runs.tokens *= 2;
  runs.per_group = (runs.group + runs.tokens - 1) / runs.tokens;
  runs.count = runs.per_group * (B > 0 ? B : 1);
  return runs;
}

}  // namespace moe::cuda

// SPDX-License-Identifier: Apache-2.0
// permute: 1. count the slots of each expert, 2. exclusive scan to expert_offsets, 3. place the slots in order
// (stable); then copy rows. Ids are narrowed first, so that every later stage sees int32 in [-1, E).
#include <cstring>

#include "parallel.h"

namespace moe::cpu {

void narrow_ids(const NarrowIdsArgs& args) {
  const auto read = [](const void* ids, bool wide, int64_t i) {
    return wide ? static_cast<const int64_t*>(ids)[i] : int64_t(static_cast<const int32_t*>(ids)[i]);
  };
  for (int64_t s = 0; s < args.S; ++s) {
    int64_t id = read(args.topk_ids, args.ids64, s);
    if (args.expert_map) id = id >= 0 && id < args.map_size ? read(args.expert_map, args.map64, id) : -1;
    args.narrow[s] = id >= 0 && id < args.E ? int32_t(id) : -1;
  }
}

void permute_index(const PermuteIndexArgs& args) {
  int32_t* offsets = args.expert_offsets;
  std::fill_n(offsets, args.E + 1, 0);
  for (int64_t s = 0; s < args.S; ++s)
    if (args.topk_ids[s] >= 0) ++offsets[args.topk_ids[s] + 1];
  for (int64_t e = 0; e < args.E; ++e)
    offsets[e + 1] = int32_t(offsets[e] + ceil_div(offsets[e + 1], args.align) * args.align);
  std::fill_n(args.row_to_slot, args.P, -1);
  for (int64_t s = 0; s < args.S; ++s) {  // offsets[e] runs to the end of e's rows
    const int32_t e = args.topk_ids[s], row = e >= 0 ? offsets[e]++ : -1;
    if (row >= 0) args.row_to_slot[row] = int32_t(s);
    if (args.slot_to_row) args.slot_to_row[s] = row;
  }
  for (int64_t e = args.E; e > 0; --e) {  // and back: e ends, rounded up, where e + 1 begins
    offsets[e] = int32_t(ceil_div(offsets[e - 1], args.align) * args.align);
  }
  offsets[0] = 0;
}

void permute(const PermuteArgs& args, const Workers& workers) {
  const int64_t bytes = dtype_bytes(args.dtype), row_bytes = args.H * bytes;
  const auto* x = static_cast<const char*>(args.x);
  auto* x_rows = static_cast<char*>(args.x_rows);
  for_chunks(workers, args.P, std::max<int64_t>(1, 65536 / std::max<int64_t>(row_bytes, 1)),
             [&](int32_t, int64_t begin, int64_t end) {
               for (int64_t r = begin; r < end; ++r) {
                 const int32_t slot = args.row_to_slot[r];
                 if (slot < 0) std::memset(x_rows + r * row_bytes, 0, row_bytes);
                 else std::memcpy(x_rows + r * row_bytes, x + slot / args.K * args.x_stride * bytes, row_bytes);
               }
             });
}

}  // namespace moe::cpu

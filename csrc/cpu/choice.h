// SPDX-License-Identifier: Apache-2.0
// What the kernels choose by layout and size, without vectors: panel.h acts on it, and the host module answers from
// the same rows. The table of ways is ordered: the first that does not refuse is taken, the last takes everything.
#pragma once
#include "../moe.h"

namespace moe::cpu {

constexpr int64_t kDotRows = 12;       // from here on a transposed copy is cheaper than sums across lanes
constexpr int64_t kDirectRows = 16;    // from here on a contiguous copy is cheaper than strided reads
constexpr int64_t kPanelRows = 48;     // the same for packed panels, where a copy only widens (x 1.2 at 16 rows)
constexpr int64_t kTokenBlock = 2048;  // tokens whose output columns one worker sums at a time

constexpr int64_t kPair = 2 * kPanel;  // columns of a product at a time

/// Contracted elements of a packed panel at a time: 32 KiB of 64 columns, which stay in the first-level cache.
constexpr int64_t depth_block(int64_t acc_bytes) { return 512 / acc_bytes; }

/// One panel: n of 32 or 64 columns of a weight for about `rows` rows. by_column: the left operand runs along its rows.
struct PanelCase {
  int64_t row_stride, col_stride;  // of the weight, as in Weight
  bool padded, is_acc;             // is_acc: the weight is stored in the dtype of the sums
  int64_t n, width, rows;
  bool by_column;
};

enum class Way : int { dot, direct, packed };
struct WayRow {
  Way way;
  const char* name;
  const char* (*refusal)(const PanelCase&);  // why this way does not take the panel, or null
};

constexpr WayRow kWays[] = {
    {Way::dot, "dot",
     [](const PanelCase& c) -> const char* {
       if (c.by_column) return "the left operand runs along its rows";
       if (c.col_stride != 1) return "the weight does not run along the contraction";
       return c.rows >= kDotRows ? "a transposed copy is cheaper than sums across lanes" : nullptr;
     }},
    {Way::direct, "direct",
     [](const PanelCase& c) -> const char* {
       if (c.row_stride != 1) return "the weight does not run along its columns";
       if (c.n != c.width && !c.padded) return "the last columns do not fill a panel";
       if (c.rows < (c.padded ? kPanelRows : kDirectRows) || (c.padded && c.is_acc)) return nullptr;
       return c.padded ? "widening a panel once is cheaper" : "a contiguous copy is cheaper than strided reads";
     }},
    {Way::packed, "packed", [](const PanelCase&) -> const char* { return nullptr; }},
};

constexpr Way way_of(const PanelCase& c) {
  for (const WayRow& row : kWays)
    if (row.refusal(c) == nullptr) return row.way;
  return Way::packed;
}

}  // namespace moe::cpu

// SPDX-License-Identifier: Apache-2.0
// pack_experts: weights into zero-padded panels of 32 columns that a product streams from front to back.
#include "parallel.h"
#include "tile.h"

namespace moe::cpu {
namespace {

constexpr int64_t kDepth = 64;  // contracted elements converted at a time

template <class T, class Packed> void pack_panel(const PackArgs& a, int64_t e, int64_t index) {
  using A = acc_t<T>;
  const int64_t n = std::min(kPanel, a.N - index * kPanel);
  const T* w = static_cast<const T*>(a.w.data) + e * a.w.expert_stride + index * kPanel * a.w.row_stride;
  Packed* packed = static_cast<Packed*>(a.packed) + e * a.packed_expert_stride + index * a.packed_panel_stride;
  A panel[kDepth * kPanel];
  for (int64_t k0 = 0; k0 < a.K; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, a.K - k0);
    const T* from = w + k0 * a.w.col_stride;
    if (a.w.col_stride == 1) {
      tile<T>().transpose(from, a.w.row_stride, n, depth, panel);
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < kPanel; ++j)
          panel[k * kPanel + j] = j < n ? A(from[k * a.w.col_stride + j * a.w.row_stride]) : A(0);
    }
    if constexpr (std::is_same_v<acc_t<Packed>, A>)
      tile<Packed>().narrow(panel, 0, packed + k0 * kPanel, 0, 1, depth * kPanel);
    else
      for (int64_t i = 0; i < depth * kPanel; ++i) packed[k0 * kPanel + i] = Packed(acc_t<Packed>(panel[i]));
  }
}

}  // namespace

void pack_experts(const PackArgs& a, const Workers& workers) {
  const int64_t panels = ceil_div(a.N, kPanel);
  visit_dtype(a.dtype, [&](auto from) {
    visit_dtype(a.packed_dtype, [&](auto to) {
      for_tasks(workers, a.E * panels, [&](int32_t, int64_t task) {
        pack_panel<decltype(from), decltype(to)>(a, task / panels, task % panels);
      });
    });
  });
}

}  // namespace moe::cpu

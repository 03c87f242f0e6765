// SPDX-License-Identifier: Apache-2.0
// Chooses the table of micro-kernels once, at the first use.
#include "tile.h"

#include "isa.h"

namespace moe::cpu {

namespace portable {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

const Kernels& kernels() {
  static const Kernels& chosen = [&]() -> const Kernels& {
#if defined(__x86_64__)
    if (active_isa() == Isa::avx512) return avx512::table;
    if (active_isa() == Isa::avx2) return avx2::table;
#endif
    return portable::table;
  }();
  return chosen;
}

}  // namespace moe::cpu

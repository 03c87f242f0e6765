// SPDX-License-Identifier: Apache-2.0
// Host-side checks: a condition and the parts of a sentence that says what was wanted and what came.
#pragma once
#include <sstream>
#include <stdexcept>

namespace moe {

// std::runtime_error is the only type that arrives as the same Python exception (RuntimeError) under every torch.
template <class... Parts> void require(bool ok, const Parts&... parts) {
  if (__builtin_expect(ok, 1)) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace moe

// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace moe::cpu {

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

Isa wanted_isa() {
  const char* text = std::getenv("MOE_KERNELS_ISA");
  if (text == nullptr || *text == '\0') return Isa::avx512;
  const auto* name =
      std::find_if(std::begin(kNames), std::end(kNames), [&](const char* n) { return n == std::string(text); });
  if (name == std::end(kNames))
    throw std::runtime_error("MOE_KERNELS_ISA must be portable, avx2 or avx512, got " + std::string(text));
  return Isa(name - kNames);
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return Isa::portable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : Isa::avx2;
#else
  return Isa::portable;
#endif
}

Isa active_isa() {
  static const Isa active = std::min(best_isa(), wanted_isa());  // a throw leaves it unset: the next call throws again
  return active;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace moe::cpu

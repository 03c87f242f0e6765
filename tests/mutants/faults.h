// SPDX-License-Identifier: Apache-2.0
// The switch of a planted fault. The suite rewrites a kernel so that every site asks faults::on(its number); all faults
// of a file are thus compiled once, and one is chosen while the program runs.
#pragma once
#include <string>

#include "../../csrc/cuda/device.h"

namespace moe::faults {

/// 1 for the fault that is planted in this run, else 0.
int on(int number);
void plant(int number);  // -1: none
int planted();

/// Names a comparison by its case and its turn in it.
void begin_case(const char* name);
std::string next_comparison();

// What forgets that it must be atomic.
template <class T, class V> MOE_DEVICE T plain_add(T* p, V v) {
  const T old = *p;
  *p = old + T(v);
  return old;
}
template <class T, class V> MOE_DEVICE T plain_min(T* p, V v) {
  const T old = *p;
  if (T(v) < old) *p = T(v);
  return old;
}
template <class T, class V> MOE_DEVICE T plain_max(T* p, V v) {
  const T old = *p;
  if (old < T(v)) *p = T(v);
  return old;
}

}  // namespace moe::faults

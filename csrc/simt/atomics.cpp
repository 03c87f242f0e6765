// SPDX-License-Identifier: Apache-2.0
// Atomic accesses to shared and global memory. Each is one step: nobody else runs between its read and its write.
#include <cstring>

#include "report.h"

namespace moe::simt {
namespace {

template <class T> uint64_t as_bits(T v) {
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}

template <class T> T updated(T old, T operand, T compare, AtomicOp op) {
  switch (op) {
    case AtomicOp::add: return T(old + operand);
    case AtomicOp::exch: return operand;
    case AtomicOp::min: return operand < old ? operand : old;
    case AtomicOp::max: return old < operand ? operand : old;
    case AtomicOp::cas: return old == compare ? operand : old;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == AtomicOp::bit_and) return old & operand;
    if (op == AtomicOp::bit_or) return old | operand;
    if (op == AtomicOp::bit_xor) return old ^ operand;
  }
  return old;
}

template <class T> T update(T* p, T operand, T compare, AtomicOp op, Order order, Scope scope, const void* site) {
  touch({p, sizeof(T), Access::atomic_write, site});
  T old;
  std::memcpy(&old, p, sizeof old);
  const T now = op == AtomicOp::add && std::is_integral_v<T> ? T(uint64_t(old) + uint64_t(operand))  // wraps
                                                             : updated(old, operand, compare, op);
  std::memcpy(p, &now, sizeof now);
  observe(p, order, scope);
  publish(p, order, scope, true);
  if (as_bits(old) == as_bits(now)) polled(reinterpret_cast<uintptr_t>(p), as_bits(old));
  return old;
}

template <class T> T load(const T* p, Order order, const void* site) {
  touch({p, sizeof(T), Access::atomic_read, site});
  T v;
  std::memcpy(&v, p, sizeof v);
  observe(p, order, Scope::device);
  polled(reinterpret_cast<uintptr_t>(p), as_bits(v));
  return v;
}

template <class T> void store(T* p, T v, Order order, const void* site) {
  touch({p, sizeof(T), Access::atomic_write, site, false, true, true});
  std::memcpy(p, &v, sizeof v);
  publish(p, order, Scope::device, false);
}

}  // namespace

template <class T> T atomic(T* p, T operand, T compare, AtomicOp op, Scope scope) {
  return update(p, operand, compare, op, Order::relaxed, scope, MOE_SIMT_SITE);
}
template int atomic(int*, int, int, AtomicOp, Scope);
template unsigned atomic(unsigned*, unsigned, unsigned, AtomicOp, Scope);
template unsigned long long atomic(unsigned long long*, unsigned long long, unsigned long long, AtomicOp, Scope);
template float atomic(float*, float, float, AtomicOp, Scope);
template double atomic(double*, double, double, AtomicOp, Scope);

uint32_t ld_acquire_gpu(const uint32_t* p) { return load(p, Order::acquire, MOE_SIMT_SITE); }
uint64_t ld_acquire_gpu(const uint64_t* p) { return load(p, Order::acquire, MOE_SIMT_SITE); }
uint32_t ld_relaxed_gpu(const uint32_t* p) { return load(p, Order::relaxed, MOE_SIMT_SITE); }
void st_release_gpu(uint32_t* p, uint32_t v) { store(p, v, Order::release, MOE_SIMT_SITE); }
void st_release_gpu(uint64_t* p, uint64_t v) { store(p, v, Order::release, MOE_SIMT_SITE); }
void st_relaxed_gpu(uint32_t* p, uint32_t v) { store(p, v, Order::relaxed, MOE_SIMT_SITE); }
uint32_t atom_add_acq_rel_gpu(uint32_t* p, uint32_t v) {
  return update(p, v, 0u, AtomicOp::add, Order::acq_rel, Scope::device, MOE_SIMT_SITE);
}
void red_release_gpu_add(uint32_t* p, uint32_t v) {
  update(p, v, 0u, AtomicOp::add, Order::release, Scope::device, MOE_SIMT_SITE);
}

}  // namespace moe::simt

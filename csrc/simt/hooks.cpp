// SPDX-License-Identifier: Apache-2.0
// How plain loads and stores are seen: the file that holds the kernels is compiled with -fsanitize=thread, which puts a
// call before every access, and these are the functions it calls. The sanitizer's own library is not linked.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"

using moe::simt::Access;
using moe::simt::running;
using moe::simt::touch;

namespace moe::simt {
bool hooked = false;
}

namespace {

// The emulator's own accesses must not come here. They would if an inline function of the standard library that both
// use were taken from the kernels' object file, hence the emulator's objects come first on the link line.
void plain(void* p, uint32_t bytes, Access kind, bool aligned, const void* site) {
  if (running == nullptr) return;
  if (running->in_hook) {
    std::fputs("the emulator's objects must be linked before the kernels'\n", stderr);
    std::abort();
  }
  moe::simt::Thread& thread = *running;
  thread.in_hook = true;
  touch({p, bytes, kind, site, false, aligned});
  thread.in_hook = false;
}

// A volatile access is a relaxed one, and a volatile load in a loop polls.
void volatile_read(void* p, uint32_t bytes, const void* site) {
  if (running == nullptr || running->fiber.holds(reinterpret_cast<uintptr_t>(p))) return;
  touch({p, bytes, Access::atomic_read, site});
  uint64_t value = 0;
  std::memcpy(&value, p, bytes < 8 ? bytes : 8);
  moe::simt::observe(p, moe::simt::Order::relaxed, moe::simt::Scope::device);
  moe::simt::polled(reinterpret_cast<uintptr_t>(p), value);
}

void volatile_write(void* p, uint32_t bytes, const void* site) {
  if (running == nullptr || running->fiber.holds(reinterpret_cast<uintptr_t>(p))) return;
  touch({p, bytes, Access::atomic_write, site, false, true, true});
  moe::simt::publish(p, moe::simt::Order::relaxed, moe::simt::Scope::device, false);
}

}  // namespace

#define MOE_HOOK(name, ...) \
  __attribute__((visibility("hidden"))) void name(void* p) { __VA_ARGS__; }
#define MOE_HOOKS(n)                                                                    \
  MOE_HOOK(__tsan_read##n, plain(p, n, Access::read, true, MOE_SIMT_SITE))              \
  MOE_HOOK(__tsan_write##n, plain(p, n, Access::write, true, MOE_SIMT_SITE))            \
  MOE_HOOK(__tsan_unaligned_read##n, plain(p, n, Access::read, false, MOE_SIMT_SITE))   \
  MOE_HOOK(__tsan_unaligned_write##n, plain(p, n, Access::write, false, MOE_SIMT_SITE)) \
  MOE_HOOK(__tsan_volatile_read##n, volatile_read(p, n, MOE_SIMT_SITE))                 \
  MOE_HOOK(__tsan_volatile_write##n, volatile_write(p, n, MOE_SIMT_SITE))               \
  MOE_HOOK(__tsan_unaligned_volatile_read##n, volatile_read(p, n, MOE_SIMT_SITE))       \
  MOE_HOOK(__tsan_unaligned_volatile_write##n, volatile_write(p, n, MOE_SIMT_SITE))

extern "C" {
MOE_HOOKS(1)
MOE_HOOKS(2)
MOE_HOOKS(4)
MOE_HOOKS(8)
MOE_HOOKS(16)
__attribute__((visibility("hidden"))) void __tsan_read_range(void* p, unsigned long n) {
  plain(p, uint32_t(n), Access::read, false, MOE_SIMT_SITE);
}
__attribute__((visibility("hidden"))) void __tsan_write_range(void* p, unsigned long n) {
  plain(p, uint32_t(n), Access::write, false, MOE_SIMT_SITE);
}
MOE_HOOK(__tsan_func_entry, (void)p)
MOE_HOOK(__tsan_vptr_read, (void)p)
__attribute__((visibility("hidden"))) void __tsan_vptr_update(void**, void*) {}
__attribute__((visibility("hidden"))) void __tsan_func_exit() {}
__attribute__((visibility("hidden"))) void __tsan_init() { moe::simt::hooked = true; }
// The guard of a function's static variable, in host code of the same file.
__attribute__((visibility("hidden"))) char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
}

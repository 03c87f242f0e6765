// SPDX-License-Identifier: Apache-2.0
// A thread of a kernel: a stack of its own that runs until it gives way. x86-64 and aarch64 switch by hand, in a dozen
// instructions; everything else, and a build with MOE_SIMT_UCONTEXT, through ucontext.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(MOE_SIMT_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define MOE_SIMT_UCONTEXT 1
#endif

#ifdef MOE_SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace moe::simt {

constexpr size_t kStackBytes = 128 << 10;

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Makes the next resume() call entry() on a fresh stack. entry() must not return.
  void start(void (*entry)());
  /// Runs the fiber until it calls give_way().
  void resume();
  /// Back to the caller of resume(); called on the fiber's own stack. `last` says that it will not be resumed.
  void give_way(bool last = false);

  bool holds(uintptr_t address) const { return address - stack_ < kStackBytes; }
  /// False once the stack has been overrun.
  bool intact() const;

 private:
  void (*entry_)() = nullptr;
  uintptr_t stack_ = 0;  // lowest address; taken from a pool at the first start
#ifdef MOE_SIMT_UCONTEXT
  ucontext_t context_, caller_;
#else
  void* context_ = nullptr;
  void* caller_ = nullptr;
#endif
  void* fake_stack_ = nullptr;  // of AddressSanitizer
  void* caller_fake_stack_ = nullptr;
  const void* caller_bottom_ = nullptr;
  size_t caller_bytes_ = 0;

  static void enter();
};

}  // namespace moe::simt

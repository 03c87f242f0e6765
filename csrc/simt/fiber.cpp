// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// moe_simt_switch(save, to): pushes what a callee must keep, leaves the stack pointer in *save, continues at `to`.
#ifndef MOE_SIMT_UCONTEXT
extern "C" void moe_simt_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl moe_simt_switch
.hidden moe_simt_switch
.type moe_simt_switch,@function
moe_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moe_simt_switch,.-moe_simt_switch
)");
#else
asm(R"(
.text
.globl moe_simt_switch
.hidden moe_simt_switch
.type moe_simt_switch,%function
moe_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size moe_simt_switch,.-moe_simt_switch
)");
#endif
#endif

namespace moe::simt {
namespace {

constexpr uint64_t kCanary = 0x5afe57ac5afe57ac;
constexpr size_t kStacksPerMapping = 64;

// Stacks are never unmapped, only handed out again: a mapping costs more than a block.
std::vector<uintptr_t> free_stacks;

Fiber* entered = nullptr;  // the fiber that resume() entered last

uintptr_t take_stack() {
  if (free_stacks.empty()) {
    void* const mapping = mmap(nullptr, kStacksPerMapping * kStackBytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    for (size_t i = kStacksPerMapping; i-- > 0;) {
      free_stacks.push_back(reinterpret_cast<uintptr_t>(mapping) + i * kStackBytes);
    }
  }
  const uintptr_t stack = free_stacks.back();
  free_stacks.pop_back();
  return stack;
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ != 0) free_stacks.push_back(stack_);
}

bool Fiber::intact() const { return *reinterpret_cast<const uint64_t*>(stack_) == kCanary; }

void Fiber::enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &entered->caller_bottom_, &entered->caller_bytes_);
#endif
  entered->entry_();
  __builtin_unreachable();
}

void Fiber::start(void (*entry)()) {
  if (stack_ == 0) stack_ = take_stack();
  *reinterpret_cast<uint64_t*>(stack_) = kCanary;
  entry_ = entry;
#ifdef MOE_SIMT_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = reinterpret_cast<void*>(stack_);
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::enter, 0);
#elif defined(__x86_64__)
  // Six zero registers, then the return address; a function is entered with the stack 8 past a multiple of 16.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context_ = top;
#else
  void** const frame = reinterpret_cast<void**>(stack_ + kStackBytes - 64 - 160);
  for (int i = 0; i < 20; ++i) frame[i] = nullptr;
  frame[11] = reinterpret_cast<void*>(&Fiber::enter);  // x30
  context_ = frame;
#endif
}

void Fiber::resume() {
  entered = this;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&caller_fake_stack_, reinterpret_cast<void*>(stack_), kStackBytes);
#endif
#ifdef MOE_SIMT_UCONTEXT
  swapcontext(&caller_, &context_);
#else
  moe_simt_switch(&caller_, context_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(caller_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::give_way([[maybe_unused]] bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, caller_bottom_, caller_bytes_);
#endif
#ifdef MOE_SIMT_UCONTEXT
  swapcontext(&context_, &caller_);
#else
  moe_simt_switch(&context_, caller_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, &caller_bottom_, &caller_bytes_);
#endif
}

}  // namespace moe::simt

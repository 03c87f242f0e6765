// SPDX-License-Identifier: Apache-2.0
// Warpgroups: how they meet, how many registers they have, and who touched those that wgmma works on.
#include "warpgroup.h"

#include <algorithm>

#include "report.h"

namespace moe::simt {
namespace {

constexpr uint32_t kThreads = 128, kRegisterFile = 65536;
constexpr int kFewestRegisters = 24, kMostRegisters = 256;

struct Request {
  int registers;
  bool increase;
  const void* site;
};

uint32_t used_registers(const Block& block) {
  uint32_t used = 0;
  for (const Warpgroup& warpgroup : block.warpgroups) used += warpgroup.registers * kThreads;
  return used;
}

void do_setmaxnreg(uint32_t number, void** arguments) {
  Block& block = *running->block;
  Warpgroup& warpgroup = block.warpgroups[number];
  const Request& request = *static_cast<const Request*>(arguments[0]);
  for (uint32_t i = 1; i < kThreads; ++i) {
    const Request& other = *static_cast<const Request*>(arguments[i]);
    if (other.registers == request.registers) continue;
    fault("setmaxnreg",
          format("%d and %d registers in one warpgroup: all its warps run the same one", request.registers,
                 other.registers),
          other.site);
  }
  const auto wanted = uint32_t(request.registers);
  if (request.increase ? wanted < warpgroup.registers : wanted > warpgroup.registers) {
    fault("setmaxnreg",
          format("%s %u registers in a warpgroup that has %u a thread", request.increase ? ".inc to" : ".dec to",
                 wanted, warpgroup.registers),
          request.site);
  }
  const uint32_t pool = launch_registers(uint32_t(block.threads.size())) * uint32_t(block.threads.size());
  if (wanted * kThreads > pool) {
    fault("setmaxnreg", format("%u registers a thread from the block's pool of %u", wanted, pool), request.site);
  }
  if (request.increase) return;  // taken by each thread's own loop
  warpgroup.registers = wanted;
  for (Warpgroup& other : block.warpgroups) {
    for (Thread* thread : other.waiting) make_ready(*thread);
    other.waiting.clear();
  }
}

}  // namespace

void meet_warpgroup(const char* name, void* argument, void (*work)(uint32_t, void**), const void* site) {
  Thread& thread = *running;
  Block& block = *thread.block;
  thread.site = site;
  const uint32_t number = thread.id / kThreads, first = number * kThreads;
  if (first + kThreads > block.threads.size()) {
    fault("warpgroup", format("%s in a warpgroup of %zu threads", name, block.threads.size() - first), site);
  }
  Warpgroup& warpgroup = block.warpgroups[number];
  if (warpgroup.arrived == 0) {
    warpgroup.name = name;
    warpgroup.site = site;
    std::fill(warpgroup.here, warpgroup.here + kThreads, false);
    for (uint32_t i = first; i < first + kThreads; ++i) {
      if (block.threads[i].state != State::exited) continue;
      fault("warpgroup", format("%s after %s of the warpgroup has ended", name, who(block.threads[i]).c_str()), site);
    }
  } else if (warpgroup.name != name) {
    fault("warpgroup",
          format("%s while others of the warpgroup are in %s, at %s", name, warpgroup.name,
                 source_line(warpgroup.site).c_str()),
          site);
  }
  warpgroup.arguments[thread.id - first] = argument;
  warpgroup.here[thread.id - first] = true;
  if (++warpgroup.arrived < kThreads) return wait_in(name, first);
  warpgroup.arrived = 0;
  work(number, warpgroup.arguments);
  ++machine.meetings;
  for (uint32_t i = first; i < first + kThreads; ++i) {
    block.threads[i].meeting = machine.meetings;
    if (i != thread.id) make_ready(block.threads[i]);
  }
  yield();
}

void leave_warpgroup(Thread& thread) {
  Block& block = *thread.block;
  if (thread.id / kThreads >= block.warpgroups.size()) return;
  const Warpgroup& warpgroup = block.warpgroups[thread.id / kThreads];
  if (warpgroup.arrived == 0) return;
  note_fault("warpgroup", who(thread) + " ends while others of its warpgroup are in " + warpgroup.name, warpgroup.site);
}

// __launch_bounds__ is not known here: as many as ptxas may take for one block on a processor, in steps of 8.
uint32_t launch_registers(uint32_t threads) {
  return std::min(uint32_t(kMostRegisters), kRegisterFile / ((threads + 127) / 128 * 128) / 8 * 8);
}

// Registers are memory here. Whoever touches those of a product must have waited for it, and the next product a fence.
void touch_registers(Thread& thread, uintptr_t address, uint32_t bytes, Access kind, const void* site) {
  for (Registers& registers : thread.registers) {
    if (address + bytes <= registers.begin || registers.end <= address) continue;
    if (registers.flying > 0) {
      fault("in flight",
            format("%s of an accumulator of the wgmma at %s, which has not been waited for",
                   writes(kind) ? "write" : "read", source_line(registers.site).c_str()),
            site);
    }
    registers.fenced = false;
  }
}

void wgmma_fence() {
  running->wgmma_fenced = true;
  for (Registers& registers : running->registers) registers.fenced = true;
}

void setmaxnreg(int registers, bool increase) {
  const void* const site = MOE_SIMT_SITE;
  if (registers < kFewestRegisters || registers > kMostRegisters || registers % 8 != 0) {
    fault("setmaxnreg",
          format("%d registers: a multiple of 8 from %d to %d", registers, kFewestRegisters, kMostRegisters), site);
  }
  Request request{registers, increase, site};
  meet_warpgroup(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", &request, do_setmaxnreg, site);
  if (!increase) return;
  Thread& thread = *running;
  Block& block = *thread.block;
  Warpgroup& warpgroup = block.warpgroups[thread.id / kThreads];
  const uint32_t wanted = uint32_t(registers), threads = uint32_t(block.threads.size());
  while (warpgroup.registers < wanted) {
    if (used_registers(block) + (wanted - warpgroup.registers) * kThreads <= launch_registers(threads) * threads) {
      warpgroup.registers = wanted;
      for (Thread* other : warpgroup.waiting) make_ready(*other);
      warpgroup.waiting.clear();
      return;
    }
    warpgroup.waiting.push_back(&thread);
    wait_in("setmaxnreg.inc", wanted);
  }
}

}  // namespace moe::simt

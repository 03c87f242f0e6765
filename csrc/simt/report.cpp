// SPDX-License-Identifier: Apache-2.0
#include "report.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <vector>

#include "proxy.h"

namespace moe::simt {
namespace {

// A return address is one past its call.
std::string ask_addr2line(const void* site) {
  Dl_info module{};
  const auto address = reinterpret_cast<uintptr_t>(site) - 1;
  if (dladdr(reinterpret_cast<const void*>(address), &module) == 0 || module.dli_fname == nullptr) return "?";
  const uintptr_t base = reinterpret_cast<uintptr_t>(module.dli_fbase);
  const std::string place = format("%s+0x%zx", module.dli_fname, address - base);
  const std::string command = format("addr2line -C -f -i -e '%s' 0x%zx 2>/dev/null", module.dli_fname, address - base);
  FILE* const pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return place;
  std::string text;
  char buffer[512];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) text += buffer;
  pclose(pipe);
  return text.empty() || text.find(":?") != std::string::npos || text.find("??:0") != std::string::npos ? place : text;
}

// addr2line answers a function and a line for every level of inlining, innermost first. The levels inside the emulator
// (its headers) are left out: the kernel's own line comes first.
std::vector<std::string> levels(const void* site) {
  static std::map<const void*, std::vector<std::string>> known;
  const auto found = known.find(site);
  if (found != known.end()) return found->second;
  const std::string text = ask_addr2line(site);
  std::vector<std::string> lines, result;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  for (size_t i = 1; i < lines.size(); i += 2) {
    const std::string& line = lines[i];
    const bool ours = line.find("/simt/cuda_names.h") != std::string::npos ||
                      line.find("csrc/simt/") != std::string::npos || line.find("ptx.cuh") != std::string::npos ||
                      line.find("ptx_sm90.cuh") != std::string::npos || line.find("/include/c++/") != std::string::npos;
    if (ours) continue;
    const size_t extra = line.find(" (discriminator");
    result.push_back(line.substr(0, extra));
  }
  if (result.empty()) result.push_back(lines.size() == 1 ? lines[0] : lines.size() > 1 ? lines[1] : "?");
  return known[site] = result;
}

std::string short_path(const std::string& line) {
  const size_t at = std::min(line.rfind("csrc/"), line.rfind("tests/"));
  return at == std::string::npos ? line : line.substr(at);
}

std::string kernel_name() {
  Dl_info module{};
  const void* const kernel = machine.config.kernel;
  if (kernel == nullptr || dladdr(kernel, &module) == 0) return "?";
  if (module.dli_sname != nullptr) {
    FILE* const pipe = popen(format("c++filt '%s' 2>/dev/null", module.dli_sname).c_str(), "r");
    char buffer[1024] = "";
    if (pipe != nullptr) {
      if (std::fgets(buffer, sizeof buffer, pipe) == nullptr) buffer[0] = 0;
      pclose(pipe);
    }
    const std::string name = buffer;
    return name.empty() ? module.dli_sname : name.substr(0, name.find('\n'));
  }
  const std::string text = ask_addr2line(static_cast<const char*>(kernel) + 1);
  return text.substr(0, text.find('\n'));
}

}  // namespace

std::string format(const char* text, ...) {
  va_list arguments, again;
  va_start(arguments, text);
  va_copy(again, arguments);
  std::string result(size_t(std::vsnprintf(nullptr, 0, text, arguments)), '\0');
  std::vsnprintf(result.data(), result.size() + 1, text, again);
  va_end(again);
  va_end(arguments);
  return result;
}

std::string source_line(const void* site) {
  if (site == nullptr) return "?";
  std::string text;
  for (const std::string& level : levels(site)) text += (text.empty() ? "" : ", inlined at ") + short_path(level);
  return text;
}

bool same_line(const void* a, const void* b) { return a == b || levels(a)[0] == levels(b)[0]; }

std::string who(const Thread& thread) { return who(thread.block->serial, thread.id); }

std::string who(uint32_t block_serial, uint32_t agent) {
  if (block_serial < machine.first_serial) return format("a thread of the kernel before");
  const uint32_t linear = machine.order[block_serial - machine.first_serial];
  const dim3 g = machine.config.grid, b = machine.config.block;
  const Block* const block = find_block(block_serial);
  if (agent >= machine.block_threads() && block != nullptr) {
    const Agent& one = block->agents[agent - machine.block_threads()];
    const std::string of = format(" of block (%u,%u,%u)", linear % g.x, linear / g.x % g.y, linear / (g.x * g.y));
    switch (one.kind) {
      case AgentKind::wgmma: return format("the wgmma of warpgroup %u", one.of) + of;
      case AgentKind::load: return format("the TMA load for the mbarrier at shared +0x%x", one.of) + of;
      default: return format("the bulk store of thread %u", one.of) + of;
    }
  }
  if (agent >= machine.block_threads()) return format("TMA or wgmma of block number %u", linear);
  return format("thread (%u,%u,%u) of block (%u,%u,%u)", agent % b.x, agent / b.x % b.y, agent / (b.x * b.y),
                linear % g.x, linear / g.x % g.y, linear / (g.x * g.y));
}

void note_fault(const char* kind, const std::string& text, const void* site) {
  if (machine.failed) return;
  machine.failed = true;
  static const char* const schedules[] = {"in order", "random", "one warp ahead"};
  static const char* const landings[] = {"early", "late", "random"};
  const dim3 g = machine.config.grid, b = machine.config.block;
  machine.report = format("%s: %s", kind, text.c_str());
  if (site != nullptr) machine.report += "\n  at " + source_line(site);
  machine.report +=
      format("\n  kernel %s, grid (%u,%u,%u), block (%u,%u,%u)", kernel_name().c_str(), g.x, g.y, g.z, b.x, b.y, b.z);
  machine.report += format("\n  schedule %s, copies land %s; replay: MOE_KERNELS_SIMT_SEED=%llu",
                           schedules[int(machine.options.schedule)], landings[int(machine.options.landing)],
                           static_cast<unsigned long long>(machine.options.seed));
}

void fault(const char* kind, const std::string& text, const void* site) {
  note_fault(kind, running ? text + "\n  by " + who(*running) : text, site);
  if (running == nullptr) std::abort();
  for (;;) running->fiber.give_way(true);
}

}  // namespace moe::simt

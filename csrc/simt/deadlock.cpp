// SPDX-License-Identifier: Apache-2.0
// What it means that nobody can run: who waits for what.
#include <algorithm>

#include "report.h"

namespace moe::simt {
namespace {

std::string waiting_for(const Thread& thread) {
  if (thread.state == State::polling) {
    return format("a loop that reads %s and keeps finding %llu", name_of_address(thread.polled_address).c_str(),
                  static_cast<unsigned long long>(thread.polled_value));
  }
  const std::string in = thread.waits_in;
  if (in == "bar.sync" || in == "__syncthreads") {
    const BlockBarrier& barrier = thread.block->barriers.at(int(thread.waits_on));
    return format("%s, barrier %d, %d of %d threads there", in.c_str(), int(thread.waits_on), barrier.arrived,
                  barrier.expected);
  }
  if (in == "mbarrier.try_wait") {
    const MBarrier& barrier = thread.block->mbarriers.at(uint32_t(thread.waits_on));
    return format("mbarrier.try_wait on shared +0x%x, phase %u, %u arrivals and %lld bytes to come",
                  uint32_t(thread.waits_on), barrier.phase, barrier.pending, static_cast<long long>(barrier.bytes));
  }
  if (in == "wgmma.mma_async" || in == "setmaxnreg.dec") {
    return format("%s, %u of the warpgroup's 128 threads there", in.c_str(),
                  thread.block->warpgroups[thread.id / 128].arrived);
  }
  if (in == "setmaxnreg.inc") return "setmaxnreg.inc, for registers or for its warpgroup";
  if (in == "barrier.cluster.wait") {
    return format("barrier.cluster.wait, %u of %u threads there", thread.block->cluster->arrived,
                  thread.block->cluster->threads);
  }
  return format("%s, mask 0x%08x", in.c_str(), uint32_t(thread.waits_on));
}

}  // namespace

void report_deadlock() {
  std::string text = "every thread waits";
  const void* site = nullptr;
  int groups = 0;
  for (const auto& block : machine.resident) {
    std::vector<std::pair<std::string, std::pair<int, const Thread*>>> waits;
    int exited = 0;
    for (const Thread& thread : block->threads) {
      if (thread.state == State::exited) {
        ++exited;
        continue;
      }
      const std::string what = waiting_for(thread) + ", at " + source_line(thread.site);
      auto wait = std::find_if(waits.begin(), waits.end(), [&](const auto& w) { return w.first == what; });
      if (wait == waits.end()) wait = waits.insert(waits.end(), {what, {0, &thread}});
      ++wait->second.first;
    }
    for (const auto& [what, group] : waits) {
      if (++groups > 12) continue;
      text += format("\n  %d (first: %s) in %s", group.first, who(*group.second).c_str(), what.c_str());
      if (site == nullptr) site = group.second->site;
    }
    if (exited != 0)
      text += format("\n  %d threads of block (%u,%u,%u) have exited", exited, block->index.x, block->index.y,
                     block->index.z);
  }
  if (groups > 12) text += format("\n  and %d more groups", groups - 12);
  note_fault("deadlock", text, site);
}

}  // namespace moe::simt

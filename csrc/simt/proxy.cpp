// SPDX-License-Identifier: Apache-2.0
#include "proxy.h"

#include <algorithm>

#include "report.h"

namespace moe::simt {
namespace {

// A fence of the writer that comes after the write, and that the issuers know of.
bool fenced_by_writer(const Issuer& issuer, const Record& write, bool shared) {
  const Block* const block = find_block(write.block);
  if (block == nullptr) return true;  // it has ended: nothing is known of its fences
  const auto& fences = block->threads[write.agent].proxy_fences[shared];
  const auto fence = std::lower_bound(fences.begin(), fences.end(), write.clock);
  if (fence == fences.end()) return false;
  Record at = write;
  at.clock = *fence;
  return issuer.ordered(at);
}

// A fence of this thread at which it knew of the write.
bool fenced_by(const Thread& thread, const Record& write, bool shared) {
  const ClockRef& known = thread.proxy_fenced[shared];
  if (known == nullptr || write.block != thread.block->serial) return false;
  return write.agent < known->seen.size() && write.clock <= known->seen[write.agent];
}

void fence(bool shared) {
  Thread& thread = *running;
  thread.proxy_fences[shared].push_back(thread.own);
  thread.proxy_fenced[shared] = thread.base;
  ++thread.own;
}

}  // namespace

bool ThreadIssuer::fenced(const Record& write, bool shared) const {
  return fenced_by_writer(*this, write, shared) || fenced_by(thread_, write, shared);
}

// What every thread knows; of its own doings a thread knows all.
WarpgroupIssuer::WarpgroupIssuer(const Block& block, uint32_t warpgroup) : block_(block), first_(warpgroup * 128) {
  const Thread* last = nullptr;
  for (uint32_t i = first_; i < first_ + 128; ++i) {
    const Thread& thread = block.threads[i];
    const auto& seen = thread.base->seen;
    if (last != nullptr && thread.base == last->base) {  // shared: nothing new but of the one before
      seen_[last->id] = std::min(seen_[last->id], seen[last->id]);
      continue;
    }
    if (last == nullptr) {
      seen_ = seen;
      seen_[i] = thread.own;
    } else {
      const uint32_t others = i < seen_.size() ? seen_[i] : 0;
      if (seen_.size() > seen.size()) seen_.resize(seen.size());
      for (size_t agent = 0; agent < seen_.size(); ++agent) seen_[agent] = std::min(seen_[agent], seen[agent]);
      seen_[i] = std::min(others, thread.own);
    }
    last = &thread;
  }
}

bool WarpgroupIssuer::ordered(const Record& earlier) const {
  if (earlier.block == block_.serial) return earlier.agent < seen_.size() && earlier.clock <= seen_[earlier.agent];
  for (uint32_t i = 0; i < 128; ++i) {
    if (!simt::ordered(block_.threads[first_ + i], earlier)) return false;
  }
  return true;
}

bool WarpgroupIssuer::fenced(const Record& write, bool shared) const {
  if (fenced_by_writer(*this, write, shared)) return true;
  for (uint32_t i = 0; i < 128; ++i) {
    if (!fenced_by(block_.threads[first_ + i], write, shared)) return false;
  }
  return true;
}

uint16_t agent_index(Block& block, AgentKind kind, uint32_t of) {
  const auto found = std::find_if(block.agents.begin(), block.agents.end(),
                                  [&](const Agent& agent) { return agent.kind == kind && agent.of == of; });
  const auto index = uint16_t(block.threads.size() + size_t(found - block.agents.begin()));
  if (found == block.agents.end()) block.agents.push_back({kind, of});
  return index;
}

Record begin_async(Block& block, AgentKind kind, uint32_t of, const void* site) {
  const uint16_t index = agent_index(block, kind, of);
  Agent& agent = block.agents[index - block.threads.size()];
  agent.site = site;
  return {++agent.clock, block.serial, site, index, 0, Access::read, true};
}

void learn(Thread& thread, uint16_t agent, uint32_t clock) {
  if (agent < thread.base->seen.size() && clock <= thread.base->seen[agent]) return;
  ClockSum sum(thread.block->serial, thread.block->threads.size());
  sum.add(thread.base);
  sum.add(agent, clock);
  thread.base = sum.take();
}

bool anyone_knows(const Block& block, uint16_t agent, uint32_t clock) {
  return std::any_of(block.threads.begin(), block.threads.end(), [&](const Thread& thread) {
    return agent < thread.base->seen.size() && clock <= thread.base->seen[agent];
  });
}

Block* find_block(uint32_t serial) {
  for (const auto& block : machine.resident) {
    if (block->serial == serial) return block.get();
  }
  return nullptr;
}

void fence_proxy_async() { fence(true); }
void fence_proxy_async_global() { fence(false); }

void check_async_end(const Block& block) {
  for (const Thread& thread : block.threads) {
    const auto unread = [](const BulkGroup& group) { return !group.read && group.read_clock != 0; };
    const bool left =
        unread(thread.stores) || std::any_of(thread.store_groups.begin(), thread.store_groups.end(), unread);
    if (left) {
      note_fault("async", "the block ended with a bulk store of " + who(thread) + " that it had not waited for",
                 thread.site);
    }
    if (!thread.products.empty() || !thread.product_groups.empty()) {
      note_fault("async", "the block ended with a wgmma of " + who(thread) + " that it had not waited for",
                 thread.site);
    }
  }
  for (size_t i = 0; i < block.agents.size(); ++i) {
    const Agent& agent = block.agents[i];
    if (agent.kind != AgentKind::load) continue;
    if (anyone_knows(block, uint16_t(block.threads.size() + i), agent.clock)) continue;
    note_fault("async",
               format("the block ended with a TMA load for the mbarrier at shared +0x%x that nobody had waited "
                      "for",
                      agent.of),
               agent.site);
  }
  for (const auto& [offset, barrier] : block.mbarriers) {
    if (barrier.bytes == 0) continue;
    note_fault("mbarrier",
               format("the block ended with %lld bytes to come at the mbarrier at shared +0x%x",
                      static_cast<long long>(barrier.bytes), offset),
               barrier.init.site);
  }
}

}  // namespace moe::simt

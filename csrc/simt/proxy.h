// SPDX-License-Identifier: Apache-2.0
// Accesses through the asynchronous proxy: TMA and wgmma. Each is made by an agent of its block that is no thread: one
// a warpgroup (its wgmma), one an mbarrier (the loads that complete there), two a thread that stores (what its bulk
// groups read, what they write). Agents come behind the threads in the clocks; the operations of one agent end in
// order.
#pragma once
#include "machine.h"

namespace moe::simt {

/// The threads that issued an asynchronous operation: what all of them know is ordered before it.
class Issuer : public Observer {
 public:
  /// Has a write through the generic proxy, ordered before this, been followed by the fence that shows it to the
  /// asynchronous proxy? Either its writer fenced and the issuers know of that, or each issuer fenced knowing the
  /// write.
  virtual bool fenced(const Record& write, bool shared) const = 0;
  virtual ~Issuer() = default;
};

class ThreadIssuer final : public Issuer {
 public:
  explicit ThreadIssuer(const Thread& thread) : thread_(thread) {}
  bool ordered(const Record& earlier) const override { return simt::ordered(thread_, earlier); }
  bool fenced(const Record& write, bool shared) const override;

 private:
  const Thread& thread_;
};

class WarpgroupIssuer final : public Issuer {
 public:
  WarpgroupIssuer(const Block& block, uint32_t warpgroup);
  bool ordered(const Record& earlier) const override;
  bool fenced(const Record& write, bool shared) const override;

 private:
  const Block& block_;
  uint32_t first_;              // thread
  std::vector<uint32_t> seen_;  // by all of the warpgroup
};

/// One asynchronous operation, as its accesses are recorded.
struct AsyncOperation {
  Record record;  // agent, clock, site; its bytes and kind are those of each access
  const Issuer& issuer;
};

/// The index of an agent in the clocks; made at its first use.
uint16_t agent_index(Block& block, AgentKind kind, uint32_t of);
/// Begins an operation of the agent.
Record begin_async(Block& block, AgentKind kind, uint32_t of, const void* site);
/// The thread now knows that the agent's operations up to `clock` have ended.
void learn(Thread& thread, uint16_t agent, uint32_t clock);
/// Does any thread of the block know it?
bool anyone_knows(const Block& block, uint16_t agent, uint32_t clock);
Block* find_block(uint32_t serial);

/// Checks and records an access of `bytes` at an offset of the block's shared memory, or of global memory.
void touch_shared_async(const AsyncOperation& operation, Block& block, Access kind, uint32_t offset, uint32_t bytes);
void touch_global_async(const AsyncOperation& operation, Access kind, const void* p, uint32_t bytes);

/// Faults of asynchronous operations that the end of the block cuts off.
void check_async_end(const Block& block);

}  // namespace moe::simt

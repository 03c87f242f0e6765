// SPDX-License-Identifier: Apache-2.0
// Vector clocks. A thread's knowledge is an immutable vector shared with the threads it last met, plus its own count:
// a block barrier makes one new vector for all. What a block knows of other blocks is kept apart, and is mostly
// nothing.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace moe::simt {

/// Of other blocks, by serial number: what has been seen of each of their threads.
using Foreign = std::map<uint32_t, std::vector<uint32_t>>;

struct Clock {
  std::vector<uint32_t> seen;  // by thread of the block, then by its asynchronous agents
  std::shared_ptr<const Foreign> foreign;
};
using ClockRef = std::shared_ptr<const Clock>;

/// A clock as it left a block.
struct Snapshot {
  uint32_t block;
  ClockRef clock;
};
using SnapshotRef = std::shared_ptr<const Snapshot>;

/// The least upper bound of clocks of one block, and of snapshots of any block.
class ClockSum {
 public:
  ClockSum(uint32_t block, size_t threads) : block_(block) { sum_.seen.assign(threads, 0); }

  void add(const ClockRef& clock) {
    if (clock == nullptr || clock == last_) return;
    last_ = clock;
    raise(sum_.seen, clock->seen);
    add_foreign(clock->foreign);
  }
  void add(size_t agent, uint32_t count) {
    if (sum_.seen.size() <= agent) sum_.seen.resize(agent + 1);
    sum_.seen[agent] = std::max(sum_.seen[agent], count);
  }
  void add(const ClockRef& base, size_t thread, uint32_t own) {
    add(base);
    add(thread, own);
  }
  void add(const Snapshot& from) {
    if (from.block == block_) return add(from.clock);
    raise(own_foreign()[from.block], from.clock->seen);
    add_foreign(from.clock->foreign);
  }
  ClockRef take() { return std::make_shared<const Clock>(std::move(sum_)); }

 private:
  uint32_t block_;
  Clock sum_;
  ClockRef last_;
  std::shared_ptr<Foreign> foreign_;  // sum_.foreign while it may still be changed

  static void raise(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  }
  Foreign& own_foreign() {
    if (foreign_ == nullptr) {
      foreign_ = sum_.foreign ? std::make_shared<Foreign>(*sum_.foreign) : std::make_shared<Foreign>();
      sum_.foreign = foreign_;
    }
    return *foreign_;
  }
  void add_foreign(const std::shared_ptr<const Foreign>& other) {
    if (other == nullptr || other == sum_.foreign) return;
    if (sum_.foreign == nullptr && other->count(block_) == 0) {
      sum_.foreign = other;
      return;
    }
    for (const auto& [block, seen] : *other) raise(block == block_ ? sum_.seen : own_foreign()[block], seen);
  }
};

}  // namespace moe::simt

// SPDX-License-Identifier: Apache-2.0
// What a thread knows of the others: happens-before, fences and flags. As in the PTX memory model, a fence before a
// relaxed store and a fence after the relaxed load that reads it order the two threads, at the scope of the fences.
#include <algorithm>
#include <unordered_map>

#include "machine.h"

namespace moe::simt {
namespace {

// What can be acquired at a location: the snapshots published there, at most one a block and scope.
struct Location { std::vector<SnapshotRef> device, block; };
std::unordered_map<uintptr_t, Location> locations;

void put(std::vector<SnapshotRef>& list, const SnapshotRef& snapshot) {
  for (SnapshotRef& old : list) {
    if (old->block != snapshot->block) continue;
    ClockSum sum(snapshot->block, snapshot->clock->seen.size());
    sum.add(old->clock);
    sum.add(snapshot->clock);
    old = std::make_shared<const Snapshot>(Snapshot{snapshot->block, sum.take()});
    return;
  }
  list.push_back(snapshot);
}

}  // namespace

bool ordered(const Thread& thread, const Record& earlier) {
  if (earlier.block == thread.block->serial) {
    const auto& seen = thread.base->seen;
    return earlier.agent == thread.id || (earlier.agent < seen.size() && earlier.clock <= seen[earlier.agent]);
  }
  if (earlier.block < machine.first_serial) {
    const auto& unfinished = thread.grid_waited ? machine.unfinished_after_wait : machine.unfinished_at_start;
    return std::none_of(unfinished.begin(), unfinished.end(), [&](const Unfinished& grid) {
      return grid.first_serial <= earlier.block && earlier.block < grid.end_serial;
    });
  }
  if (thread.base->foreign == nullptr) return false;
  const auto known = thread.base->foreign->find(earlier.block);
  return known != thread.base->foreign->end() && earlier.agent < known->second.size() &&
         earlier.clock <= known->second[earlier.agent];
}

Record record_now(const Thread& thread, Access kind, uint8_t bytes, const void* site) {
  return {thread.own, thread.block->serial, site, thread.id, bytes, kind};
}

SnapshotRef snapshot(Thread& thread) {
  ClockSum sum(thread.block->serial, thread.block->threads.size());
  sum.add(thread.base, thread.id, thread.own);
  ++thread.own;
  return std::make_shared<const Snapshot>(Snapshot{thread.block->serial, sum.take()});
}

void acquire(Thread& thread, const std::vector<SnapshotRef>& from) {
  if (from.empty()) return;
  ClockSum sum(thread.block->serial, thread.block->threads.size());
  sum.add(thread.base);
  for (const SnapshotRef& snapshot : from) sum.add(*snapshot);
  thread.base = sum.take();
}

void acquire(Thread& thread, const ClockRef& clock) {
  ClockSum sum(thread.block->serial, thread.block->threads.size());
  sum.add(thread.base);
  sum.add(clock);
  thread.base = sum.take();
}

void observe(const void* address, Order order, Scope scope) {
  const auto found = locations.find(reinterpret_cast<uintptr_t>(address));
  if (found == locations.end()) return;
  Thread& thread = *running;
  std::vector<SnapshotRef> readable;
  for (const SnapshotRef& snapshot : found->second.device) {
    if (scope == Scope::device || snapshot->block == thread.block->serial) readable.push_back(snapshot);
  }
  for (const SnapshotRef& snapshot : found->second.block) {
    if (snapshot->block == thread.block->serial) readable.push_back(snapshot);
  }
  if (order == Order::acquire || order == Order::acq_rel) return acquire(thread, readable);
  for (const SnapshotRef& snapshot : readable) {
    if (std::find(thread.acquired.begin(), thread.acquired.end(), snapshot) == thread.acquired.end()) {
      thread.acquired.push_back(snapshot);
    }
  }
}

void publish(const void* address, Order order, Scope scope, bool keeps_earlier) {
  Thread& thread = *running;
  const bool releases = order == Order::release || order == Order::acq_rel;
  const auto key = reinterpret_cast<uintptr_t>(address);
  if (!keeps_earlier) locations.erase(key);
  if (!releases && thread.released[0] == nullptr && thread.released[1] == nullptr) return;
  Location& location = locations[key];
  const SnapshotRef now = releases ? snapshot(thread) : nullptr;
  const SnapshotRef block = now ? now : thread.released[int(Scope::block)];
  const SnapshotRef device = now ? now : thread.released[int(Scope::device)];
  if (block != nullptr) put(location.block, block);
  if (device != nullptr && scope == Scope::device) put(location.device, device);
}

void fence(Scope scope) {
  Thread& thread = *running;
  std::vector<SnapshotRef> known, later;
  for (const SnapshotRef& snapshot : thread.acquired) {
    (scope == Scope::device || snapshot->block == thread.block->serial ? known : later).push_back(snapshot);
  }
  acquire(thread, known);
  thread.acquired = later;
  const SnapshotRef now = snapshot(thread);
  thread.released[int(Scope::block)] = now;
  if (scope == Scope::device) thread.released[int(Scope::device)] = now;
}

void forget_locations() { locations.clear(); }

}  // namespace moe::simt

// SPDX-License-Identifier: Apache-2.0
// mbarrier objects. The state lives here, not in the 8 bytes of shared memory, which no plain access may touch.
#include "report.h"

namespace moe::simt {
namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;
constexpr uint32_t kBytes = 8;

uint32_t offset_of(uint32_t bar, const char* what, const void* site) {
  running->site = site;
  shared_pointer(bar, kBytes, kBytes, what);
  return shared_offset(bar);
}

MBarrier& find(uint32_t bar, const char* what, const void* site) {
  return mbarrier_at(*running->block, offset_of(bar, what, site), what, site);
}

void end_phase_if_complete(Block& block, MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  ++machine.progress;
  barrier.pending = barrier.count;
  barrier.done = barrier.arrivals->take();
  barrier.arrivals = std::make_unique<ClockSum>(block.serial, block.threads.size());
  std::vector<Thread*> waiting;
  waiting.swap(barrier.waiting);
  for (Thread* thread : waiting) make_ready(*thread);
}

void count_arrival(MBarrier& barrier, uint32_t offset, const void* site) {
  if (barrier.pending == 0) {
    fault("mbarrier", format("more than the %u arrivals of a phase at shared +0x%x", barrier.count, offset), site);
  }
  --barrier.pending;
}

void arrive(MBarrier& barrier, uint32_t bar, const void* site) {
  count_arrival(barrier, shared_offset(bar), site);
  barrier.arrivals->add(running->base, running->id, running->own);
  ++running->own;
  end_phase_if_complete(*running->block, barrier);
}

bool phase_ended(const MBarrier& barrier, uint32_t parity) { return (barrier.phase & 1) != (parity & 1); }

}  // namespace

MBarrier& mbarrier_at(Block& block, uint32_t offset, const char* what, const void* site) {
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end()) {
    fault("mbarrier", format("%s on shared +0x%x, which was not initialised", what, offset), site);
  }
  const Record init = found->second.init;
  if (!ordered(*running, init)) {
    fault("mbarrier",
          format("%s on shared +0x%x is not ordered after its mbarrier.init by %s, at %s", what, offset,
                 who(init.block, init.agent).c_str(), source_line(init.site).c_str()),
          site);
  }
  return found->second;
}

void complete_bytes(Block& block, uint32_t offset, uint32_t bytes, uint16_t agent, uint32_t clock, const void* site) {
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end()) {
    return note_fault("mbarrier", format("a TMA load lands after mbarrier.inval of shared +0x%x", offset), site);
  }
  MBarrier& barrier = found->second;
  barrier.bytes -= bytes;
  barrier.arrivals->add(agent, clock);
  end_phase_if_complete(block, barrier);
}

void mbarrier_arrive_remote(uint32_t bar, uint32_t cta) {
  const void* const site = MOE_SIMT_SITE;
  const uint32_t offset = offset_of(bar, "mbarrier.arrive.shared::cluster", site);
  Block& block = peer_block(cta, "mbarrier.arrive.shared::cluster", site);
  MBarrier& barrier = mbarrier_at(block, offset, "mbarrier.arrive.shared::cluster", site);
  note_remote(block, site);
  count_arrival(barrier, offset, site);
  barrier.arrivals->add(*snapshot(*running));
  end_phase_if_complete(block, barrier);
}

void mbarrier_init(uint32_t bar, uint32_t count) {
  const void* const site = MOE_SIMT_SITE;
  const uint32_t offset = offset_of(bar, "mbarrier.init", site);
  Block& block = *running->block;
  if (block.mbarriers.count(offset) != 0) {
    fault("mbarrier", format("mbarrier.init on shared +0x%x, which is one already", offset), site);
  }
  if (count == 0 || count > kMaxCount) fault("mbarrier", format("mbarrier.init with count %u", count), site);
  touch({block.shared + offset, kBytes, Access::write, site});
  MBarrier& barrier = block.mbarriers[offset];
  barrier.count = barrier.pending = count;
  barrier.arrivals = std::make_unique<ClockSum>(block.serial, block.threads.size());
  barrier.done = ClockSum(block.serial, block.threads.size()).take();
  barrier.init = record_now(*running, Access::write, 0xf, site);
}

void mbarrier_inval(uint32_t bar) {
  const void* const site = MOE_SIMT_SITE;
  const MBarrier& barrier = find(bar, "mbarrier.inval", site);
  if (!barrier.waiting.empty()) {
    fault("mbarrier", format("mbarrier.inval while %zu threads wait", barrier.waiting.size()), site);
  }
  running->block->mbarriers.erase(shared_offset(bar));
  touch({running->block->shared + shared_offset(bar), kBytes, Access::write, site});
}

void mbarrier_arrive(uint32_t bar) {
  const void* const site = MOE_SIMT_SITE;
  arrive(find(bar, "mbarrier.arrive", site), bar, site);
}

void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  const void* const site = MOE_SIMT_SITE;
  MBarrier& barrier = find(bar, "mbarrier.arrive.expect_tx", site);
  barrier.bytes += bytes;
  if (barrier.bytes > kMaxCount) fault("mbarrier", format("more than %u bytes in a phase", kMaxCount), site);
  arrive(barrier, bar, site);
}

bool mbarrier_test_wait_parity(uint32_t bar, uint32_t parity) {
  const void* const site = MOE_SIMT_SITE;
  const MBarrier& barrier = find(bar, "mbarrier.test_wait", site);
  if (phase_ended(barrier, parity)) {
    acquire(*running, barrier.done);
    return true;
  }
  polled(reinterpret_cast<uintptr_t>(running->block->shared) + shared_offset(bar), barrier.phase);
  return false;
}

void mbarrier_wait_parity(uint32_t bar, uint32_t parity) {
  const void* const site = MOE_SIMT_SITE;
  for (;;) {
    MBarrier& barrier = find(bar, "mbarrier.try_wait", site);
    if (phase_ended(barrier, parity)) return acquire(*running, barrier.done);
    barrier.waiting.push_back(running);
    wait_in("mbarrier.try_wait", shared_offset(bar));
  }
}

void cp_async_mbarrier_arrive_noinc(uint32_t bar) {
  const void* const site = MOE_SIMT_SITE;
  Thread& thread = *running;
  Block& block = *thread.block;
  find(bar, "cp.async.mbarrier.arrive", site);
  std::vector<CopyRef> before = thread.copies;
  for (const auto& group : thread.groups) before.insert(before.end(), group.begin(), group.end());
  const Record landed = record_now(thread, Access::write, 0xf, site);
  for (const CopyRef& copy : before) {
    if (copy->pledged.bytes == 0) copy->pledged = landed;
  }
  const SnapshotRef then = snapshot(thread);
  const uint32_t offset = shared_offset(bar);
  const auto finish = [&block, before, landed, then, offset, bar, site] {
    for (const CopyRef& copy : before) {
      if (copy->landed) continue;
      copy_now(block, *copy);
      copy->landed = true;
      for (uint32_t at = copy->shared; at < copy->shared + copy->bytes; at += 4) block.cells[at / 4].land(landed);
    }
    const auto found = block.mbarriers.find(offset);
    if (found == block.mbarriers.end()) return;
    MBarrier& barrier = found->second;
    if (barrier.pending == 0) {
      return note_fault("mbarrier",
                        format("more than the %u arrivals of a phase at shared +0x%x", barrier.count, offset), site);
    }
    --barrier.pending;
    barrier.arrivals->add(*then);
    end_phase_if_complete(block, barrier);
  };
  switch (machine.options.landing) {
    case Landing::early: return finish();
    case Landing::late: return machine.events.push_back({UINT64_MAX, &block, finish});
    case Landing::random: return machine.events.push_back({machine.step + machine.random.below(256), &block, finish});
  }
}

// The init record is published by whatever orders the threads of the block; the fence alone orders nothing.
void fence_mbarrier_init() {}

}  // namespace moe::simt

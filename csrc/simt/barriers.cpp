// SPDX-License-Identifier: Apache-2.0
// Barriers of a block: __syncthreads and its reducing forms, and the sixteen named barriers.
#include "report.h"

namespace moe::simt {
namespace {

constexpr int kBarriers = 16;

void release(Block& block, BlockBarrier& barrier) {
  const ClockRef all = barrier.sum->take();
  const int count = barrier.count;
  std::vector<Thread*> waiting;
  waiting.swap(barrier.waiting);
  barrier.arrived = barrier.count = 0;
  barrier.sum.reset();
  barrier.here.assign(block.threads.size(), false);
  ++machine.progress;
  ++machine.meetings;
  for (Thread* thread : waiting) {
    thread->meeting = machine.meetings;
    thread->base = all;
    ++thread->own;
    block.reduced[thread->id] = count;
    if (thread != running) make_ready(*thread);
  }
}

// Checks the arrival and counts it. `plain` is __syncthreads, which all threads must reach at the same line.
BlockBarrier& arrive(int id, int threads, bool plain, const void* site) {
  Thread& thread = *running;
  Block& block = *thread.block;
  thread.site = site;
  const int size = int(block.threads.size());
  if (id < 0 || id >= kBarriers) fault("barrier", format("there is no barrier %d", id), site);
  if (!plain && (threads <= 0 || threads % 32 != 0 || threads > (size + 31) / 32 * 32)) {
    fault("barrier", format("barrier %d for %d threads of a block of %d", id, threads, size), site);
  }
  BlockBarrier& barrier = block.barriers[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.site = site;
    barrier.plain = plain;
    barrier.here.assign(block.threads.size(), false);
    barrier.sum = std::make_unique<ClockSum>(block.serial, block.threads.size());
  } else if (barrier.expected != threads) {
    fault("barrier",
          format("barrier %d is used with %d and with %d threads, the latter at %s", id, threads, barrier.expected,
                 source_line(barrier.site).c_str()),
          site);
  } else if (plain && barrier.plain && !same_line(site, barrier.site)) {
    fault("barrier",
          "__syncthreads under divergence: others of the block are at the one at " + source_line(barrier.site), site);
  }
  if (barrier.here[thread.id]) {
    fault("barrier", format("arrives at barrier %d a second time before it is complete", id), site);
  }
  barrier.here[thread.id] = true;
  barrier.sum->add(thread.base, thread.id, thread.own);
  ++barrier.arrived;
  return barrier;
}

void arrive_and_wait(int id, int threads, bool plain, int count, const void* site) {
  BlockBarrier& barrier = arrive(id, threads, plain, site);
  barrier.count += count;
  barrier.waiting.push_back(running);
  if (barrier.arrived < barrier.expected) return wait_in(plain ? "__syncthreads" : "bar.sync", uint64_t(id));
  release(*running->block, barrier);
  yield();
}

}  // namespace

void block_barrier() { arrive_and_wait(0, int(running->block->threads.size()), true, 0, MOE_SIMT_SITE); }

int block_barrier_reduce(int predicate, Reduce reduce) {
  const int threads = int(running->block->threads.size());
  arrive_and_wait(0, threads, true, predicate != 0, MOE_SIMT_SITE);
  const int count = running->block->reduced[running->id];
  return reduce == Reduce::popc ? count : reduce == Reduce::all ? count == threads : count != 0;
}

void bar_sync(int id, int threads) { arrive_and_wait(id, threads, false, 0, MOE_SIMT_SITE); }

void bar_arrive(int id, int threads) {
  BlockBarrier& barrier = arrive(id, threads, false, MOE_SIMT_SITE);
  ++running->own;
  if (barrier.arrived == barrier.expected) release(*running->block, barrier);
}

}  // namespace moe::simt

// SPDX-License-Identifier: Apache-2.0
// Who runs next, when a grid is over, and what it means that nobody can run.
#include <algorithm>
#include <mutex>

#include "proxy.h"
#include "report.h"

namespace moe::simt {

Machine machine;
Thread* running = nullptr;

namespace {

constexpr int kPollsBeforeSleep = 3;
constexpr int kIdleRounds = 8;  // all pollers are woken this often without any progress: then nothing will come
constexpr size_t kLargestShared = 232448;
constexpr uint32_t kLargestCluster = 8;

std::mutex one_launch;
std::vector<Warp*> runnable;  // warps with a ready thread

// ---------------------------------------------------------------- blocks come and go

void enter_kernel() {
  machine.body(machine.arguments);
  running->state = State::exited;
  running->fiber.give_way(true);
}

void reset_thread(Thread& thread, Block& block, uint16_t id, const ClockRef& base) {
  const dim3 size = machine.config.block;
  thread.block = &block;
  thread.id = id;
  thread.index = {id % size.x, id / size.x % size.y, id / (size.x * size.y)};
  thread.base = base;
  thread.own = 1;
  thread.released[0] = thread.released[1] = nullptr;
  thread.acquired.clear();
  thread.copies.clear();
  thread.groups.clear();
  thread.registers.clear();
  thread.products.clear();
  thread.product_groups.clear();
  thread.stores = {};
  thread.store_groups.clear();
  for (int shared = 0; shared < 2; ++shared) {
    thread.proxy_fences[shared].clear();
    thread.proxy_fenced[shared].reset();
  }
  thread.wgmma_fenced = thread.cluster_arrived = false;
  thread.grid_waited = thread.in_hook = false;
  thread.polled_address = thread.polls = 0, thread.meeting = 0;
  thread.site = nullptr;
  thread.fiber.start(enter_kernel);
}

void reset_shared_memory(Block& block) {
  const uint32_t bytes = machine.config.shared_bytes;
  block.arena.assign(bytes + 2 * kGuardBytes + 256, 0xff);  // reads as NaN, or as -1
  const auto begin = reinterpret_cast<uintptr_t>(block.arena.data()) + kGuardBytes;
  block.shared = reinterpret_cast<uint8_t*>((begin + 127) / 256 * 256 + 128);  // 128-byte aligned, never 256
  block.cells.clear();
  block.cells.resize((bytes + 3) / 4);
  block.chunks.clear();
  block.chunks.resize((bytes + kChunkBytes - 1) / kChunkBytes);
}

// The blocks of a cluster start one after another.
void join_cluster(Block& block) {
  block.rank = block.index.x % machine.config.cluster;
  block.cluster = block.rank == 0 ? std::make_shared<Cluster>() : machine.resident.back()->cluster;
  Cluster& cluster = *block.cluster;
  cluster.blocks.push_back(&block);
  cluster.threads += block.alive;
  ++cluster.alive;
  cluster.sums.push_back(std::make_unique<ClockSum>(block.serial, block.alive));
  cluster.done.emplace_back();
}

void start_block(size_t position) {
  std::unique_ptr<Block> block;
  if (machine.spare.empty()) {
    block = std::make_unique<Block>();
  } else {
    block = std::move(machine.spare.back());
    machine.spare.pop_back();
  }
  const uint32_t threads = machine.block_threads(), linear = machine.order[position];
  const dim3 grid = machine.config.grid;
  block->serial = machine.first_serial + uint32_t(position);
  block->index = {linear % grid.x, linear / grid.x % grid.y, linear / (grid.x * grid.y)};
  block->alive = threads;
  block->barriers.clear();
  block->mbarriers.clear();
  block->reduced.assign(threads, 0);
  reset_shared_memory(*block);
  while (block->threads.size() > threads) block->threads.pop_back();
  while (block->threads.size() < threads) block->threads.emplace_back();
  block->warps.clear();
  block->warps.resize((threads + 31) / 32);
  for (Warp& warp : block->warps) {
    warp.block = block.get();
    warp.priority = machine.random.next();
  }
  block->agents.clear();
  block->remote.clear();
  block->warpgroups.clear();
  block->warpgroups.resize((threads + 127) / 128);
  for (Warpgroup& warpgroup : block->warpgroups) warpgroup.registers = launch_registers(threads);
  join_cluster(*block);
  const ClockRef nothing = ClockSum(block->serial, threads).take();
  for (uint32_t id = 0; id < threads; ++id) {
    reset_thread(block->threads[id], *block, uint16_t(id), nothing);
    make_ready(block->threads[id]);
  }
  machine.resident.push_back(std::move(block));
}

void land_event(size_t i) {
  const auto land = std::move(machine.events[i].land);
  machine.events.erase(machine.events.begin() + long(i));
  land();
}

void check_block_end(const Block& block) {
  for (const Thread& thread : block.threads) {
    const auto flying = [](const CopyRef& copy) { return !copy->landed; };
    const Copy* left = nullptr;
    for (const CopyRef& copy : thread.copies) left = flying(copy) ? copy.get() : left;
    for (const auto& group : thread.groups) {
      for (const CopyRef& copy : group) left = flying(copy) ? copy.get() : left;
    }
    if (left != nullptr) {
      note_fault("async", "the block ended with a cp.async of " + who(thread) + " that nobody waited for", left->site);
    }
  }
  const auto waited = [](const Thread& thread) { return thread.grid_waited; };
  if (machine.config.programmatic && std::none_of(block.threads.begin(), block.threads.end(), waited)) {
    note_fault("grid",
               format("block (%u,%u,%u) of a dependent launch ended without griddepcontrol.wait: the kernel after this "
                      "one could overtake the one before",
                      block.index.x, block.index.y, block.index.z),
               block.threads.front().site);
  }
  for (const auto& [id, barrier] : block.barriers) {
    if (barrier.arrived != 0) {
      note_fault(
          "barrier",
          format("the block ended with %d of %d threads arrived at barrier %d", barrier.arrived, barrier.expected, id),
          barrier.site);
    }
  }
}

void release_block(Block* block) {
  const auto at = std::find_if(machine.resident.begin(), machine.resident.end(),
                               [&](const auto& resident) { return resident.get() == block; });
  machine.spare.push_back(std::move(*at));
  machine.resident.erase(at);
}

// A block of a cluster stays for as long as others may wrongly reach for it.
void end_block(Block* block) {
  check_async_end(*block);
  for (size_t i = 0; i < machine.events.size();) {
    if (machine.events[i].block == block) {
      land_event(i);
    } else {
      ++i;
    }
  }
  check_block_end(*block);
  check_cluster_end(*block);
  ++machine.progress;
  const std::shared_ptr<Cluster> cluster = block->cluster;
  if (--cluster->alive != 0) return;
  for (Block* ended : cluster->blocks) release_block(ended);
}

// ---------------------------------------------------------------- who runs next

Thread* next_thread() {
  size_t best = 0;
  switch (machine.options.schedule) {
    case Schedule::in_order:
      for (size_t i = 1; i < runnable.size(); ++i) {
        const Warp &a = *runnable[i], &b = *runnable[best];
        if (a.block->serial != b.block->serial ? a.block->serial < b.block->serial : &a < &b) best = i;
      }
      break;
    case Schedule::random: best = machine.random.below(runnable.size()); break;
    case Schedule::one_warp_ahead:
      for (size_t i = 1; i < runnable.size(); ++i) {
        if (runnable[i]->priority > runnable[best]->priority) best = i;
      }
      if (machine.random.below(512) == 0) runnable[best]->priority = machine.random.next();
      break;
  }
  Warp& warp = *runnable[best];
  if (machine.options.schedule == Schedule::random) {
    std::swap(warp.ready.front(), warp.ready[machine.random.below(warp.ready.size())]);
  }
  Thread* const thread = warp.ready.front();
  warp.ready.pop_front();
  if (warp.ready.empty()) {
    runnable[best] = runnable.back();
    runnable.pop_back();
  }
  return thread;
}

void run(Thread& thread) {
  ++machine.step;
  thread.quiet_accesses = 0;
  running = &thread;
  thread.fiber.resume();
  running = nullptr;
  if (!thread.fiber.intact()) note_fault("stack", who(thread) + " overran its stack", thread.site);
  if (thread.state != State::exited) return;
  ++machine.progress;
  Block* const block = thread.block;
  leave_warpgroup(thread);
  leave_cluster(thread);
  if (--block->alive == 0) end_block(block);
}

void land_due_events(bool all_wait) {
  for (size_t i = 0; i < machine.events.size();) {
    if (!all_wait && machine.events[i].due > machine.step) {
      ++i;
      continue;
    }
    land_event(i);
    if (all_wait) return;  // one, then see who can run
  }
}

// ---------------------------------------------------------------- nobody can run

void wake_all_pollers() {
  std::vector<Thread*> pollers;
  pollers.swap(machine.polling);
  for (Thread* poller : pollers) {
    poller->polls = kPollsBeforeSleep - 1;  // one more look
    make_ready(*poller);
  }
}

// Returns false if the grid is stuck.
bool wake_somebody(int& idle_rounds, uint64_t& last_progress) {
  if (!machine.events.empty()) {
    land_due_events(true);
    return true;
  }
  if (machine.polling.empty()) return false;
  idle_rounds = machine.progress == last_progress ? idle_rounds + 1 : 0;
  last_progress = machine.progress;
  if (idle_rounds >= kIdleRounds) return false;
  wake_all_pollers();
  return true;
}

// ---------------------------------------------------------------- a launch

const char* bad_shape() {
  const uint32_t threads = machine.block_threads();
  if (threads == 0 || threads > 1024) return "a block has 1 to 1024 threads";
  if (machine.config.grid.y > 65535 || machine.config.grid.z > 65535) return "grid.y and grid.z are at most 65535";
  if (machine.config.shared_bytes > kLargestShared) return "a block has at most 227 KiB of dynamic shared memory";
  const uint32_t cluster = machine.config.cluster;
  if (cluster == 0 || cluster > kLargestCluster) return "a cluster has 1 to 8 blocks";
  if (machine.config.grid.x % cluster != 0) return "the grid is no multiple of the cluster";
  return nullptr;
}

// Clusters in random order, their blocks side by side.
void order_blocks() {
  const dim3 grid = machine.config.grid;
  machine.first_serial += uint32_t(machine.order.size());
  machine.order.resize(size_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < machine.order.size(); ++i) machine.order[i] = uint32_t(i);
  if (machine.options.schedule == Schedule::in_order) return;
  const size_t cluster = machine.config.cluster;
  for (size_t i = machine.order.size() / cluster; i > 1; --i) {
    const auto last = machine.order.begin() + long((i - 1) * cluster);
    std::swap_ranges(last, last + long(cluster), machine.order.begin() + long(machine.random.below(i) * cluster));
  }
}

// Which earlier launches may still run when this one starts, and after its griddepcontrol.wait. A predecessor that did
// not wait itself may end before its own predecessors.
void order_after_predecessor() {
  const Unfinished before = {machine.first_serial, machine.first_serial + uint32_t(machine.order.size())};
  if (!machine.config.programmatic) {
    machine.unfinished_at_start.clear();
    machine.unfinished_after_wait.clear();
  } else {
    machine.unfinished_after_wait =
        machine.anyone_grid_waited ? std::vector<Unfinished>() : machine.unfinished_at_start;
    machine.unfinished_at_start.push_back(before);
  }
  machine.anyone_grid_waited = false;
  begin_global_epoch(machine.config.programmatic);
}

void run_grid() {
  const bool in_order = machine.options.schedule == Schedule::in_order;
  const size_t window = machine.config.cooperative ? machine.order.size() : in_order ? 1 : 1 + machine.random.below(4);
  int idle_rounds = 0;
  uint64_t last_progress = 0;
  while (!machine.failed) {
    while (machine.resident.size() < window && machine.started < machine.order.size()) {
      for (uint32_t i = 0; i < machine.config.cluster; ++i) start_block(machine.started++);
    }
    if (machine.resident.empty()) return;
    land_due_events(false);
    if (!runnable.empty()) {
      run(*next_thread());
    } else if (!wake_somebody(idle_rounds, last_progress)) {
      report_deadlock();
    }
  }
}

void forget_grid() {
  for (auto& block : machine.resident) machine.spare.push_back(std::move(block));
  machine.resident.clear();
  machine.polling.clear();
  machine.events.clear();
  runnable.clear();
  machine.arguments = nullptr;
  machine.arguments_bytes = 0;
}

}  // namespace

cudaError_t launch(const LaunchConfig& config, void (*body)(const void*), const void* arguments,
                   size_t arguments_bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  machine.options = options_from_environment();
  machine.config = config;
  machine.body = body;
  machine.arguments = arguments;
  machine.arguments_bytes = arguments_bytes;
  machine.random = Random(machine.options.seed);
  machine.step = machine.progress = machine.started = 0;
  machine.failed = false;
  machine.report.clear();
  if (const char* const wrong = bad_shape()) {
    note_fault("launch", wrong, nullptr);
    return cudaErrorInvalidConfiguration;
  }
  machine.shared_base = 1024 + 128 * uint32_t(1 + 2 * machine.random.below(4));  // as badly aligned as is allowed
  order_after_predecessor();
  order_blocks();
  run_grid();
  forget_grid();
  return machine.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

void make_ready(Thread& thread) {
  thread.state = State::ready;
  Warp& warp = thread.block->warps[thread.warp()];
  if (warp.ready.empty()) runnable.push_back(&warp);
  warp.ready.push_back(&thread);
}

void wait_in(const char* what, uint64_t on) {
  running->state = State::waiting;
  running->waits_in = what;
  running->waits_on = on;
  running->fiber.give_way();
}

void yield() {
  if (machine.options.schedule == Schedule::in_order) return;
  make_ready(*running);
  running->fiber.give_way();
}

void polled(uint64_t address, uint64_t value) {
  Thread& thread = *running;
  if (thread.polled_address != address || thread.polled_value != value) {
    thread.polled_address = address;
    thread.polled_value = value;
    thread.polls = 0;
    return;
  }
  if (++thread.polls < kPollsBeforeSleep) return yield();
  thread.state = State::polling;
  machine.polling.push_back(&thread);
  thread.fiber.give_way();
}

void wake_pollers(uint64_t address, uint32_t bytes) {
  ++machine.progress;
  for (size_t i = 0; i < machine.polling.size();) {
    Thread* const poller = machine.polling[i];
    if (poller->polled_address + 8 <= address || address + bytes <= poller->polled_address) {
      ++i;
      continue;
    }
    machine.polling.erase(machine.polling.begin() + long(i));
    poller->polls = 0;
    make_ready(*poller);
  }
}

}  // namespace moe::simt

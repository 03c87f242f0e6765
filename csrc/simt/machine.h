// SPDX-License-Identifier: Apache-2.0
// The state of a launch, shared by the parts of the emulator: threads, warps, blocks, and the one machine.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "fiber.h"
#include "host_api.h"
#include "shadow.h"

namespace moe::simt {

// ---------------------------------------------------------------- options, all drawn from one seed
enum class Schedule { in_order, random, one_warp_ahead };
enum class Landing { early, late, random };  // of asynchronous copies
struct Options {
  uint64_t seed = 0;
  Schedule schedule = Schedule::random;
  Landing landing = Landing::late;
};
Options options_from_environment();

class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }

 private:
  uint64_t state_;
};

// ---------------------------------------------------------------- threads
struct Block;

/// One cp.async. Its bytes are in flight from the issue until its thread has waited for it.
struct Copy {
  uint32_t shared;  // offset
  const void* global;
  uint32_t bytes, read;
  const void* site;
  bool copied = false, landed = false;
  Record pledged{};  // what its landing counts as, if an mbarrier was told of it first
};
using CopyRef = std::shared_ptr<Copy>;

/// Local memory of a thread that stands for registers of wgmma.
struct Registers {
  uintptr_t begin, end;
  int flying = 0;      // products that have not been waited for
  bool fenced = true;  // not touched by anything else since the last wgmma.fence
  const void* site;    // of the last product
};
/// A product of a warpgroup, and a bulk store: see wgmma.cpp and tma.cpp.
struct MatrixProduct;
using MatrixProductRef = std::shared_ptr<MatrixProduct>;
struct BulkStore;
/// A bulk group: its stores while they may still fly, and what the thread knows once it has waited.
struct BulkGroup {
  std::vector<std::shared_ptr<BulkStore>> stores;
  uint32_t read_clock = 0, write_clock = 0;
  bool read = false;  // waited for with .read
};

enum class State : uint8_t { ready, waiting, polling, exited };

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint3 index{};
  uint16_t id = 0;  // in the block
  State state = State::ready;
  const char* waits_in = "";  // what it waits in, and for which barrier, mask or address
  uint64_t waits_on = 0;
  const void* site = nullptr;  // where in the kernel it last entered the emulator

  ClockRef base;                      // what it knows of others
  uint32_t own = 1;                   // its own count, ahead of base
  SnapshotRef released[2];            // by scope: what its last fence lets a relaxed store publish
  std::vector<SnapshotRef> acquired;  // what relaxed loads have read and a fence will make known

  std::vector<CopyRef> copies;              // issued, not committed
  std::deque<std::vector<CopyRef>> groups;  // committed, not waited for
  std::vector<Registers> registers;
  std::vector<MatrixProductRef> products;                    // issued, not committed
  std::deque<std::vector<MatrixProductRef>> product_groups;  // committed, not waited for
  bool wgmma_fenced = false;                                 // ever
  BulkGroup stores;                                          // issued, not committed
  std::deque<BulkGroup> store_groups;                        // committed, not waited for
  std::vector<uint32_t> proxy_fences[2];                     // own count at each fence, of global and of shared memory
  ClockRef proxy_fenced[2];                                  // what it knew at the last one
  uint32_t cluster_phase = 0;                                // of the cluster's barrier, at which it has arrived
  bool cluster_arrived = false;
  bool in_hook = false;
  bool grid_waited = false;  // griddepcontrol.wait
  uint64_t meeting = 0;      // the last collective or barrier that it took part in; the same for all who did
  uint64_t polled_address = 0, polled_value = 0;
  int polls = 0;
  uint32_t quiet_accesses = 0;  // since it last gave way

  uint32_t warp() const { return id / 32u; }
  uint32_t lane() const { return id % 32u; }
};

// ---------------------------------------------------------------- blocks
/// Lanes of a warp that have met in a collective, until all of its mask are there.
struct Meeting {
  const char* name;
  uint32_t mask, arrived;
  void* arguments[32];
};
struct Warp {
  Block* block = nullptr;
  std::deque<Thread*> ready;
  std::vector<Meeting> meetings;
  uint64_t priority = 0;
};

struct BlockBarrier {
  int expected = 0, arrived = 0;  // threads
  const void* site = nullptr;     // of the first arrival
  std::vector<Thread*> waiting;
  std::unique_ptr<ClockSum> sum;
  int count = 0;           // predicates that were true, for the reducing forms
  bool plain = false;      // __syncthreads, not bar.sync
  std::vector<bool> here;  // which threads have arrived
};

/// What accesses shared memory besides threads: see proxy.h.
enum class AgentKind : uint8_t { wgmma, load, store_read, store_write };
struct Agent {
  AgentKind kind;
  uint32_t of;  // warpgroup, offset of the mbarrier, thread, thread
  uint32_t clock = 0;
  uint64_t due = 0;  // step at which its last operation lands: they land in order
  const void* site = nullptr;
};

/// 128 threads on their way into a collective, the products that fly and the registers a thread has.
struct Warpgroup {
  const char* name = nullptr;
  const void* site = nullptr;
  uint32_t arrived = 0;
  void* arguments[128];
  bool here[128];
  std::deque<MatrixProductRef> flying;
  uint32_t registers = 0;
  std::vector<Thread*> waiting;  // for registers
};

struct Block;
/// Blocks that run together and reach each other's shared memory.
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  uint32_t alive = 0;          // blocks
  uint32_t threads = 0, arrived = 0, phase = 0;
  std::vector<std::unique_ptr<ClockSum>> sums;  // by rank, of the arrivals
  std::vector<ClockRef> done;                   // by rank, of the phase that ended last
  std::vector<Thread*> waiting;
};

struct MBarrier {
  uint32_t count, pending;
  int64_t bytes = 0;  // of asynchronous copies still expected in this phase
  uint32_t phase = 0;
  std::unique_ptr<ClockSum> arrivals;
  ClockRef done;  // of the phase that ended last
  Record init;
  std::vector<Thread*> waiting;
};

struct Block {
  uint32_t serial = 0;  // unique over launches
  uint3 index{};
  std::deque<Thread> threads;
  std::vector<Warp> warps;
  uint32_t alive = 0;
  std::vector<uint8_t> arena;  // guard, dynamic shared memory, guard
  uint8_t* shared = nullptr;
  std::vector<Cell> cells;    // of shared memory
  std::vector<Chunk> chunks;  // of the same
  std::map<int, BlockBarrier> barriers;
  std::map<uint32_t, MBarrier> mbarriers;  // by shared offset
  std::vector<int> reduced;                // result of the last reducing barrier, one a thread
  std::vector<Agent> agents;               // behind the threads, in the clocks
  std::vector<Warpgroup> warpgroups;
  std::shared_ptr<Cluster> cluster;
  uint32_t rank = 0;           // in the cluster
  std::vector<Record> remote;  // the last access of each thread of other blocks
};

constexpr uint32_t kGuardBytes = 4096;  // around shared memory and around cudaMalloc

// ---------------------------------------------------------------- the machine
/// A launch that may not have ended when a programmatic successor starts.
struct Unfinished { uint32_t first_serial, end_serial; };

struct Event {  // something asynchronous, due at a step, or when all threads wait
  uint64_t due;
  Block* block;
  std::function<void()> land;
};

struct Machine {
  Options options;
  LaunchConfig config{};
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  size_t arguments_bytes = 0;

  Random random;
  uint64_t step = 0;      // context switches of this launch
  uint64_t progress = 0;  // counts what a polling thread may be waiting for
  uint64_t meetings = 0;  // of lanes in collectives, of threads at barriers
  std::vector<std::unique_ptr<Block>> resident, spare;
  std::vector<uint32_t> order;  // of the blocks, by position; serial = first_serial + position
  size_t started = 0;
  uint32_t first_serial = 1;
  uint32_t shared_base = 0;  // of the shared window
  std::vector<Thread*> polling;
  std::vector<Event> events;

  std::vector<Unfinished> unfinished_at_start, unfinished_after_wait;  // see griddepcontrol_wait
  bool anyone_grid_waited = false;

  bool failed = false;
  std::string report;  // of the last fault, kept until the next launch

  uint32_t block_threads() const { return config.block.x * config.block.y * config.block.z; }
};
extern Machine machine;
extern Thread* running;  // null outside kernels

// ---------------------------------------------------------------- schedule.cpp
void make_ready(Thread& thread);
/// Gives way until somebody calls make_ready on this thread.
void wait_in(const char* what, uint64_t on);
/// Gives way and stays ready. In order, nobody gives way for fairness alone.
void yield();
/// A load of a flag returned this: a thread that keeps reading the same value sleeps until the flag is written.
void polled(uint64_t address, uint64_t value);
void wake_pollers(uint64_t address, uint32_t bytes);

// ---------------------------------------------------------------- deadlock.cpp
void report_deadlock();

// ---------------------------------------------------------------- memory.cpp
struct Touch {
  const void* p;
  uint32_t bytes;
  Access kind;
  const void* site;
  bool read_only = false;  // ld.global.nc
  bool aligned = true;     // must be a multiple of its size
  bool is_store = false;   // an atomic that does not read
  bool is_box = false;     // TMA: what nobody has written may be copied along, as rows that no expert owns are
  bool overwrites() const { return kind == Access::write || is_store; }
};
/// Bounds, alignment, race and audit of one access by the running thread.
void touch(const Touch& access);
/// Whether the kernels were compiled with the calls of hooks.cpp. Without them plain stores go unseen, so there is
/// nothing to say of races or of memory that nobody wrote: bounds, deadlocks and misuse remain.
extern bool hooked;
/// Race check of shared memory on behalf of a lane that takes part in a tile instruction.
void touch_shared_as(Thread& thread, const Touch& access);
/// An access by the running thread of the shared memory of a block of its cluster.
void touch_shared_of(Block& block, const Touch& access);
/// Host pointer of a shared-window address; a fault if [address, address + bytes) is not in this block's memory.
uint8_t* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);
uint32_t shared_offset(uint32_t address);
void begin_global_epoch(bool programmatic);

// ---------------------------------------------------------------- buffers.cpp
/// The host, or a copy, has written [p, p + bytes).
void mark_written(const void* p, size_t bytes);
std::string name_of_address(uintptr_t address);
const char* verb(Access kind);
/// Faults unless it lies in registered memory that holds values. True if it lies in the module's constants or the
/// kernel's parameters: then there is nothing to race.
bool check_bounds(const Touch& access, uintptr_t address);

/// The race check alone, for an asynchronous read that may happen until now.
void recheck_global_read(const Thread& thread, const void* p, uint32_t bytes, const void* site);

// ---------------------------------------------------------------- order.cpp: what a thread knows of others
bool ordered(const Thread& thread, const Record& earlier);
Record record_now(const Thread& thread, Access kind, uint8_t bytes, const void* site);
/// All that the thread has done and knows, for others to acquire; what it does next is not part of it.
SnapshotRef snapshot(Thread& thread);
void acquire(Thread& thread, const std::vector<SnapshotRef>& from);
void acquire(Thread& thread, const ClockRef& clock);
/// An atomic read-modify-write, load or store of this order has read from, or written to, a location.
void observe(const void* location, Order order, Scope scope);
void publish(const void* location, Order order, Scope scope, bool keeps_earlier);
void forget_locations();

// ---------------------------------------------------------------- audit.cpp
enum class Space : uint8_t { shared, global };
void audit(const void* site, Space space, Access kind, uint64_t address, uint32_t bytes);
extern bool auditing;

// ---------------------------------------------------------------- async.cpp, mbarrier.cpp
void land(Thread& owner, Copy& copy);
void copy_now(Block& block, Copy& copy);
/// The barrier at an offset of a block that the running thread may use now; a fault if there is none.
MBarrier& mbarrier_at(Block& block, uint32_t offset, const char* what, const void* site);
/// `bytes` of a copy by `agent` have landed, up to its operation `clock`.
void complete_bytes(Block& block, uint32_t offset, uint32_t bytes, uint16_t agent, uint32_t clock, const void* site);

// ---------------------------------------------------------------- warpgroup.cpp, cluster.cpp
/// An ordinary access of local memory: of registers that a product needs?
void touch_registers(Thread& thread, uintptr_t address, uint32_t bytes, Access kind, const void* site);
/// Registers of a thread at launch, which are the block's pool together.
uint32_t launch_registers(uint32_t threads);
/// Checks and follow-ups of a thread's exit.
void leave_warpgroup(Thread& thread);
void leave_cluster(Thread& thread);
/// A block of the running thread's cluster that has not ended; a fault if there is none.
Block& peer_block(uint32_t rank, const char* what, const void* site);
/// The block and the offset that an address of the shared window, or one from mapa, names.
Block& block_of_address(uint32_t address, const char* what, const void* site);
uint32_t offset_in_block(uint32_t address);
/// The running thread accesses memory of another block, which must not end before it knows.
void note_remote(Block& target, const void* site);
void check_cluster_end(const Block& block);

}  // namespace moe::simt

/// The place in the kernel that called this function of the emulator.
#define MOE_SIMT_SITE __builtin_return_address(0)

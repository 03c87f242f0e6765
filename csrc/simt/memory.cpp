// SPDX-License-Identifier: Apache-2.0
// Every access of a kernel comes through here: which memory is it, is it inside and aligned, was it written, does it
// race?
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "proxy.h"
#include "report.h"

namespace moe::simt {
namespace {

constexpr uint32_t kRunaway = 100 * 1000 * 1000;  // accesses without giving way
constexpr uintptr_t kPageBytes = 4096;

struct Page { Cell cells[kPageBytes / 4]; };
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page_number = 0;
Page* last_page = nullptr;

// ---------------------------------------------------------------- cells
class RunningObserver final : public Observer {
 public:
  explicit RunningObserver(const Thread& thread) : thread_(thread) {}
  bool ordered(const Record& earlier) const override { return simt::ordered(thread_, earlier); }

 private:
  const Thread& thread_;
};

Cell& global_cell(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  if (last_page == nullptr || number != last_page_number) {
    auto& slot = pages[number];
    if (slot == nullptr) slot = std::make_unique<Page>();
    last_page = slot.get();
    last_page_number = number;
  }
  return last_page->cells[address % kPageBytes / 4];
}

[[noreturn]] void report_race(const Record& now, const Record& earlier, uint32_t bytes, uintptr_t address) {
  std::string text = format("%s of %u bytes at %s is not ordered with the %s by %s, at %s", verb(now.kind), bytes,
                            name_of_address(address).c_str(), verb(earlier.kind),
                            who(earlier.block, earlier.agent).c_str(), source_line(earlier.site).c_str());
  if (earlier.block < machine.first_serial) text += ": it may still run until griddepcontrol.wait";
  fault("race", text, now.site);
}

void check_in_flight(const Cell& cell, const Touch& access) {
  if (!cell.in_flight) return;
  const Record& copy = cell.last_write();
  fault("in flight",
        format("%s of %u bytes at %s, into which the cp.async of %s, at %s, has not been waited for", verb(access.kind),
               access.bytes, name_of_address(reinterpret_cast<uintptr_t>(access.p)).c_str(),
               who(copy.block, copy.agent).c_str(), source_line(copy.site).c_str()),
        access.site);
}

// A write through the generic proxy reaches TMA and wgmma through a fence only.
void check_proxy(const Issuer& issuer, const Cell& cell, const Touch& access, uint8_t mask, bool shared) {
  const Record& write = cell.last_write();
  if ((write.bytes & mask) == 0 || write.agent >= machine.block_threads() || write.block < machine.first_serial) return;
  if (!issuer.ordered(write) || issuer.fenced(write, shared)) return;  // not even ordered: a race, found below
  fault("proxy",
        format("%s of %u bytes at %s through the asynchronous proxy: between the write by %s, at %s, and this there is "
               "no fence.proxy.async",
               verb(access.kind), access.bytes, name_of_address(reinterpret_cast<uintptr_t>(access.p)).c_str(),
               who(write.block, write.agent).c_str(), source_line(write.site).c_str()),
        access.site);
}

// Who makes an access; an asynchronous one is checked for its issuers.
struct Actor {
  Record record;
  const Observer& observer;
  const Issuer* issuer = nullptr;

  Record now(Access kind, uint8_t mask) const {
    Record r = record;
    r.kind = kind, r.bytes = mask;
    return r;
  }
};

[[noreturn]] void report_unwritten(const Touch& access, uint32_t offset) {
  fault("uninitialised", format("%s of shared +0x%x, which nobody has written", verb(access.kind), offset),
        access.site);
}

// What threads have done to a chunk that TMA or wgmma accesses, 4 bytes at a time.
void check_cells(Block& block, const Actor& actor, const Touch& access, uint32_t chunk) {
  for (uint32_t at = chunk; at < chunk + kChunkBytes; at += 4) {
    Cell& cell = block.cells[at / 4];
    check_in_flight(cell, access);
    if (!access.overwrites() && cell.written != 0xf && !block.chunks[chunk / kChunkBytes].written) {
      report_unwritten(access, at);
    }
    check_proxy(*actor.issuer, cell, access, 0xf, true);
    Record earlier;
    const Record now = actor.now(access.kind, 0xf);
    if (cell.find_conflict(now, actor.observer, earlier)) {
      report_race(now, earlier, access.bytes, reinterpret_cast<uintptr_t>(access.p));
    }
    if (access.overwrites()) cell.forget();
  }
}

// ---------------------------------------------------------------- the two memories
void touch_chunks(Block& block, const Actor& actor, const Touch& access, uint32_t offset) {
  for (uint32_t at = offset; at < offset + access.bytes; at += kChunkBytes) {
    Chunk& chunk = block.chunks[at / kChunkBytes];
    if (chunk.by_threads) check_cells(block, actor, access, at);
    else if (!access.overwrites() && !chunk.written) report_unwritten(access, at);
    if (access.overwrites()) chunk.by_threads = false;
    const Record now = actor.now(access.kind, 0xf);
    Record earlier;
    if (!chunk.access(now, actor.observer, earlier)) {
      report_race(now, earlier, access.bytes, reinterpret_cast<uintptr_t>(access.p));
    }
  }
}

void touch_shared(Block& block, const Actor& actor, const Touch& access, uint32_t offset) {
  if (uint64_t(offset) + access.bytes > machine.config.shared_bytes) {  // also when it begins in the guard before
    fault("bounds",
          format("%s of %u bytes at byte %d of the block's %u bytes of shared memory", verb(access.kind), access.bytes,
                 int(offset), machine.config.shared_bytes),
          access.site);
  }
  if (!block.mbarriers.empty()) {
    const auto next = block.mbarriers.lower_bound(offset + access.bytes);
    if (next != block.mbarriers.begin() && std::prev(next)->first + 8 > offset) {
      fault("mbarrier", format("plain %s of an mbarrier object at shared +0x%x", verb(access.kind), offset),
            access.site);
    }
  }
  if (actor.issuer != nullptr) {
    if (hooked) touch_chunks(block, actor, access, offset);
    return;
  }
  for_cells(offset, access.bytes, [&](uintptr_t at, uint8_t mask) {
    Cell& cell = block.cells[at / 4];
    Chunk& chunk = block.chunks[at / kChunkBytes];
    check_in_flight(cell, access);
    if (!hooked) return;
    if (!access.overwrites() && (mask & ~cell.written) != 0 && !chunk.written) report_unwritten(access, offset);
    if (writes(access.kind)) cell.written |= mask;
    chunk.by_threads = true;
    const Record now = actor.now(access.kind, mask);
    Record earlier;
    if (chunk.find_conflict(now, actor.observer, earlier) || !cell.access(now, actor.observer, earlier)) {
      report_race(now, earlier, access.bytes, reinterpret_cast<uintptr_t>(access.p));
    }
  });
}

void touch_global(const Actor& actor, const Touch& access, uintptr_t address) {
  if (check_bounds(access, address)) return;
  if (auditing && actor.issuer == nullptr) audit(access.site, Space::global, access.kind, address, access.bytes);
  if (!hooked) return;
  for_cells(address, access.bytes, [&](uintptr_t at, uint8_t mask) {
    Cell& cell = global_cell(at);
    const Record& write = cell.last_write();
    if (access.read_only && (write.bytes & mask) != 0 && write.block >= machine.first_serial) {
      fault("read-only",
            format("ld.global.nc of %s, which this kernel writes, at %s", name_of_address(address).c_str(),
                   source_line(write.site).c_str()),
            access.site);
    }
    if (actor.issuer != nullptr && !access.overwrites()) check_proxy(*actor.issuer, cell, access, mask, false);
    const Record now = actor.now(access.kind, mask);
    Record earlier;
    if (!cell.access(now, actor.observer, earlier)) report_race(now, earlier, access.bytes, address);
  });
}

Actor actor_of(const Thread& thread, const RunningObserver& observer, const void* site) {
  return {record_now(thread, Access::read, 0, site), observer};
}

}  // namespace

void touch(const Touch& access) {
  Thread& thread = *running;
  const auto address = reinterpret_cast<uintptr_t>(access.p);
  if (thread.fiber.holds(address)) {  // its own local memory
    if (!thread.registers.empty()) touch_registers(thread, address, access.bytes, access.kind, access.site);
    return;
  }
  thread.site = access.site;
  if (machine.options.schedule == Schedule::random && machine.random.below(64) == 0) yield();
  if (++thread.quiet_accesses > kRunaway) fault("runaway", "a loop without end", access.site);
  if (access.aligned && address % access.bytes != 0) {
    fault("misaligned",
          format("%s of %u bytes at %s", verb(access.kind), access.bytes, name_of_address(address).c_str()),
          access.site);
  }
  const RunningObserver observer(thread);
  const auto shared = reinterpret_cast<uintptr_t>(thread.block->shared);
  if (address - (shared - kGuardBytes) < machine.config.shared_bytes + 2 * kGuardBytes) {
    touch_shared(*thread.block, actor_of(thread, observer, access.site), access, uint32_t(address - shared));
    if (auditing) audit(access.site, Space::shared, access.kind, address - shared, access.bytes);
  } else {
    touch_global(actor_of(thread, observer, access.site), access, address);
  }
  if (writes(access.kind)) wake_pollers(address, access.bytes);
}

void touch_shared_as(Thread& thread, const Touch& access) {
  const auto shared = reinterpret_cast<uintptr_t>(thread.block->shared);
  const RunningObserver observer(thread);
  touch_shared(*thread.block, actor_of(thread, observer, access.site), access,
               uint32_t(reinterpret_cast<uintptr_t>(access.p) - shared));
}

void touch_shared_of(Block& block, const Touch& access) {
  const RunningObserver observer(*running);
  touch_shared(block, actor_of(*running, observer, access.site), access,
               uint32_t(reinterpret_cast<uintptr_t>(access.p) - reinterpret_cast<uintptr_t>(block.shared)));
}

void touch_shared_async(const AsyncOperation& operation, Block& block, Access kind, uint32_t offset, uint32_t bytes) {
  touch_shared(block, {operation.record, operation.issuer, &operation.issuer},
               {block.shared + offset, bytes, kind, operation.record.site}, offset);
}

void touch_global_async(const AsyncOperation& operation, Access kind, const void* p, uint32_t bytes) {
  Touch access{p, bytes, kind, operation.record.site};
  access.is_box = true;
  touch_global({operation.record, operation.issuer, &operation.issuer}, access, reinterpret_cast<uintptr_t>(p));
}

void recheck_global_read(const Thread& thread, const void* p, uint32_t bytes, const void* site) {
  if (!hooked) return;
  const RunningObserver observer(thread);
  const auto address = reinterpret_cast<uintptr_t>(p);
  for_cells(address, bytes, [&](uintptr_t at, uint8_t mask) {
    const Record now = record_now(thread, Access::read, mask, site);
    Record earlier;
    if (!global_cell(at).access(now, observer, earlier)) report_race(now, earlier, bytes, address);
  });
}

uint32_t shared_offset(uint32_t address) { return address - machine.shared_base; }

uint8_t* shared_pointer(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  const uint32_t offset = shared_offset(address);
  if (uint64_t(offset) + bytes > machine.config.shared_bytes) {
    fault("bounds",
          format("%s of %u bytes at byte %d of the block's %u bytes of shared memory", what, bytes, int(offset),
                 machine.config.shared_bytes),
          running->site);
  }
  if (address % alignment != 0) {
    fault("misaligned", format("%s at shared address 0x%x, which must be a multiple of %u", what, address, alignment),
          running->site);
  }
  return running->block->shared + offset;
}

void* shared_memory(size_t bytes) {
  running->site = MOE_SIMT_SITE;
  if (bytes > machine.config.shared_bytes) {
    fault("bounds", format("a shared layout of %zu bytes in a block that has %u", bytes, machine.config.shared_bytes),
          running->site);
  }
  return running->block->shared;
}

uint32_t cvta_to_shared(const void* p) {
  const auto offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(running->block->shared);
  if (offset > machine.config.shared_bytes) fault("bounds", "cvta of a pointer outside shared memory", MOE_SIMT_SITE);
  return machine.shared_base + uint32_t(offset);
}

void ld_shared(void* value, uint32_t address, uint32_t bytes) {
  running->site = MOE_SIMT_SITE;
  const uint8_t* const p = shared_pointer(address, bytes, bytes, "ld.shared");
  touch({p, bytes, Access::read, MOE_SIMT_SITE});
  std::memcpy(value, p, bytes);
}

void st_shared(uint32_t address, const void* value, uint32_t bytes) {
  running->site = MOE_SIMT_SITE;
  uint8_t* const p = shared_pointer(address, bytes, bytes, "st.shared");
  touch({p, bytes, Access::write, MOE_SIMT_SITE});
  std::memcpy(p, value, bytes);
}

void ld_global(void* value, const void* p, uint32_t bytes, bool read_only) {
  touch({p, bytes, Access::read, MOE_SIMT_SITE, read_only});
  std::memcpy(value, p, bytes);
}

void st_global(void* p, const void* value, uint32_t bytes) {
  touch({p, bytes, Access::write, MOE_SIMT_SITE});
  std::memcpy(p, value, bytes);
}

void begin_global_epoch(bool programmatic) {
  if (programmatic) return;  // the accesses of the launch before are still of interest
  pages.clear();
  last_page = nullptr;
  forget_locations();
}

}  // namespace moe::simt

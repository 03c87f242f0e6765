// SPDX-License-Identifier: Apache-2.0
// What the race detector remembers of memory: for every 4 bytes the accesses that a later one may conflict with.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace moe::simt {

enum class Access : uint8_t { read, write, atomic_read, atomic_write };
inline bool writes(Access a) { return a == Access::write || a == Access::atomic_write; }
inline bool is_atomic(Access a) { return a == Access::atomic_read || a == Access::atomic_write; }
/// Two unordered accesses race unless both only read or both are atomic.
inline bool conflict(Access a, Access b) { return (writes(a) || writes(b)) && !(is_atomic(a) && is_atomic(b)); }

constexpr uint32_t kChunkBytes = 16;

struct Record {
  uint32_t clock = 0;  // of the agent, at the access
  uint32_t block = 0;  // serial number
  const void* site = nullptr;
  uint16_t agent = 0;  // thread of the block, or one of its asynchronous agents
  uint8_t bytes = 0;   // bit i: byte i of the cell; 0 = no record
  Access kind = Access::read;
  bool async = false;  // by an agent that is no thread
};

/// Is `earlier` ordered before whatever the observer does now?
class Observer {
 public:
  virtual bool ordered(const Record& earlier) const = 0;

 protected:
  ~Observer() = default;
};

class Cell {
 public:
  uint8_t written = 0;     // bytes that hold a value somebody wrote; kept for shared memory
  bool in_flight = false;  // an asynchronous copy was issued into it and not waited for

  /// Records `now`. Returns false, with the other side in `earlier`, if the two race.
  bool access(const Record& now, const Observer& observer, Record& earlier);
  /// The asynchronous copy that was issued by `landed.agent` counts as a write from now on.
  void land(const Record& landed);
  const Record& last_write() const { return write_; }
  /// Does `now` race with what is recorded?
  bool find_conflict(const Record& now, const Observer& observer, Record& earlier) const;
  /// All that is recorded is ordered before a write that somebody else records.
  void forget();

 private:
  // Many agents that did the same kind of access to the same bytes, unordered: the last of each.
  struct Crowd {
    Record common;
    std::vector<uint32_t> clock;  // by agent, 0 = none
    std::vector<const void*> site;
  };
  struct More {
    std::vector<Record> writes;  // of parts of the cell
    std::vector<Crowd> crowds;
    std::vector<Record> reads;  // by asynchronous agents of many blocks, the last of each
  };
  Record write_, other_;
  std::unique_ptr<More> more_;

  void keep_write(const Record& now);
  void keep_other(const Record& now, const Observer& observer);
};

/// 16 bytes of shared memory as TMA and wgmma access them, always all at once. What threads do is in the cells.
class Chunk {
 public:
  bool by_threads = false;  // the cells have records that this does not know
  bool written = false;

  /// Records an asynchronous access. Returns false, with the other side in `earlier`, if it races with another one.
  bool access(const Record& now, const Observer& observer, Record& earlier);
  bool find_conflict(const Record& now, const Observer& observer, Record& earlier) const;

 private:
  static constexpr int kReads = 3;  // of different agents; more are rare
  Record write_, reads_[kReads];
  std::unique_ptr<std::vector<Record>> more_;
};

/// Calls f(first byte, mask of the bytes) for the cells of [address, address + bytes).
template <class F> void for_cells(uintptr_t address, uint32_t bytes, F f) {
  for (uintptr_t at = address; at < address + bytes;) {
    const uintptr_t end = std::min((at / 4 + 1) * 4, address + bytes);
    f(at, uint8_t(((1u << (end - at)) - 1) << (at % 4)));
    at = end;
  }
}

}  // namespace moe::simt

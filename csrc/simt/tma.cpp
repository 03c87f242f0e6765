// SPDX-License-Identifier: Apache-2.0
// TMA: boxes of a tensor copied to shared memory and back. A load lands at some moment between its issue and the end of
// its barrier's phase; a store is read and written between its issue and the wait for its group.
#include <algorithm>
#include <cstring>

#include "../dtype.h"
#include "proxy.h"
#include "report.h"
#include "tensor_map.h"

namespace moe::simt {

struct BulkStore {
  Block* block;
  EncodedMap map;
  int32_t at[kMapRank];
  uint32_t shared;  // offset
  bool add, done = false;
};

namespace {

constexpr uint32_t kAlignment = 128, kChunk = 16;

// ---------------------------------------------------------------- the box of a copy
EncodedMap map_at(const void* map, int rank, const char* what, const void* site) {
  running->site = site;
  EncodedMap encoded;
  std::memcpy(&encoded, map, sizeof encoded);
  if (encoded.magic != kMapMagic || reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    fault("tensor map", format("%s with what no cuTensorMapEncodeTiled has encoded", what), site);
  }
  if (encoded.rank != rank) {
    fault("tensor map", format("%s of %d dimensions of a tensor of %d", what, rank, encoded.rank), site);
  }
  const uint32_t inner = encoded.box[0] * element_bytes(encoded.type);
  if (encoded.swizzle != 0 && inner < encoded.swizzle) {
    fault("tensor map",
          format("%s: rows of %u bytes under a swizzle of %u; where the hardware puts them is not established", what,
                 inner, encoded.swizzle),
          site);
  }
  return encoded;
}

uint32_t row_bytes(const EncodedMap& map) { return map.box[0] * element_bytes(map.type); }

uint32_t box_bytes(const EncodedMap& map) {
  uint32_t bytes = row_bytes(map);
  for (int i = 1; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

void check_shared(const EncodedMap& map, uint32_t offset, const char* what, const void* site) {
  const uint32_t bytes = box_bytes(map), alignment = std::max(kAlignment, uint32_t(map.swizzle) * 8);
  if (uint64_t(offset) + bytes > machine.config.shared_bytes) {
    fault("bounds",
          format("%s of %u bytes at byte %d of the block's %u bytes of shared memory", what, bytes, int(offset),
                 machine.config.shared_bytes),
          site);
  }
  const uint32_t address = machine.shared_base + offset;
  if (address % alignment != 0) {
    fault("misaligned", format("%s at shared address 0x%x, which must be a multiple of %u", what, address, alignment),
          site);
  }
}

/// The part of one row of a box that lies in the tensor: [skip, skip + bytes) of the row, at `global`.
struct Row {
  uint8_t* global;
  uint32_t skip, bytes;
  uint32_t shared;  // of the row's first byte, from the start of the box
};

// Calls f(Row) for every row of the box.
template <class F> void for_rows(const EncodedMap& map, const int32_t* at, F f) {
  const uint32_t element = element_bytes(map.type), inner = row_bytes(map);
  const int64_t begin = std::max<int64_t>(at[0], 0),
                end = std::min<int64_t>(int64_t(at[0]) + map.box[0], int64_t(map.last[0]) + 1);
  uint32_t rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (uint32_t row = 0; row < rows; ++row) {
    uint64_t address = map.base + uint64_t(begin) * element;
    bool inside = begin < end;
    uint32_t rest = row;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = int64_t(at[i]) + int64_t(rest % map.box[i]) * map.step[i];
      inside = inside && index >= 0 && uint64_t(index) <= map.last[i];
      address += uint64_t(index) * map.strides[i - 1];
      rest /= map.box[i];
    }
    f(Row{reinterpret_cast<uint8_t*>(address), inside ? uint32_t(begin - at[0]) * element : 0,
          inside ? uint32_t(end - begin) * element : 0, row * inner});
  }
}

// Calls f(byte of the row, pointer into shared memory) for the 16-byte chunks of a row, which the swizzle permutes.
template <class F> void for_chunks(const EncodedMap& map, const Block& block, uint32_t box, const Row& row, F f) {
  const uint32_t mask = map.swizzle == 0 ? 0 : map.swizzle / kChunk - 1;
  for (uint32_t byte = 0; byte < row_bytes(map); byte += kChunk) {
    const uint32_t address = machine.shared_base + box + row.shared + byte;
    f(byte, block.shared + shared_offset(address ^ ((address >> 7 & mask) << 4)));
  }
}

// ---------------------------------------------------------------- loads
struct BulkLoad {
  Block* block;
  EncodedMap map;
  int32_t at[kMapRank];
  uint32_t shared, bar;  // offsets
  Record record;
};

void land_load(const BulkLoad& load) {
  uint8_t line[256 * 8];
  for_rows(load.map, load.at, [&](const Row& row) {
    std::memset(line, 0, row_bytes(load.map));
    if (row.bytes != 0) std::memcpy(line + row.skip, row.global, row.bytes);
    for_chunks(load.map, *load.block, load.shared, row,
               [&](uint32_t byte, uint8_t* shared) { std::memcpy(shared, line + byte, kChunk); });
  });
  complete_bytes(*load.block, load.bar, box_bytes(load.map), load.record.agent, load.record.clock, load.record.site);
}

void issue_load(Block& block, const EncodedMap& map, const int32_t* at, uint32_t shared, uint32_t bar,
                const void* site) {
  mbarrier_at(block, bar, "TMA load", site);
  check_shared(map, shared, "TMA load", site);
  BulkLoad load{&block, map, {}, shared, bar, begin_async(block, AgentKind::load, bar, site)};
  std::copy(at, at + map.rank, load.at);
  const ThreadIssuer issuer(*running);
  const AsyncOperation operation{load.record, issuer};
  touch_shared_async(operation, block, Access::write, shared, box_bytes(map));
  for_rows(map, at, [&](const Row& row) {
    if (row.bytes != 0) touch_global_async(operation, Access::read, row.global, row.bytes);
  });
  note_remote(block, site);
  Agent& agent = block.agents[load.record.agent - block.threads.size()];
  if (machine.options.landing == Landing::early) return land_load(load);
  std::memset(block.shared + shared, 0xff, box_bytes(map));
  const bool late = machine.options.landing == Landing::late;
  agent.due = late ? UINT64_MAX : std::max(agent.due, machine.step + machine.random.below(1024));
  machine.events.push_back({agent.due, &block, [load] { land_load(load); }});
}

// ---------------------------------------------------------------- stores
template <class T> void add_element(uint8_t* to, const uint8_t* from) {
  T a, b;
  std::memcpy(&a, to, sizeof a);
  std::memcpy(&b, from, sizeof b);
  const T sum = T(float(a) + float(b));
  std::memcpy(to, &sum, sizeof sum);
}

void add_line(int type, uint8_t* to, const uint8_t* from, uint32_t bytes) {
  const uint32_t element = element_bytes(type);
  for (uint32_t i = 0; i < bytes; i += element) {
    if (type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32) add_element<float>(to + i, from + i);
    else if (type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) add_element<bf16>(to + i, from + i);
    else add_element<f16>(to + i, from + i);
  }
}

void land_store(BulkStore& store) {
  if (store.done) return;
  store.done = true;
  uint8_t line[256 * 8];
  for_rows(store.map, store.at, [&](const Row& row) {
    if (row.bytes == 0) return;
    for_chunks(store.map, *store.block, store.shared, row,
               [&](uint32_t byte, const uint8_t* shared) { std::memcpy(line + byte, shared, kChunk); });
    if (store.add) add_line(store.map.type, row.global, line + row.skip, row.bytes);
    else std::memcpy(row.global, line + row.skip, row.bytes);
    wake_pollers(reinterpret_cast<uintptr_t>(row.global), row.bytes);
  });
}

void issue_store(const void* map, const int32_t* at, int rank, uint32_t shared, bool add, const void* site) {
  const char* const what = add ? "TMA reduction" : "TMA store";
  Thread& thread = *running;
  Block& block = *thread.block;
  const auto store = std::make_shared<BulkStore>();
  store->block = &block, store->add = add, store->shared = shared_offset(shared);
  store->map = map_at(map, rank, what, site);
  std::copy(at, at + rank, store->at);
  const int type = store->map.type;
  const bool adds = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
                    type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (add && !adds) fault("tensor map", "TMA reduction of a type that the emulator does not add", site);
  check_shared(store->map, store->shared, what, site);
  const ThreadIssuer issuer(thread);
  const Record read = begin_async(block, AgentKind::store_read, thread.id, site);
  const Record write = begin_async(block, AgentKind::store_write, thread.id, site);
  touch_shared_async({read, issuer}, block, Access::read, store->shared, box_bytes(store->map));
  for_rows(store->map, at, [&](const Row& row) {
    if (row.bytes == 0) return;
    touch_global_async({write, issuer}, add ? Access::atomic_write : Access::write, row.global, row.bytes);
  });
  thread.stores.stores.push_back(store);
  thread.stores.read_clock = read.clock, thread.stores.write_clock = write.clock;
  switch (machine.options.landing) {
    case Landing::early: return land_store(*store);
    case Landing::late: return;
    case Landing::random:
      machine.events.push_back({machine.step + machine.random.below(1024), &block, [store] { land_store(*store); }});
  }
}

}  // namespace

void prefetch_tensor_map(const void* map) {
  EncodedMap encoded;
  std::memcpy(&encoded, map, sizeof encoded);
  if (encoded.magic != kMapMagic) fault("tensor map", "prefetch of what is no tensor map", MOE_SIMT_SITE);
}

void tma_load(uint32_t shared, const void* map, const int32_t* at, int rank, uint32_t bar) {
  const void* const site = MOE_SIMT_SITE;
  const EncodedMap encoded = map_at(map, rank, "TMA load", site);
  Block& block = block_of_address(shared, "TMA load", site);
  if (&block_of_address(bar, "TMA load", site) != &block) {
    fault("cluster", "TMA load into one block of the cluster, counted at another", site);
  }
  issue_load(block, encoded, at, offset_in_block(shared), offset_in_block(bar), site);
}

void tma_load_multicast(uint32_t shared, const void* map, const int32_t* at, int rank, uint32_t bar, uint16_t ctas) {
  const void* const site = MOE_SIMT_SITE;
  const EncodedMap encoded = map_at(map, rank, "TMA multicast", site);
  const size_t blocks = running->block->cluster->blocks.size();
  if (ctas == 0 || ctas >> blocks != 0) {
    fault("cluster", format("TMA multicast to blocks 0x%x of a cluster of %zu", ctas, blocks), site);
  }
  for (uint32_t rank_of = 0; rank_of < blocks; ++rank_of) {
    if ((ctas >> rank_of & 1) == 0) continue;
    Block& block = peer_block(rank_of, "TMA multicast", site);
    issue_load(block, encoded, at, offset_in_block(shared), offset_in_block(bar), site);
  }
}

void tma_store(const void* map, const int32_t* at, int rank, uint32_t shared) {
  issue_store(map, at, rank, shared, false, MOE_SIMT_SITE);
}

void tma_reduce_add(const void* map, const int32_t* at, int rank, uint32_t shared) {
  issue_store(map, at, rank, shared, true, MOE_SIMT_SITE);
}

void bulk_commit_group() {
  Thread& thread = *running;
  thread.store_groups.push_back(std::move(thread.stores));
  thread.stores = {};
}

void bulk_wait_group(int n, bool read) {
  Thread& thread = *running;
  thread.site = MOE_SIMT_SITE;
  Block& block = *thread.block;
  uint32_t read_clock = 0, write_clock = 0;
  auto& groups = thread.store_groups;
  for (size_t i = 0; i + size_t(n) < groups.size(); ++i) {
    for (const auto& store : groups[i].stores) land_store(*store);
    groups[i].stores.clear();
    groups[i].read = true;
    read_clock = std::max(read_clock, groups[i].read_clock);
    write_clock = std::max(write_clock, groups[i].write_clock);
  }
  if (read_clock != 0) learn(thread, agent_index(block, AgentKind::store_read, thread.id), read_clock);
  if (read) return;
  if (write_clock != 0) learn(thread, agent_index(block, AgentKind::store_write, thread.id), write_clock);
  while (int(groups.size()) > n) groups.pop_front();
}

}  // namespace moe::simt

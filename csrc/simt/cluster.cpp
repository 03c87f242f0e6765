// SPDX-License-Identifier: Apache-2.0
// Clusters: blocks that run together and reach each other's shared memory. An address from mapa carries the rank of its
// block above the 24 bits of the shared window.
#include <algorithm>
#include <cstring>

#include "report.h"

namespace moe::simt {
namespace {

constexpr uint32_t kWindowBits = 24;

void end_phase_if_complete(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.threads) return;
  std::vector<SnapshotRef> all;
  for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
    all.push_back(std::make_shared<const Snapshot>(Snapshot{cluster.blocks[rank]->serial, cluster.sums[rank]->take()}));
  }
  for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
    const Block& block = *cluster.blocks[rank];
    ClockSum sum(block.serial, block.threads.size());
    for (const SnapshotRef& snapshot : all) sum.add(*snapshot);
    cluster.done[rank] = sum.take();
    cluster.sums[rank] = std::make_unique<ClockSum>(block.serial, block.threads.size());
  }
  cluster.arrived = 0;
  ++cluster.phase;
  ++machine.progress;
  std::vector<Thread*> waiting;
  waiting.swap(cluster.waiting);
  for (Thread* thread : waiting) make_ready(*thread);
}

}  // namespace

Block& peer_block(uint32_t rank, const char* what, const void* site) {
  Cluster& cluster = *running->block->cluster;
  if (rank >= cluster.blocks.size()) {
    fault("cluster", format("%s at block %u of a cluster of %zu", what, rank, cluster.blocks.size()), site);
  }
  Block& block = *cluster.blocks[rank];
  if (block.alive == 0) {
    fault("cluster", format("%s at block %u of the cluster, which has ended", what, rank), site);
  }
  return block;
}

namespace {

uint8_t* remote_word(uint32_t address, Access kind, const char* what, const void* site) {
  running->site = site;
  Block& block = block_of_address(address, what, site);
  const uint32_t offset = offset_in_block(address);
  if (uint64_t(offset) + 4 > machine.config.shared_bytes || offset % 4 != 0) {
    fault(
        "bounds",
        format("%s at byte %d of a block's %u bytes of shared memory", what, int(offset), machine.config.shared_bytes),
        site);
  }
  touch_shared_of(block, {block.shared + offset, 4, kind, site});
  note_remote(block, site);
  return block.shared + offset;
}

}  // namespace

Block& block_of_address(uint32_t address, const char* what, const void* site) {
  const uint32_t rank = address >> kWindowBits;
  return rank == 0 ? *running->block : peer_block(rank - 1, what, site);
}

uint32_t offset_in_block(uint32_t address) { return shared_offset(address & ((1u << kWindowBits) - 1)); }

// Everything it does now must be known in the other block before that ends: see check_cluster_end.
void note_remote(Block& target, const void* site) {
  if (&target == running->block) return;
  const Record now = record_now(*running, Access::write, 0xf, site);
  for (Record& last : target.remote) {
    if (last.block != now.block || last.agent != now.agent) continue;
    last = now;
    return;
  }
  target.remote.push_back(now);
}

void check_cluster_end(const Block& block) {
  for (const Record& remote : block.remote) {
    const bool known = std::any_of(block.threads.begin(), block.threads.end(),
                                   [&](const Thread& thread) { return ordered(thread, remote); });
    if (known) continue;
    note_fault("cluster",
               format("block (%u,%u,%u) ended without knowing of an access to its shared memory by %s", block.index.x,
                      block.index.y, block.index.z, who(remote.block, remote.agent).c_str()),
               remote.site);
  }
}

void leave_cluster(Thread& thread) {
  Cluster& cluster = *thread.block->cluster;
  --cluster.threads;
  if (thread.cluster_arrived && thread.cluster_phase == cluster.phase) --cluster.arrived;  // it is not waited for
  end_phase_if_complete(cluster);
}

uint32_t cluster_ctarank() { return running->block->rank; }

void cluster_arrive() {
  const void* const site = MOE_SIMT_SITE;
  Thread& thread = *running;
  thread.site = site;
  Cluster& cluster = *thread.block->cluster;
  if (thread.cluster_arrived) fault("cluster", "barrier.cluster.arrive a second time before its wait", site);
  thread.cluster_arrived = true;
  thread.cluster_phase = cluster.phase;
  cluster.sums[thread.block->rank]->add(thread.base, thread.id, thread.own);
  ++thread.own;
  ++cluster.arrived;
  end_phase_if_complete(cluster);
}

void cluster_wait() {
  const void* const site = MOE_SIMT_SITE;
  Thread& thread = *running;
  thread.site = site;
  Cluster& cluster = *thread.block->cluster;
  if (!thread.cluster_arrived) fault("cluster", "barrier.cluster.wait without an arrive", site);
  while (cluster.phase == thread.cluster_phase) {
    cluster.waiting.push_back(&thread);
    wait_in("barrier.cluster.wait", cluster.phase);
  }
  thread.cluster_arrived = false;
  acquire(thread, cluster.done[thread.block->rank]);
}

uint32_t mapa(uint32_t shared, uint32_t cta) {
  running->site = MOE_SIMT_SITE;
  const Cluster& cluster = *running->block->cluster;
  if (cta >= cluster.blocks.size()) {
    fault("cluster", format("mapa to block %u of a cluster of %zu", cta, cluster.blocks.size()), MOE_SIMT_SITE);
  }
  return (shared & ((1u << kWindowBits) - 1)) | (cta + 1) << kWindowBits;
}

uint32_t ld_shared_cluster(uint32_t address) {
  uint32_t v;
  std::memcpy(&v, remote_word(address, Access::read, "ld.shared::cluster", MOE_SIMT_SITE), 4);
  return v;
}

void st_shared_cluster(uint32_t address, uint32_t v) {
  std::memcpy(remote_word(address, Access::write, "st.shared::cluster", MOE_SIMT_SITE), &v, 4);
}

}  // namespace moe::simt

// SPDX-License-Identifier: Apache-2.0
// cp.async and its groups. The bytes may land at any moment between the issue and the end of the wait; until the wait
// nobody may touch where they land, whichever moment this run has drawn.
#include <cstring>

#include "report.h"

namespace moe::simt {

void copy_now(Block& block, Copy& copy) {
  if (copy.copied) return;
  copy.copied = true;
  if (copy.read != 0) std::memcpy(block.shared + copy.shared, copy.global, copy.read);
  std::memset(block.shared + copy.shared + copy.read, 0, copy.bytes - copy.read);
}

void land(Thread& owner, Copy& copy) {
  if (copy.landed) return;
  copy_now(*owner.block, copy);
  copy.landed = true;
  if (copy.read != 0 && running == &owner) recheck_global_read(owner, copy.global, copy.read, copy.site);
  for (uint32_t at = copy.shared; at < copy.shared + copy.bytes; at += 4) {
    const Record now = record_now(owner, Access::write, 0xf, copy.site);
    owner.block->cells[at / 4].land(copy.pledged.bytes != 0 ? copy.pledged : now);
  }
}

void cp_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t read) {
  const void* const site = MOE_SIMT_SITE;
  Thread& thread = *running;
  thread.site = site;
  if (read > bytes) fault("async", format("cp.async reads %u of %u bytes", read, bytes), site);
  uint8_t* const to = shared_pointer(shared, bytes, bytes, "cp.async");
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fault("misaligned",
          format("cp.async of %u bytes from %s", bytes, name_of_address(reinterpret_cast<uintptr_t>(global)).c_str()),
          site);
  }
  if (read != 0) touch({global, read, Access::read, site, false, false});
  touch({to, bytes, Access::write, site});
  const auto copy = std::make_shared<Copy>(Copy{shared_offset(shared), global, bytes, read, site});
  for (uint32_t at = copy->shared; at < copy->shared + bytes; at += 4) thread.block->cells[at / 4].in_flight = true;
  const Landing landing = machine.options.landing;
  if (landing == Landing::early || (landing == Landing::random && machine.random.below(2) == 0)) {
    copy_now(*thread.block, *copy);
  } else {
    std::memset(to, 0xff, bytes);
  }
  thread.copies.push_back(copy);
}

void cp_async_commit_group() {
  Thread& thread = *running;
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

void cp_async_wait_group(int n) {
  Thread& thread = *running;
  thread.site = MOE_SIMT_SITE;
  while (int(thread.groups.size()) > n) {
    for (const CopyRef& copy : thread.groups.front()) land(thread, *copy);
    thread.groups.pop_front();
  }
}

void cp_async_wait_all() {
  cp_async_commit_group();
  cp_async_wait_group(0);
}

}  // namespace moe::simt

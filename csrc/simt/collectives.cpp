// SPDX-License-Identifier: Apache-2.0
// Collectives of a warp: the lanes of a mask meet, the last to come does the work for all. They exchange registers and,
// __syncwarp apart, order no memory.
#include "collectives.h"

#include <algorithm>

#include "report.h"

namespace moe::simt {

void meet(const char* name, uint32_t mask, void* argument, void (*work)(void** arguments, uint32_t mask),
          const void* site) {
  Thread& thread = *running;
  thread.site = site;
  const uint32_t lane = thread.lane();
  if ((mask >> lane & 1) == 0)
    fault("collective", format("%s with mask 0x%08x, which leaves out lane %u that calls it", name, mask, lane), site);
  auto& meetings = thread.block->warps[thread.warp()].meetings;
  auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return (m.mask & mask) != 0; });
  if (meeting == meetings.end()) {
    meetings.push_back({name, mask, 0, {}});
    meeting = meetings.end() - 1;
  } else if (meeting->name != name || meeting->mask != mask) {
    fault("collective",
          format("%s with mask 0x%08x while lanes 0x%08x of the warp are in %s with mask 0x%08x", name, mask,
                 meeting->arrived, meeting->name, meeting->mask),
          site);
  }
  meeting->arrived |= 1u << lane;
  meeting->arguments[lane] = argument;
  if (meeting->arrived != mask) return wait_in(name, mask);
  Meeting complete = *meeting;
  meetings.erase(meeting);
  work(complete.arguments, mask);
  ++machine.meetings;
  for_lanes(mask, [&](uint32_t other) {
    Thread& one = thread.block->threads[thread.warp() * 32 + other];
    one.meeting = machine.meetings;
    if (other != lane) make_ready(one);
  });
  yield();
}

namespace {

// The lanes that exist: those of a last, narrower warp are not to be named in a mask.
struct Exchange {
  uint64_t value, result = 0;
  uint32_t kind, operand = 0, width = 32;
};
Exchange& at(void** arguments, uint32_t lane) { return *static_cast<Exchange*>(arguments[lane]); }

// PTX ISA, shfl: the segment of `width` lanes bounds where the value may come from; outside it a lane keeps its own.
uint32_t source_lane(uint32_t lane, const Exchange& x) {
  const uint32_t first = lane / x.width * x.width, last = first + x.width - 1;
  switch (Shuffle(x.kind)) {
    case Shuffle::index: return first + x.operand % x.width;
    case Shuffle::up: return lane < first + x.operand ? lane : lane - x.operand;
    case Shuffle::down: return lane + x.operand > last ? lane : lane + x.operand;
    case Shuffle::exclusive_or: return (lane ^ x.operand) > last ? lane : lane ^ x.operand;
  }
  return lane;
}

void do_shuffle(void** arguments, uint32_t mask) {
  for_lanes(mask, [&](uint32_t lane) {
    const uint32_t source = source_lane(lane, at(arguments, lane));
    if ((mask >> source & 1) == 0) {
      fault("collective", format("shuffle: lane %u reads lane %u, which is not in mask 0x%08x", lane, source, mask),
            running->site);
    }
    at(arguments, lane).result = at(arguments, source).value;
  });
}

void do_vote(void** arguments, uint32_t mask) {
  uint32_t ballot = 0;
  for_lanes(mask, [&](uint32_t lane) { ballot |= uint32_t(at(arguments, lane).value) << lane; });
  for_lanes(mask, [&](uint32_t lane) {
    Exchange& x = at(arguments, lane);
    x.result = Vote(x.kind) == Vote::ballot ? ballot : Vote(x.kind) == Vote::all ? ballot == mask : ballot != 0;
  });
}

void do_match(void** arguments, uint32_t mask) {
  for_lanes(mask, [&](uint32_t lane) {
    uint32_t equal = 0;
    for_lanes(mask, [&](uint32_t other) {
      equal |= uint32_t(at(arguments, other).value == at(arguments, lane).value) << other;
    });
    at(arguments, lane).result = equal;
  });
}

uint32_t combine(Redux kind, uint32_t a, uint32_t b) {
  switch (kind) {
    case Redux::add: return a + b;
    case Redux::min_unsigned: return std::min(a, b);
    case Redux::max_unsigned: return std::max(a, b);
    case Redux::min_signed: return uint32_t(std::min(int32_t(a), int32_t(b)));
    case Redux::max_signed: return uint32_t(std::max(int32_t(a), int32_t(b)));
    case Redux::bit_and: return a & b;
    case Redux::bit_or: return a | b;
    case Redux::bit_xor: return a ^ b;
  }
  return a;
}

void do_redux(void** arguments, uint32_t mask) {
  bool first = true;
  uint32_t sum = 0;
  for_lanes(mask, [&](uint32_t lane) {
    const Exchange& x = at(arguments, lane);
    sum = first ? uint32_t(x.value) : combine(Redux(x.kind), sum, uint32_t(x.value));
    first = false;
  });
  for_lanes(mask, [&](uint32_t lane) { at(arguments, lane).result = sum; });
}

void do_barrier(void**, uint32_t mask) {
  Block& block = *running->block;
  const uint32_t first = running->warp() * 32;
  ClockSum sum(block.serial, block.threads.size());
  for_lanes(mask, [&](uint32_t lane) {
    const Thread& thread = block.threads[first + lane];
    sum.add(thread.base, thread.id, thread.own);
  });
  const ClockRef all = sum.take();
  for_lanes(mask, [&](uint32_t lane) {
    block.threads[first + lane].base = all;
    ++block.threads[first + lane].own;
  });
}

// Any lane may be elected; kernels must not count on the lowest.
void do_elect(void** arguments, uint32_t mask) {
  uint32_t chosen = 31u - uint32_t(__builtin_clz(mask));
  if (machine.options.schedule == Schedule::in_order) chosen = uint32_t(__builtin_ctz(mask));
  at(arguments, chosen).result = 1;
}

}  // namespace

void warp_barrier(uint32_t mask) { meet("__syncwarp", mask, nullptr, do_barrier, MOE_SIMT_SITE); }

uint64_t shuffle(uint32_t mask, uint64_t value, Shuffle kind, uint32_t operand, uint32_t width) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  if (width == 0 || width > 32 || (width & (width - 1)) != 0) {
    fault("collective", format("shuffle of width %u", width), MOE_SIMT_SITE);
  }
  Exchange x{value, 0, uint32_t(kind), operand, width};
  meet(names[int(kind)], mask, &x, do_shuffle, MOE_SIMT_SITE);
  return x.result;
}

uint32_t vote(uint32_t mask, bool predicate, Vote kind) {
  static const char* const names[] = {"__ballot_sync", "__all_sync", "__any_sync"};
  Exchange x{predicate, 0, uint32_t(kind)};
  meet(names[int(kind)], mask, &x, do_vote, MOE_SIMT_SITE);
  return uint32_t(x.result);
}

uint32_t match_any(uint32_t mask, uint64_t value) {
  Exchange x{value, 0, 0};
  meet("__match_any_sync", mask, &x, do_match, MOE_SIMT_SITE);
  return uint32_t(x.result);
}

uint32_t match_all(uint32_t mask, uint64_t value, int* all_equal) {
  Exchange x{value, 0, 0};
  meet("__match_all_sync", mask, &x, do_match, MOE_SIMT_SITE);
  *all_equal = uint32_t(x.result) == mask;
  return *all_equal ? mask : 0;
}

uint32_t redux(uint32_t mask, uint32_t value, Redux kind) {
  static const char* const names[] = {"__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                      "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync",
                                      "__reduce_or_sync",  "__reduce_xor_sync"};
  Exchange x{value, 0, uint32_t(kind)};
  meet(names[int(kind)], mask, &x, do_redux, MOE_SIMT_SITE);
  return uint32_t(x.result);
}

uint32_t elect_sync(uint32_t mask) {
  Exchange x{0, 0, 0};
  meet("elect.sync", mask, &x, do_elect, MOE_SIMT_SITE);
  return uint32_t(x.result);
}

}  // namespace moe::simt

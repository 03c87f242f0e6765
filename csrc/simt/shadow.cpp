// SPDX-License-Identifier: Apache-2.0
#include "shadow.h"

#include <algorithm>

namespace moe::simt {
namespace {

bool races(const Record& now, const Record& earlier, const Observer& observer) {
  if ((now.bytes & earlier.bytes) == 0 || !conflict(now.kind, earlier.kind)) return false;
  if (now.block == earlier.block && now.agent == earlier.agent) return false;
  return !observer.ordered(earlier);
}

bool same_crowd(const Record& a, const Record& b) {
  return a.block == b.block && a.bytes == b.bytes && a.kind == b.kind;
}

}  // namespace

bool Cell::find_conflict(const Record& now, const Observer& observer, Record& earlier) const {
  for (const Record* record : {&write_, &other_}) {
    if (races(now, *record, observer)) {
      earlier = *record;
      return true;
    }
  }
  if (more_ == nullptr) return false;
  for (const auto* records : {&more_->writes, &more_->reads}) {
    for (const Record& record : *records) {
      if (races(now, record, observer)) {
        earlier = record;
        return true;
      }
    }
  }
  for (const Crowd& crowd : more_->crowds) {
    if ((now.bytes & crowd.common.bytes) == 0 || !conflict(now.kind, crowd.common.kind)) continue;
    Record member = crowd.common;
    for (size_t agent = 0; agent < crowd.clock.size(); ++agent) {
      if (crowd.clock[agent] == 0) continue;
      member.agent = uint16_t(agent);
      member.clock = crowd.clock[agent];
      member.site = crowd.site[agent];
      if (races(now, member, observer)) {
        earlier = member;
        return true;
      }
    }
  }
  return false;
}

// All that the new write covers is ordered before it, or it would have raced: whoever is ordered after the write is
// ordered after that too, so it can be forgotten.
void Cell::keep_write(const Record& now) {
  const auto covered = [&](const Record& record) { return (record.bytes & ~now.bytes) == 0; };
  if (!covered(write_)) {
    if (more_ == nullptr) more_ = std::make_unique<More>();
    more_->writes.push_back(write_);
  }
  if (covered(other_)) other_.bytes = 0;
  if (more_ != nullptr) {
    auto& partial = more_->writes;
    partial.erase(std::remove_if(partial.begin(), partial.end(), covered), partial.end());
    auto& crowds = more_->crowds;
    crowds.erase(std::remove_if(crowds.begin(), crowds.end(), [&](const Crowd& c) { return covered(c.common); }),
                 crowds.end());
    auto& reads = more_->reads;
    reads.erase(std::remove_if(reads.begin(), reads.end(), covered), reads.end());
    if (partial.empty() && crowds.empty() && reads.empty()) more_.reset();
  }
  write_ = now;
}

void Cell::keep_other(const Record& now, const Observer& observer) {
  const bool alike = other_.kind == now.kind && (other_.bytes & ~now.bytes) == 0;
  const bool mine = other_.block == now.block && other_.agent == now.agent;
  if (other_.bytes == 0 || (alike && (mine || observer.ordered(other_)))) {
    other_ = now;
    return;
  }
  if (more_ == nullptr) more_ = std::make_unique<More>();
  if (now.async && now.kind == Access::read) {
    for (Record& read : more_->reads) {
      if (read.block != now.block || read.agent != now.agent || (read.bytes & ~now.bytes) != 0) continue;
      read = now;
      return;
    }
    more_->reads.push_back(now);
    return;
  }
  auto& crowds = more_->crowds;
  auto crowd = std::find_if(crowds.begin(), crowds.end(), [&](const Crowd& c) { return same_crowd(c.common, now); });
  if (crowd == crowds.end()) {
    crowds.push_back({now, {}, {}});
    crowd = crowds.end() - 1;
  }
  if (crowd->clock.size() <= now.agent) {
    crowd->clock.resize(now.agent + 1);
    crowd->site.resize(now.agent + 1);
  }
  crowd->clock[now.agent] = now.clock;
  crowd->site[now.agent] = now.site;
}

bool Cell::access(const Record& now, const Observer& observer, Record& earlier) {
  if (find_conflict(now, observer, earlier)) return false;
  if (now.kind == Access::write) {
    keep_write(now);
  } else {
    keep_other(now, observer);
  }
  return true;
}

void Cell::forget() {
  write_.bytes = other_.bytes = 0;
  more_.reset();
}

bool Chunk::find_conflict(const Record& now, const Observer& observer, Record& earlier) const {
  const auto found = [&](const Record& record) {
    if (!races(now, record, observer)) return false;
    earlier = record;
    return true;
  };
  if (found(write_)) return true;
  if (!writes(now.kind)) return false;
  if (std::any_of(reads_, reads_ + kReads, found)) return true;
  return more_ != nullptr && std::any_of(more_->begin(), more_->end(), found);
}

bool Chunk::access(const Record& now, const Observer& observer, Record& earlier) {
  if (find_conflict(now, observer, earlier)) return false;
  if (writes(now.kind)) {  // all that went before is ordered before it
    write_ = now;
    for (Record& read : reads_) read.bytes = 0;
    more_.reset();
    written = true;
    return true;
  }
  for (Record& read : reads_) {
    if (read.bytes != 0 && (read.block != now.block || read.agent != now.agent)) continue;
    read = now;
    return true;
  }
  if (more_ == nullptr) more_ = std::make_unique<std::vector<Record>>();
  const auto same = [&](const Record& read) { return read.block == now.block && read.agent == now.agent; };
  const auto mine = std::find_if(more_->begin(), more_->end(), same);
  if (mine != more_->end()) *mine = now;
  else more_->push_back(now);
  return true;
}

void Cell::land(const Record& landed) {
  in_flight = false;
  keep_write(landed);
}

}  // namespace moe::simt

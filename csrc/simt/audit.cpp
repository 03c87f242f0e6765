// SPDX-License-Identifier: Apache-2.0
// Address audit: what the memory system would have to do for the addresses that a warp asked for together. A request is
// one access site, one warp, the same turn of each lane since the lanes last met, so that a loop whose last round has
// fewer lanes does not shift the turns of the loops after it. Shared memory has 32 banks of 4 bytes and serves 8-byte
// requests by half warps and 16-byte requests by quarters; global memory moves sectors of 32 bytes.
#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "report.h"

namespace moe::simt {

bool auditing = false;

namespace {

constexpr uint32_t kSector = 32, kBanks = 32, kBankBytes = 4;

struct Lane {
  uint32_t lane, bytes;
  uint64_t address;
};
struct RequestKey {
  uint32_t block, warp;
  uint64_t meeting;
  uint32_t turn;
  bool operator<(const RequestKey& o) const {
    return std::tie(block, warp, meeting, turn) < std::tie(o.block, o.warp, o.meeting, o.turn);
  }
};
struct Turn {  // of a thread at a site
  uint64_t meeting;
  uint32_t next;
};
struct Site {
  Space space;
  Access kind;
  std::map<RequestKey, std::vector<Lane>> requests;
  std::map<std::pair<uint32_t, uint16_t>, Turn> turns;  // by block and thread
};
// A copy touches global and shared memory from one place, hence the space in the key.
std::map<std::tuple<const void*, Space, Access>, Site> sites;

uint32_t wavefronts(const std::vector<Lane>& lanes) {
  const uint32_t bytes = lanes[0].bytes, group = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
  uint32_t total = 0;
  for (uint32_t first = 0; first < 32; first += group) {
    std::map<uint64_t, std::set<uint64_t>> banks;
    for (const Lane& lane : lanes) {
      if (lane.lane < first || lane.lane >= first + group) continue;
      for (uint64_t word = lane.address / kBankBytes; word <= (lane.address + lane.bytes - 1) / kBankBytes; ++word) {
        banks[word % kBanks].insert(word);
      }
    }
    size_t worst = 0;
    for (const auto& [bank, words] : banks) worst = std::max(worst, words.size());
    total += uint32_t(worst);
  }
  return total;
}

uint32_t ideal_wavefronts(const std::vector<Lane>& lanes) {
  const uint32_t bytes = lanes[0].bytes, group = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
  std::set<uint32_t> groups;
  for (const Lane& lane : lanes) groups.insert(lane.lane / group);
  return uint32_t(groups.size());
}

uint32_t sectors(const std::vector<Lane>& lanes, uint32_t& distinct_bytes) {
  std::set<uint64_t> touched, bytes;
  for (const Lane& lane : lanes) {
    for (uint64_t at = lane.address; at < lane.address + lane.bytes; ++at) {
      touched.insert(at / kSector);
      bytes.insert(at);
    }
  }
  distinct_bytes = uint32_t(bytes.size());
  return uint32_t(touched.size());
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) result += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
  return result + "\"";
}

std::string describe(const void* where, const Site& site) {
  static const char* const kinds[] = {"read", "write", "atomic read", "atomic"};
  uint64_t served = 0, ideal = 0, bytes = 0;
  uint32_t worst = 0;
  for (const auto& [key, lanes] : site.requests) {
    uint32_t cost;
    if (site.space == Space::shared) {
      cost = wavefronts(lanes);
      ideal += ideal_wavefronts(lanes);
      for (const Lane& lane : lanes) bytes += lane.bytes;
    } else {
      uint32_t distinct = 0;
      cost = sectors(lanes, distinct);
      ideal += (distinct + kSector - 1) / kSector;
      bytes += distinct;
    }
    served += cost;
    worst = std::max(worst, cost);
  }
  return format(
      "{\"site\": %s, \"space\": \"%s\", \"kind\": \"%s\", \"unit\": \"%s\", \"requests\": %zu, "
      "\"served\": %llu, \"ideal\": %llu, \"worst\": %u, \"bytes\": %llu}",
      quoted(source_line(where)).c_str(), site.space == Space::shared ? "shared" : "global", kinds[int(site.kind)],
      site.space == Space::shared ? "wavefronts" : "sectors", site.requests.size(),
      static_cast<unsigned long long>(served), static_cast<unsigned long long>(ideal), worst,
      static_cast<unsigned long long>(bytes));
}

}  // namespace

void audit(const void* where, Space space, Access kind, uint64_t address, uint32_t bytes) {
  const Thread& thread = *running;
  Site& site = sites[{where, space, kind}];
  site.space = space;
  site.kind = kind;
  Turn& turn = site.turns[{thread.block->serial, thread.id}];
  if (turn.meeting != thread.meeting) turn = {thread.meeting, 0};
  site.requests[{thread.block->serial, thread.warp(), turn.meeting, turn.next++}].push_back(
      {thread.lane(), bytes, address});
}

}  // namespace moe::simt

extern "C" {

void moe_simt_audit_start() {
  moe::simt::sites.clear();
  moe::simt::auditing = true;
}

const char* moe_simt_audit_stop() {
  static std::string json;
  moe::simt::auditing = false;
  json = "[";
  for (const auto& [key, site] : moe::simt::sites) {
    json += (json.size() > 1 ? ",\n " : "") + moe::simt::describe(std::get<0>(key), site);
  }
  json += "]";
  return json.c_str();
}
}

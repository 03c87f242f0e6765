// SPDX-License-Identifier: Apache-2.0
// Runs every case with one fault planted: main FAULT SEED..., one line a seed with the first thing that was noticed;
// then, if any seed noticed nothing, the address audit of the runs with and without the fault.
#include <cstdlib>

#include "../simt/harness.h"
#include "faults.h"

namespace {

struct Cost { long long shared = 0, global = 0; };

Cost cost_of(const std::string& json) {
  Cost cost;
  for (size_t at = 0; (at = json.find("\"space\": \"", at)) != std::string::npos; ++at) {
    const bool shared = json.compare(at + 10, 6, "shared") == 0;
    const size_t served = json.find("\"served\": ", at);
    (shared ? cost.shared : cost.global) += std::atoll(json.c_str() + served + 10);
  }
  return cost;
}

std::string first_report() {
  for (const moe::test::Case& c : moe::test::cases()) {
    moe::faults::begin_case(c.name);
    const std::string report = c.run();
    if (!report.empty()) return std::string(c.name) + ": " + report;
  }
  return "";
}

Cost audited(int fault) {
  moe::faults::plant(fault);
  moe_simt_audit_start();
  first_report();
  return cost_of(moe_simt_audit_stop());
}

}  // namespace

int main(int count, char** words) {
  const int fault = count > 1 ? std::atoi(words[1]) : -1;
  bool survived = false;
  for (int i = 2; i < count; ++i) {
    setenv("MOE_KERNELS_SIMT_SEED", words[i], 1);
    moe::faults::plant(fault);
    std::string report = first_report();
    report = report.substr(0, report.find("\n  kernel"));
    for (char& c : report) c = c == '\n' ? ' ' : c;
    survived = survived || report.empty();
    std::printf("seed %s %s%s\n", words[i], report.empty() ? "survived" : "caught ", report.c_str());
    std::fflush(stdout);
  }
  if (!survived || fault < 0) return 0;
  const Cost with = audited(fault), without = audited(-1);
  if (with.shared > without.shared || with.global > without.global) {
    std::printf("audit shared %lld -> %lld wavefronts, global %lld -> %lld sectors\n", without.shared, with.shared,
                without.global, with.global);
  }
  return 0;
}

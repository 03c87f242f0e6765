// SPDX-License-Identifier: Apache-2.0
// A stage is run without the planted fault and with it; every byte it writes is compared.
#pragma once
#include <functional>
#include <map>
#include <random>

#include "../../csrc/cuda/launchers.h"
#include "../simt/harness.h"
#include "faults.h"

namespace moe::faults {

/// What a run writes: arrays appended to one string of bytes.
class Outputs {
 public:
  template <class T> void add(const test::Device<T>& array) {
    const std::vector<T> values = array.host();
    bytes_.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

/// `run` launches the stage and adds its outputs. Empty, or the report, or what differs. What a sound run writes does
/// not depend on the seed: it is run once.
inline std::string compare(const std::function<cudaError_t(Outputs&)>& run) {
  static std::map<std::string, std::string> sound;
  const std::string key = next_comparison();
  if (sound.count(key) == 0) {
    const int fault = planted();
    Outputs want;
    plant(-1);
    const std::string unexpected = test::outcome(run(want));
    plant(fault);
    if (!unexpected.empty()) return "without a fault: " + unexpected;
    sound[key] = want.bytes();
  }
  Outputs got;
  const std::string report = test::outcome(run(got));
  if (!report.empty()) return report;
  return got.bytes() == sound[key] ? "" : "values: other outputs";
}

/// Numbers of any dtype, between -2 and 2, the same ones in every run.
template <class T> std::vector<T> numbers(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<T> values(n);
  for (T& v : values) v = T(float(random() % 4001) / 1000.f - 2.f);
  return values;
}

/// Ids in [-1, E]: some slots are absent, at either end, and some experts are never named.
inline std::vector<int32_t> ids(size_t n, int E, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> values(n);
  for (int32_t& v : values) {
    const uint32_t absent = random() % 12;
    v = absent == 0 ? -1 : absent == 1 ? E : int32_t(random() % uint32_t(E)) / 2 * 2 % E;
  }
  return values;
}

template <class T> T* raw(test::Device<T>& array) { return array; }

}  // namespace moe::faults

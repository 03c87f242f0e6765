// SPDX-License-Identifier: Apache-2.0
// The host side of the emulator's test programs: device arrays, and a list of named cases that a program runs. Written
// against the CUDA runtime's names, so the same program is built by nvcc for a GPU.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace moe::test {

/// An array in device memory.
template <class T> class Device {
 public:
  explicit Device(size_t n) : n_(n) {
    if (cudaMalloc(&p_, n * sizeof(T)) != cudaSuccess) std::abort();
  }
  Device(const std::vector<T>& host) : Device(host.size()) {
    cudaMemcpy(p_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  ~Device() { cudaFree(p_); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  operator T*() { return p_; }
  std::vector<T> host() const {
    std::vector<T> values(n_);
    cudaMemcpy(values.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  T* p_ = nullptr;
  size_t n_;
};

struct Case {
  const char* name;
  std::string (*run)();  // empty, or what went wrong
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Register {
  Register(const char* name, std::string (*run)()) { cases().push_back({name, run}); }
};

inline std::string outcome(cudaError_t launched) {
  if (launched == cudaSuccess) launched = cudaDeviceSynchronize();
  return launched == cudaSuccess ? "" : cudaGetErrorString(launched);
}

template <class T> std::string expect_equal(const std::vector<T>& got, const std::vector<T>& want) {
  if (got.size() != want.size()) return "values: wrong size";
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) {
      return "values: [" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", expected " +
             std::to_string(want[i]);
    }
  }
  return "";
}

/// Runs the cases named on the command line, or all; prints one record a case. Returns how many went wrong.
inline int run_cases(int count, char** names) {
  int wrong = 0;
  for (const Case& c : cases()) {
    bool wanted = count <= 1;
    for (int i = 1; i < count; ++i) wanted = wanted || std::strcmp(names[i], c.name) == 0;
    if (!wanted) continue;
    const std::string report = c.run();
    wrong += !report.empty();
    std::printf("%s %s%s%s\n", report.empty() ? "ok" : "WRONG", c.name, report.empty() ? "" : ": ", report.c_str());
    std::fflush(stdout);
  }
  return wrong;
}

}  // namespace moe::test

#define MOE_CASE(name)                                                 \
  static std::string name##_case();                                    \
  static const ::moe::test::Register name##_entry(#name, name##_case); \
  static std::string name##_case()

// SPDX-License-Identifier: Apache-2.0
// What the checks share: a count of failures, random tensors, exact workspaces, threads.
#pragma once
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "moe.h"

namespace checks {

inline int& failures() {
  static int count = 0;
  return count;
}

/// Counts and prints a failure: the parts are the sentence.
template <class... Parts> void expect(bool ok, const Parts&... parts) {
  if (ok) return;
  if (++failures() <= 20) (std::cout << "FAILED: " << ... << parts) << "\n";
}

/// |got - want| <= bound for every element; NaN fails.
template <class Got> void expect_close(const char* name, const Got* got, const std::vector<double>& want,
                                       double bound) {
  for (size_t i = 0; i < want.size(); ++i)
    expect(std::abs(double(got[i]) - want[i]) <= bound, name, "[", i, "]: got ", double(got[i]), ", wanted ", want[i],
           " within ", bound);
}

template <class T> constexpr moe::DType dtype_of();
template <> constexpr moe::DType dtype_of<double>() { return moe::DType::f64; }
template <> constexpr moe::DType dtype_of<float>() { return moe::DType::f32; }
template <> constexpr moe::DType dtype_of<moe::bf16>() { return moe::DType::bf16; }
template <> constexpr moe::DType dtype_of<moe::f16>() { return moe::DType::f16; }

/// Half a unit in the last place of 1.
template <class T> constexpr double rounding() {
  switch (dtype_of<T>()) {
    case moe::DType::f64: return 0x1p-53;
    case moe::DType::f32: return 0x1p-24;
    case moe::DType::bf16: return 0x1p-8;
    default: return 0x1p-11;
  }
}

/// Uniform values of [-1, 1), the same in every run.
template <class T> std::vector<T> random(int64_t count, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<T> values(count);
  for (T& v : values) v = T(float(engine()) * 0x1p-31f - 1.f);
  return values;
}

template <class T> std::vector<double> as_double(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}

/// An output the kernel must write in full: it starts as NaN.
template <class T> std::vector<T> unwritten(int64_t count) { return std::vector<T>(count, T(NAN)); }

/// Aligned memory of exactly this size, so that AddressSanitizer sees the first byte beyond it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

inline void run_threads(int32_t count, void (*body)(int32_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int32_t worker = 0; worker < count; ++worker) threads.emplace_back(body, worker, context);
  for (std::thread& thread : threads) thread.join();
}

/// One thread takes every worker in turn, as in a nested region.
inline void run_in_turn(int32_t count, void (*body)(int32_t, void*), void* context) {
  for (int32_t worker = 0; worker < count; ++worker) body(worker, context);
}

constexpr moe::Workers kPools[] = {{1, run_in_turn}, {3, run_in_turn}, {4, run_threads}};

/// K different experts a token, some slots absent; expert 1 gets none if there are more than K experts beside it.
inline std::vector<int32_t> choose_experts(int64_t T, int64_t E, int64_t K) {
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) {
      const auto id = int32_t((t * 7 + k * (1 + t % 2)) % E);
      ids.push_back((t + k) % 5 == 4 || id == 1 ? -1 : id);
    }
  return ids;
}

struct Index { std::vector<int32_t> expert_offsets, row_to_slot, slot_to_row; };

inline Index index_of(const std::vector<int32_t>& ids, int64_t E, int64_t align) {
  const int64_t S = ids.size(), P = S + E * (align - 1);
  Index index{std::vector<int32_t>(E + 1, -7), std::vector<int32_t>(P, -7), std::vector<int32_t>(S, -7)};
  moe::cpu::permute_index(
      {S, E, P, align, ids.data(), index.expert_offsets.data(), index.row_to_slot.data(), index.slot_to_row.data()});
  return index;
}

}  // namespace checks

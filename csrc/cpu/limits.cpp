// SPDX-License-Identifier: Apache-2.0
#include "limits.h"

#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "isa.h"

namespace moe::cpu {
namespace {

// `sums` independent sums, as many as hide the latency of a multiply-add and fit the registers; all different, so that
// none is computed once for two.
#define MOE_LOOP(name, target, bytes, sums)                                            \
  template <class A> target double name(int64_t steps) {                               \
    typedef A V __attribute__((vector_size(bytes)));                                   \
    V sum[sums];                                                                       \
    const V x = V{} + A(0.999), y = V{} + A(0.001);                                    \
    for (int i = 0; i < sums; ++i) sum[i] = V{} + A(i);                                \
    for (int64_t step = 0; step < steps; ++step)                                       \
      _Pragma("GCC unroll 16") for (int i = 0; i < sums; ++i) sum[i] = sum[i] * x + y; \
    for (int i = 1; i < sums; ++i) sum[0] += sum[i];                                   \
    return double(sum[0][0]);                                                          \
  }                                                                                    \
  template <class A> constexpr double name##_flops = 2.0 * sums * bytes / sizeof(A);

#if defined(__x86_64__)
MOE_LOOP(avx512_loop, __attribute__((target("avx512f"))), 64, 16)
MOE_LOOP(avx2_loop, __attribute__((target("avx2,fma"))), 32, 12)
#endif
MOE_LOOP(portable_loop, , 16, 12)

template <class A> double multiply_add(Isa isa, int64_t steps, double& flops) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return flops = avx512_loop_flops<A>, avx512_loop<A>(steps);
  if (isa == Isa::avx2) return flops = avx2_loop_flops<A>, avx2_loop<A>(steps);
#endif
  return flops = portable_loop_flops<A>, portable_loop<A>(steps);
}

double read_all(const char* data, int64_t bytes) {
  constexpr int64_t kStreams = 16, kRun = 8192, kLine = 64;
  typedef uint64_t V __attribute__((vector_size(16)));
  V all{};
  for (int64_t at = 0; at + kStreams * kRun <= bytes; at += kStreams * kRun)
    for (int64_t i = 0; i < kRun; i += kLine)
      for (int64_t stream = 0; stream < kStreams; ++stream) {
        V parts[kLine / sizeof(V)];
        std::memcpy(parts, data + at + stream * kRun + i, kLine);
        for (const V& part : parts) all ^= part;
      }
  return double(all[0] ^ all[1]);
}

/// Runs body(thread) on all threads at once; seconds from the first start to the last end.
double timed(int threads, const std::function<void(int)>& body) {
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, i);
  body(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

double multiply_add_rate(int threads, bool float64, int64_t steps) {
  const Isa isa = active_isa();
  std::vector<double> results(threads), flops(threads);
  const double seconds = timed(threads, [&](int thread) {
    results[thread] =
        float64 ? multiply_add<double>(isa, steps, flops[thread]) : multiply_add<float>(isa, steps, flops[thread]);
  });
  volatile double kept = results[0];  // so that the loop is not dropped
  (void)kept;
  return flops[0] * double(steps) * threads / seconds;
}

double read_rate(int threads, const void* data, int64_t bytes) {
  std::vector<double> results(threads);
  const int64_t part = bytes / threads / 131072 * 131072;
  const double seconds = timed(
      threads, [&](int thread) { results[thread] = read_all(static_cast<const char*>(data) + thread * part, part); });
  volatile double kept = results[0];
  (void)kept;
  return double(part) * threads / seconds;
}

}  // namespace moe::cpu

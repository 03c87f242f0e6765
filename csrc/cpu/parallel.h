// SPDX-License-Identifier: Apache-2.0
// Tasks over the caller's threads: workers take task numbers from one counter until none is left.
#pragma once
#include <algorithm>
#include <atomic>

#include "../moe.h"

namespace moe::cpu {

/// Calls f(worker, begin, end) for chunks of [0, count). Every chunk runs exactly once, on any worker.
template <class F> void for_chunks(const Workers& workers, int64_t count, int64_t chunk, F&& f) {
  if (count <= 0) return;
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t count, chunk;
    F* f;
  } context;
  context.count = count, context.chunk = chunk, context.f = &f;
  const auto body = [](int32_t worker, void* p) {
    auto& c = *static_cast<Context*>(p);
    for (int64_t begin; (begin = c.next.fetch_add(c.chunk, std::memory_order_relaxed)) < c.count;)
      (*c.f)(worker, begin, std::min(begin + c.chunk, c.count));
  };
  if (workers.count == 1 || count <= chunk) return body(0, &context);
  workers.run(workers.count, body, &context);
}

/// Calls f(worker, task) for every task of [0, count).
template <class F> void for_tasks(const Workers& workers, int64_t count, F&& f) {
  for_chunks(workers, count, 1, [&](int32_t worker, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(worker, task);
  });
}

/// Calls f(worker, task, next) for every task of [0, count); next is what this worker does afterwards, or count.
template <class F> void for_tasks_ahead(const Workers& workers, int64_t count, F&& f) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t count;
    F* f;
  } context;
  context.count = count, context.f = &f;
  const auto body = [](int32_t worker, void* p) {
    auto& c = *static_cast<Context*>(p);
    const auto take = [&] { return std::min(c.next.fetch_add(1, std::memory_order_relaxed), c.count); };
    for (int64_t task = take(), next; task < c.count; task = next) (*c.f)(worker, task, next = take());
  };
  if (workers.count == 1 || count <= 1) return body(0, &context);
  workers.run(workers.count, body, &context);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Cuts a workspace into aligned parts; with a null base it only counts the bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T> T* take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += ceil_div(count * int64_t(sizeof(T)), 64) * 64;
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace moe::cpu

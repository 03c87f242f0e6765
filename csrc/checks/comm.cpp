// SPDX-License-Identifier: Apache-2.0
// csrc/comm without Python, on the stand-in for NCCL: ranks are threads of this process, so that the sanitizers see all
// of them. Right bytes, bounded time, and who may outlive whom. Its argument is the library. Exit 1 on a failure.
#include "comm/communicator.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>

#include "support.h"

using namespace moe::comm;
using checks::expect;

/// The stand-in lets go of nothing, by design; what we lose is reported.
extern "C" const char* __lsan_default_suppressions() { return "leak:standin\n"; }

namespace {

using Clock = std::chrono::steady_clock;
using Bytes = std::vector<char>;
using Table = std::vector<std::vector<int64_t>>;

std::string standin;  // path of the library

const Api& api() { return load(standin, standin); }

struct Faults {
  explicit Faults(const char* list) { setenv("NCCL_STANDIN", list, 1); }
  ~Faults() { unsetenv("NCCL_STANDIN"); }
};

UniqueId fresh_id() {
  UniqueId id{};
  api().get_unique_id(&id);
  return id;
}

/// One thread a rank, joined.
void ranks(int world, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) threads.emplace_back(body, rank);
  for (std::thread& thread : threads) thread.join();
}

/// What a call says that must throw; "" if it does not.
std::string said(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void expect_said(const std::function<void()>& call, const std::string& part, const char* what) {
  const std::string text = said(call);
  expect(text.find(part) != std::string::npos, what, ": \"", text, "\" without \"", part, "\"");
}

char byte_of(int from, int to, int64_t i, int seed) { return char((i * 31 + from * 7 + to * 13 + seed) % 251); }

/// What an exchange that failed may still touch.
void keep(Bytes buffer) {
  static std::mutex mutex;
  static auto* kept = new std::vector<Bytes>;  // for ever: a stream may run until the very end
  std::lock_guard<std::mutex> lock(mutex);
  kept->push_back(std::move(buffer));
}

/// One exchange by a table [from][to] of bytes; buffers live as long as this does.
struct Run {
  Bytes send, receive, want;
  std::shared_ptr<Work> work;
  Run(const std::shared_ptr<Communicator>& comm, const Table& sizes, int seed) {
    const int W = comm->world(), rank = comm->rank();
    std::vector<int64_t> in;
    for (int p = 0; p < W; ++p) {
      for (int64_t i = 0; i < sizes[rank][p]; ++i) send.push_back(byte_of(rank, p, i, seed));
      for (int64_t i = 0; i < sizes[p][rank]; ++i) want.push_back(byte_of(p, rank, i, seed));
      in.push_back(sizes[p][rank]);
    }
    receive.assign(want.size(), char(255));
    work = comm->all_to_all(send.data(), sizes[rank], receive.data(), in, nullptr);
  }
  void check(const char* what) {
    work->wait(20.0);
    expect(work->done() && receive == want, what, ": other bytes came");
  }
};

Table even(int world, int64_t size) { return Table(size_t(world), std::vector<int64_t>(size_t(world), size)); }

Table table(int world, int seed) {
  const int64_t kinds[] = {0, 1, 7, 100, 20000, 70000, 0};
  Table sizes = even(world, 0);
  for (int from = 0; from < world; ++from)
    for (int to = 0; to < world; ++to) sizes[from][to] = kinds[(from * 5 + to * 3 + seed) % 7];
  return sizes;
}

void check_bytes(int world) {
  const UniqueId id = fresh_id();
  ranks(world, [&](int rank) {
    auto comm = Communicator::connect(api(), world, rank, id, 0, 20.0);
    for (int seed = 0; seed < 7; ++seed) Run(comm, table(world, seed), seed).check("one by one");
    std::vector<std::unique_ptr<Run>> under_way;
    for (int seed = 7; seed < 12; ++seed) under_way.push_back(std::make_unique<Run>(comm, table(world, seed), seed));
    for (auto run = under_way.rbegin(); run != under_way.rend(); ++run) (*run)->check("under way");
    Run(comm, even(world, 0), 0).check("nothing");
    comm->close();
    expect_said([&] { Run(comm, even(world, 8), 0); }, "all_to_all after: it was closed", "closed");
    expect_said([&] { comm->close(); }, "close after: it was closed", "closed twice");
  });
}

template <class Function> Function own(const char* name) {
  return reinterpret_cast<Function>(dlsym(dlopen(standin.c_str(), RTLD_NOW), name));
}

/// A stream that joins an exchange goes on only after it; one that it was told of first, before it.
void check_events() {
  constexpr int W = 2, rounds = 20;
  const auto add = own<void (*)(double*, int64_t, double, int64_t, void*)>("standin_add");
  const UniqueId id = fresh_id();
  ranks(W, [&](int rank) {
    auto comm = Communicator::connect(api(), W, rank, id, 0, 20.0);
    CudaStream* stream = nullptr;
    api().stream_create(&stream, kNonBlockingStream);
    std::vector<double> a(64, rank), b(64), c(64);
    const auto bytes = [&](int p) { return p == rank ? 0 : int64_t(sizeof(double)) * 64; };
    const std::vector<int64_t> sizes{bytes(0), bytes(1)};
    const auto raw = [](std::vector<double>& v) { return reinterpret_cast<char*>(v.data()); };
    for (int i = 0; i < rounds; ++i) {
      std::fill(a.begin(), a.end(), rank);
      add(a.data(), 64, 10.0, 2000, stream);  // slow: an exchange that did not wait would send what was before
      auto out = comm->all_to_all(raw(a), sizes, raw(b), sizes, stream);
      out->join(stream);
      add(b.data(), 64, 0.5, 500, stream);
      auto back = comm->all_to_all(raw(b), sizes, raw(c), sizes, stream);
      back->wait(20.0);
      expect(c == std::vector<double>(64, rank + 10.5), "events: ", c[0], " came, wanted ", rank + 10.5);
    }
    comm->close();
  });
}

void check_arguments() {
  const UniqueId id = fresh_id();
  const auto joins = [&](int world, int rank, double seconds) {
    return [=] { Communicator::connect(api(), world, rank, id, 0, seconds); };
  };
  expect_said(joins(0, 0, 1.0), "world_size must be 1 or more, got 0", "world");
  expect_said(joins(2, 2, 1.0), "rank must be in 0..1, got 2", "rank");
  expect_said(joins(2, -1, 1.0), "rank must be in 0..1, got -1", "rank below");
  expect_said(joins(1, 0, 0.0), "timeout must be above 0 s", "timeout");
  expect_said([&] { Communicator::connect(api(), 1, 0, id, 3, 1.0); }, "cudaSetDevice: invalid device", "device");
  expect_said([] { load("/nowhere/libnccl.so", ""); }, "cannot load NCCL: /nowhere/libnccl.so", "library");
  expect_said([] { load("", ""); }, "is not loaded in this process", "library of torch");
  expect_said([] { load("libm.so.6", "libm.so.6"); }, "the library has no ncclGetVersion", "another library");
  auto comm = Communicator::connect(api(), 1, 0, fresh_id(), 0, 5.0);
  const auto sends = [&](std::vector<int64_t> out, std::vector<int64_t> in) {
    return [=] { comm->all_to_all(nullptr, out, nullptr, in, nullptr); };
  };
  expect_said(sends({}, {0}), "send_bytes must be one a rank, 1, got 0", "too few");
  expect_said(sends({0}, {0, 0}), "receive_bytes must be one a rank, 1, got 2", "too many");
  expect_said(sends({-1}, {0}), "0 or more, and within int64 together, got -1", "negative");
  expect_said(sends({8}, {0}), "must be what it sends itself", "itself");
  expect_said([&] { comm->set_timeout(-1.0); }, "timeout must be above 0 s", "timeout later");
  const UniqueId two = fresh_id();
  ranks(2, [&](int rank) {
    auto both = Communicator::connect(api(), 2, rank, two, 0, 5.0);
    const std::vector<int64_t> much{INT64_MAX, INT64_MAX}, none{0, 0};
    expect_said([&] { both->all_to_all(nullptr, much, nullptr, none, nullptr); }, "within int64 together", "too much");
    both->close();
  });
}

/// Seconds that a call took which must throw `part`.
double timed(const std::function<void()>& call, const std::string& part, const char* what) {
  const auto began = Clock::now();
  expect_said(call, part, what);
  return std::chrono::duration<double>(Clock::now() - began).count();
}

void check_faults() {
  constexpr int W = 2;
  struct Scene { const char *faults, *what, *first, *second; };
  const std::string late = "all_to_all did not end within 0.5 s";
  for (const Scene& scene : {Scene{"0:stall:2", "stall", late.c_str(), late.c_str()},
                             {"1:error:2", "error", late.c_str(), "asked for"},
                             {"*:stuck:60 1:stall:2", "stuck abort", late.c_str(), late.c_str()}}) {
    const Faults faults(scene.faults);
    const UniqueId id = fresh_id();
    ranks(W, [&](int rank) {
      auto comm = Communicator::connect(api(), W, rank, id, 0, 20.0);
      comm->set_timeout(0.5);
      Run(comm, even(W, 8), 0).check(scene.what);
      Bytes from(16), into(16);
      const std::vector<int64_t> sizes(W, 8);
      const auto step = [&] { comm->all_to_all(from.data(), sizes, into.data(), sizes, nullptr)->wait(0.5); };
      expect(timed(step, rank ? scene.second : scene.first, scene.what) < 5, scene.what, ": too late");
      expect(timed(step, "all_to_all after: ", scene.what) < 0.4, scene.what, ": again, and slowly");
      keep(std::move(from)), keep(std::move(into));
    });
  }
  const Faults faults("1:late:60");
  const UniqueId id = fresh_id();
  ranks(W, [&](int rank) {
    const auto join = [&] { Communicator::connect(api(), W, rank, id, 0, 0.5); };
    expect(timed(join, "connecting did not end within 0.5 s", "late") < 5, "late: too late");
  });
}

/// A forked child is refused, and letting go there touches nothing.
void check_fork() {
#ifndef __SANITIZE_THREAD__  // it cannot follow a fork beside threads
  auto comm = Communicator::connect(api(), 1, 0, fresh_id(), 0, 20.0);
  const pid_t child = fork();
  if (child == 0) {
    const std::string text = said([&] { Run(comm, even(1, 8), 0); }) + said([&] { comm->abort(); });
    comm.reset();
    const bool both = text.find("all_to_all in a process forked") == text.find("all_to_all") &&
                      text.find("abort in a process forked") != std::string::npos;
    _exit(both ? 7 : 8);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 7, "fork: the child was not refused");
  Run(comm, even(1, 100), 1).check("fork: the parent");
#endif
}

/// Everything that was made is let go of, in any order.
void check_nothing_is_left() {
  const auto alive = own<int (*)()>("standin_alive");
  const int before = alive();
  for (int i = 0; i < 6; ++i) {
    auto comm = Communicator::connect(api(), 1, 0, fresh_id(), 0, 20.0);
    Run(comm, even(1, 10), i).check("to be let go of");
    if (i % 3 == 0) comm->close();
    if (i % 3 == 1) comm->abort();
  }
  expect(alive() == before, "left: ", alive() - before, " communicators, streams or events");
}

/// What is found out only while it is waited for; and a failure aborts at once, not when its owner lets go.
void check_wrong_size() {
  const auto alive = own<int (*)()>("standin_alive");
  const int before = alive();
  const UniqueId id = fresh_id();
  std::vector<std::shared_ptr<Communicator>> comms(2);
  ranks(2, [&](int rank) {
    comms[size_t(rank)] = Communicator::connect(api(), 2, rank, id, 0, 20.0);
    Bytes from(17), into(17);
    const std::vector<int64_t> out(2, 8), in{rank ? 9 : 8, 8};
    const auto step = [&] { comms[size_t(rank)]->all_to_all(from.data(), out, into.data(), in, nullptr)->wait(20.0); };
    if (rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(300));  // the other waits by then
    expect_said(step, "rank 0 sends rank 1 8 bytes, which receives 9", "another size");
    keep(std::move(from)), keep(std::move(into));
  });
  expect(alive() == before + 2, "another size: ", alive() - before, " left, wanted the 2 streams");
}

/// Threads take turns; work keeps its communicator; an abort ends what is in flight, on all ranks.
void check_lives() {
  auto comm = Communicator::connect(api(), 1, 0, fresh_id(), 0, 20.0);
  std::atomic<int> wrong{0};
  ranks(4, [&](int thread) {
    for (int i = 0; i < 25; ++i) {
      Run run(comm, even(1, 100), thread * 25 + i);
      run.work->wait(20.0);
      wrong += run.receive != run.want;
    }
  });
  const UniqueId pair = fresh_id();
  ranks(2, [&](int rank) {  // whichever threads meet, they bring the same
    auto comm = Communicator::connect(api(), 2, rank, pair, 0, 20.0);
    ranks(3, [&](int) {
      for (int i = 0; i < 20; ++i) Run(comm, even(2, 100), 0).check("threads of two ranks");
    });
  });
  expect(wrong == 0, "threads: ", wrong.load(), " wrong results");
  Run run(comm, even(1, 100), 3);
  comm.reset();
  run.check("work after its communicator");
  for (int i = 0; i < 20; ++i) Communicator::connect(api(), 1, 0, fresh_id(), 0, 20.0);
  const UniqueId id = fresh_id();
  ranks(2, [&](int rank) {
    auto both = Communicator::connect(api(), 2, rank, id, 0, 20.0);
    if (rank == 0) {
      both->abort();
      both->abort();
      expect_said([&] { Run(both, even(2, 8), 0); }, "all_to_all after: aborted", "aborted");
      return;
    }
    Bytes from(16), into(16);
    const std::vector<int64_t> sizes(2, 8);
    auto work = both->all_to_all(from.data(), sizes, into.data(), sizes, nullptr);
    expect_said([&] { work->wait(0.5); }, "all_to_all did not end within 0.5 s", "the other aborted");
    expect_said([&] { work->join(nullptr); }, "join after: ", "join after the end");
    keep(std::move(from)), keep(std::move(into));
  });
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::cerr << "usage: comm_checks LIBRARY, the stand-in of tests/nccl_standin.cpp\n";
    return 2;
  }
  standin = words[1];
  for (int world : {1, 2, 3}) check_bytes(world);
  check_events();
  check_arguments();
  check_nothing_is_left();
  check_fork();
  check_wrong_size();
  check_faults();
  check_lives();
  std::cout << (checks::failures() ? "FAILED\n" : "ok\n");
  return checks::failures() != 0;
}

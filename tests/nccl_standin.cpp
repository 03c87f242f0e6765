// SPDX-License-Identifier: Apache-2.0
// NCCL and CUDA's streams without a GPU, for tests: the same names, real processes, and stricter than the originals.
// A stream is a thread that runs its work in order. A send ends only when its receiver has posted and taken it, so what
// would deadlock there stands still here. What would silently corrupt there is an error here: sizes that differ between
// a send and its receive, a call while the communicator is still busy with the last, one after its end.
//
// NCCL_STANDIN, a list of rank:fault:number: "late" seconds before it joins; "error" at its n-th group; "stall", its
// n-th group never begins; "stuck", its abort takes so many seconds. "*" is every rank.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kSuccess = 0, kSystem = 2, kArgument = 4, kUsage = 5, kRemote = 6, kInProgress = 7, kNotReady = 600;
constexpr int kMaxRanks = 8;
constexpr size_t kPiece = 1 << 14;
using Clock = std::chrono::steady_clock;

void rest() { std::this_thread::sleep_for(std::chrono::microseconds(20)); }

// ---- what the processes share

struct Pair {  // one message at a time, in pieces
  std::atomic<int> full;
  int64_t total, length;
  char data[kPiece];
};
struct Segment {
  std::atomic<int> joined[kMaxRanks], closed[kMaxRanks], error;
  char text[256];
  Pair pairs[kMaxRanks][kMaxRanks];
};

double fault(int rank, const std::string& name) {
  const char* list = std::getenv("NCCL_STANDIN");
  std::istringstream entries(list ? list : "");
  for (std::string entry; entries >> entry;) {
    const size_t a = entry.find(':'), b = entry.rfind(':');
    const bool mine = entry.substr(0, a) == "*" || entry.substr(0, a) == std::to_string(rank);
    if (mine && entry.substr(a + 1, b - a - 1) == name) return std::stod(entry.substr(b + 1));
  }
  return 0;
}

// ---- CUDA: streams and events

struct Stream {
  std::mutex mutex;
  std::condition_variable more;
  std::deque<std::function<void()>> work;
  Stream() {
    std::thread([this] {
      for (;;) {
        std::unique_lock<std::mutex> lock(mutex);
        more.wait(lock, [this] { return !work.empty(); });
        auto next = std::move(work.front());
        work.pop_front();
        lock.unlock();
        next();
      }
    }).detach();
  }
  void add(std::function<void()> next) {
    std::lock_guard<std::mutex> lock(mutex);
    work.push_back(std::move(next));
    more.notify_one();
  }
};
struct Marks { std::atomic<int64_t> asked{0}, passed{0}; };
struct Event { std::shared_ptr<Marks> marks = std::make_shared<Marks>(); };

Stream& stream_of(void* handle) {
  static Stream* null_stream = new Stream;  // never taken down: its thread lives as long as the process
  return handle ? *static_cast<Stream*>(handle) : *null_stream;
}

// ---- NCCL

struct Operation {
  bool send;
  char* data;
  int64_t total, moved;
  int peer;
};
struct Comm {
  Segment* shared;
  std::string name;
  int rank, world, busy_polls = 0, groups = 0;
  Clock::time_point joins;
  bool connected = false, closing = false;
  std::atomic<bool> ended{false};
  std::atomic<int> error{kSuccess};
  std::string why;
};
std::atomic<int> alive{0};  // communicators, streams and events that nobody has ended yet
thread_local int depth = 0;
thread_local Comm* group_comm = nullptr;
thread_local void* group_stream = nullptr;
thread_local std::vector<Operation> group;

/// One step of one message; true if anything moved.
bool step(Comm& comm, Operation& op) {
  Pair& pair = op.send ? comm.shared->pairs[comm.rank][op.peer] : comm.shared->pairs[op.peer][comm.rank];
  if (op.send) {
    if (op.moved == op.total || pair.full.load(std::memory_order_acquire)) return false;
    pair.total = op.total;
    pair.length = std::min<int64_t>(int64_t(kPiece), op.total - op.moved);
    std::memcpy(pair.data, op.data + op.moved, size_t(pair.length));
    op.moved += pair.length;
  } else {
    if (!pair.full.load(std::memory_order_acquire)) return false;
    if (pair.total != op.total) {
      std::snprintf(comm.shared->text, sizeof(comm.shared->text),
                    "rank %d sends rank %d %lld bytes, which receives %lld", op.peer, comm.rank, (long long)pair.total,
                    (long long)op.total);
      comm.shared->error.store(kUsage);
      return false;
    }
    std::memcpy(op.data + op.moved, pair.data, size_t(pair.length));
    op.moved += pair.length;
  }
  pair.full.store(op.send ? 1 : 0, std::memory_order_release);
  return true;
}

/// A message at a time for each peer and direction; a send has ended when its last piece was taken.
void run(Comm& comm, std::vector<Operation> ops) {
  for (bool all = false; !all && !comm.ended;) {
    bool moved = false, busy[2][kMaxRanks] = {};
    all = true;
    for (Operation& op : ops) {
      bool& before = busy[op.send][op.peer];
      const bool taken = !op.send || !comm.shared->pairs[comm.rank][op.peer].full.load();
      if (op.moved == op.total && (taken || before)) continue;
      if (!before) moved |= step(comm, op);
      before = true;
      all = false;
    }
    if (const int error = comm.shared->error.load()) {
      comm.why = comm.shared->text;
      comm.error = error;
      break;
    }
    if (!moved) rest();
  }
  // the stream of a failed exchange stands still: events behind it never pass
  while (comm.ended || comm.error) std::this_thread::sleep_for(std::chrono::hours(1));
}

int refuse(Comm* comm, const char* why) {
  if (comm) comm->why = why;
  return kUsage;
}

int add(bool send, const void* data, size_t count, int peer, Comm* comm, void* stream) {
  if (comm == nullptr || comm->ended) return kArgument;
  if (!comm->connected || comm->busy_polls > 0) return refuse(comm, "a call while the last one is in progress");
  if (peer < 0 || peer >= comm->world || peer == comm->rank || count == 0) return kArgument;
  if (depth == 0) return refuse(comm, "outside of a group");
  if (group_comm != nullptr && (group_comm != comm || group_stream != stream)) return refuse(comm, "two in one group");
  group_comm = comm;
  group_stream = stream;
  group.push_back({send, const_cast<char*>(static_cast<const char*>(data)), int64_t(count), 0, peer});
  return kSuccess;
}

}  // namespace

extern "C" {

struct Id { char bytes[128]; };

int ncclGetVersion(int* version) { return *version = 23200, kSuccess; }
int ncclGetUniqueId(Id* id) {
  std::random_device random;
  std::snprintf(id->bytes, sizeof(id->bytes), "/moe_standin_%08x%08x", random(), random());
  return kSuccess;
}
const char* ncclGetErrorString(int code) {
  const char* names[] = {"no error",
                         "cuda",
                         "unhandled system error",
                         "internal",
                         "invalid argument",
                         "invalid usage",
                         "remote process exited or there was a network error",
                         "in progress"};
  return code >= 0 && code < 8 ? names[code] : "unknown";
}
const char* ncclGetLastError(Comm* comm) { return comm ? comm->why.c_str() : ""; }

int ncclCommInitRankConfig(Comm** made, int world, Id id, int rank, void* config) {
  const int blocking = *reinterpret_cast<int*>(static_cast<char*>(config) + 16);
  if (world < 1 || world > kMaxRanks || rank < 0 || rank >= world || blocking != 0) return kArgument;
  const int file = shm_open(id.bytes, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Segment)) != 0) return kSystem;
  void* memory = mmap(nullptr, sizeof(Segment), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return kSystem;
  Comm* comm = *made = new Comm;
  ++alive;
  comm->shared = static_cast<Segment*>(memory);  // zeros: nobody joined, nothing sent
  comm->name = id.bytes;
  comm->rank = rank;
  comm->world = world;
  comm->joins = Clock::now() + std::chrono::milliseconds(int64_t(fault(rank, "late") * 1000));
  return kInProgress;
}

int ncclCommGetAsyncError(Comm* comm, int* state) {
  if (comm == nullptr || comm->ended) return kArgument;
  const auto all = [&](const std::atomic<int>* ranks) {
    return std::all_of(ranks, ranks + comm->world, [](const std::atomic<int>& r) { return r.load() != 0; });
  };
  if (!comm->connected) {
    if (Clock::now() >= comm->joins) comm->shared->joined[comm->rank] = 1;
    comm->connected = all(comm->shared->joined);
    if (comm->connected) shm_unlink(comm->name.c_str());
  }
  if (comm->busy_polls > 0) --comm->busy_polls;
  const bool busy = !comm->connected || comm->busy_polls > 0 || (comm->closing && !all(comm->shared->closed));
  *state = comm->error ? comm->error.load() : busy ? kInProgress : kSuccess;
  return kSuccess;
}

int ncclGroupStart() { return ++depth, kSuccess; }
int ncclSend(const void* data, size_t n, int, int peer, Comm* c, void* s) { return add(true, data, n, peer, c, s); }
int ncclRecv(void* data, size_t n, int, int peer, Comm* c, void* s) { return add(false, data, n, peer, c, s); }
int ncclGroupEnd() {
  if (depth == 0) return kUsage;
  if (--depth > 0 || group_comm == nullptr) return kSuccess;
  Comm* comm = group_comm;
  void* stream = group_stream;
  auto ops = std::move(group);
  group.clear();
  group_comm = nullptr;
  ++comm->groups;
  if (comm->groups == int(fault(comm->rank, "error"))) {
    comm->why = "asked for by the test";
    comm->error = kRemote;
  }
  const bool stalled = comm->error || comm->groups == int(fault(comm->rank, "stall"));
  stream_of(stream).add([comm, ops, stalled] {
    while (stalled && !comm->ended) rest();
    run(*comm, ops);
  });
  comm->busy_polls = 3;  // a launch takes its time
  return kInProgress;
}

int ncclCommFinalize(Comm* comm) {
  if (comm == nullptr || comm->ended || !comm->connected) return kArgument;
  comm->shared->closed[comm->rank] = 1;
  comm->closing = true;
  return kInProgress;
}
int ncclCommDestroy(Comm* comm) {
  if (comm == nullptr || comm->ended || !comm->closing) return kUsage;
  comm->ended = true;
  --alive;
  return kSuccess;
}
int ncclCommAbort(Comm* comm) {
  if (comm == nullptr || comm->ended) return kArgument;
  std::this_thread::sleep_for(std::chrono::duration<double>(fault(comm->rank, "stuck")));
  comm->ended = true;  // its memory stays: a use after the end is told from one before
  --alive;
  shm_unlink(comm->name.c_str());
  return kSuccess;
}

int cudaSetDevice(int device) { return device == 0 ? kSuccess : 101; }
const char* cudaGetErrorString(int code) { return code == 101 ? "invalid device ordinal" : "error"; }
int cudaStreamCreateWithFlags(void** made, unsigned) { return ++alive, *made = new Stream, kSuccess; }
int cudaStreamDestroy(void*) { return --alive, kSuccess; }
int cudaEventCreateWithFlags(void** made, unsigned) { return ++alive, *made = new Event, kSuccess; }
int cudaEventDestroy(void* event) { return --alive, delete static_cast<Event*>(event), kSuccess; }
int cudaEventRecord(void* event, void* stream) {
  auto marks = static_cast<Event*>(event)->marks;
  const int64_t mark = ++marks->asked;
  stream_of(stream).add([marks, mark] { marks->passed = mark; });
  return kSuccess;
}
int cudaEventQuery(void* event) {
  auto& marks = *static_cast<Event*>(event)->marks;
  return marks.passed >= marks.asked ? kSuccess : kNotReady;
}
int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
  auto marks = static_cast<Event*>(event)->marks;
  const int64_t mark = marks->asked;
  stream_of(stream).add([marks, mark] {
    while (marks->passed < mark) rest();
  });
  return kSuccess;
}
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void* stream) {
  stream_of(stream).add([=] { std::memmove(to, from, bytes); });
  return kSuccess;
}

int standin_alive() { return alive; }

/// Work of the test's own on a stream: adds `value` to `count` doubles, after so many microseconds.
void standin_add(double* data, int64_t count, double value, int64_t microseconds, void* stream) {
  stream_of(stream).add([=] {
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
    for (int64_t i = 0; i < count; ++i) data[i] += value;
  });
}
}

// SPDX-License-Identifier: Apache-2.0
#include "communicator.h"

#include <unistd.h>

#include <chrono>
#include <future>
#include <stdexcept>
#include <thread>

namespace moe::comm {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kPoll = std::chrono::microseconds(50);

Clock::time_point after(double seconds) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::string in_seconds(double seconds) {
  std::string text = std::to_string(seconds);
  return text.substr(0, text.find('.') + 2) + " s";
}

void positive(double seconds) {
  if (!(seconds > 0)) throw std::invalid_argument("NcclCommunicator: timeout must be above 0 s");
}

}  // namespace

// ---- Work

Work::Work(std::shared_ptr<Communicator> owner, const Api& api) : owner_(std::move(owner)), api_(api) {
  owner_->cuda(api.event_create(&ready_, kNoTiming), "cudaEventCreateWithFlags");
  owner_->cuda(api.event_create(&finished_, kNoTiming), "cudaEventCreateWithFlags");
}

Work::~Work() {
  if (getpid() != owner_->pid_) return;  // the events are the parent's
  if (ready_ != nullptr) api_.event_destroy(ready_);
  if (finished_ != nullptr) api_.event_destroy(finished_);
}

void Work::join(CudaStream* stream) {
  owner_->same_process("join");
  std::lock_guard<std::mutex> lock(owner_->mutex_);
  owner_->usable("join");
  owner_->cuda(api_.stream_wait(stream, finished_, 0), "cudaStreamWaitEvent");
}

bool Work::done() {
  owner_->same_process("done");
  std::lock_guard<std::mutex> lock(owner_->mutex_);
  owner_->usable("done");
  return owner_->poll(finished_, "all_to_all");
}

void Work::wait(double seconds) {
  const auto deadline = after(seconds);
  while (!done()) {
    if (Clock::now() > deadline) {
      std::lock_guard<std::mutex> lock(owner_->mutex_);
      owner_->usable("wait");
      owner_->fail("all_to_all did not end within " + in_seconds(seconds));
    }
    std::this_thread::sleep_for(kPoll);
  }
}

// ---- Communicator

Communicator::Communicator(const Api& api, int world, int rank, int device, double seconds)
    : api_(api), world_(world), rank_(rank), device_(device), seconds_(seconds), pid_(getpid()) {}

std::shared_ptr<Communicator> Communicator::connect(const Api& api, int world, int rank, const UniqueId& id, int device,
                                                    double seconds) {
  if (world < 1)
    throw std::invalid_argument("NcclCommunicator: world_size must be 1 or more, got " + std::to_string(world));
  if (rank < 0 || rank >= world)
    throw std::invalid_argument("NcclCommunicator: rank must be in 0.." + std::to_string(world - 1) + ", got " +
                                std::to_string(rank));
  positive(seconds);
  std::shared_ptr<Communicator> made(new Communicator(api, world, rank, device, seconds));
  std::lock_guard<std::mutex> lock(made->mutex_);
  made->init(id);
  return made;
}

void Communicator::init(const UniqueId& id) {
  cuda(api_.set_device(device_), "cudaSetDevice");
  cuda(api_.stream_create(&stream_, kNonBlockingStream), "cudaStreamCreateWithFlags");
  Config config;
  nccl(api_.init(&comm_, world_, id, rank_, &config), "ncclCommInitRankConfig");
  settle("connecting");
}

Communicator::~Communicator() {
  if (getpid() != pid_) return;  // NCCL's threads and the device are the parent's
  abort_locked();
  if (stream_ != nullptr) api_.stream_destroy(stream_);
}

/// Asked before the lock, which another thread of the parent may hold for ever in a forked child.
void Communicator::same_process(const char* what) const {
  if (getpid() != pid_)
    throw std::runtime_error(std::string("NcclCommunicator: ") + what +
                             " in a process forked from the one that connected; connect in the process that uses it");
}

void Communicator::usable(const char* what) const {
  if (!why_.empty()) throw std::runtime_error(std::string("NcclCommunicator: ") + what + " after: " + why_);
}

void Communicator::fail(const std::string& what) {
  why_ = what;
  abort_locked();
  throw std::runtime_error("NcclCommunicator: rank " + std::to_string(rank_) + ": " + what);
}

void Communicator::cuda(int result, const char* what) {
  if (result != kSuccess) fail(std::string(what) + ": " + api_.cuda_error_string(result));
}

void Communicator::nccl(int result, const char* what) {
  if (result == kSuccess || result == kInProgress) return;
  const char* detail = api_.last_error(comm_);
  fail(std::string(what) + ": " + api_.error_string(result) +
       (detail && *detail ? std::string(" (") + detail + ")" : ""));
}

/// Waits until the communicator has taken what it was given.
void Communicator::settle(const char* what) {
  const auto deadline = after(seconds_);
  for (;;) {
    int state = kSuccess;
    nccl(api_.async_error(comm_, &state), "ncclCommGetAsyncError");
    nccl(state, what);
    if (state == kSuccess) return;
    if (Clock::now() > deadline) fail(std::string(what) + " did not end within " + in_seconds(seconds_));
    std::this_thread::sleep_for(kPoll);
  }
}

/// True if the event has passed. An error of the communicator, a peer's end for one, raises, and is asked for first:
/// what was cut short passes its event too.
bool Communicator::poll(CudaEvent* event, const char* what) {
  int state = kSuccess;
  nccl(api_.async_error(comm_, &state), "ncclCommGetAsyncError");
  nccl(state, what);
  const int result = api_.event_query(event);
  if (result != kNotReady) cuda(result, what);
  return result == kSuccess;
}

std::vector<size_t> Communicator::offsets(const char* name, const std::vector<int64_t>& bytes) const {
  const std::string wanted = std::string("all_to_all: ") + name + " must be ";
  if (bytes.size() != size_t(world_))
    throw std::invalid_argument(wanted + "one a rank, " + std::to_string(world_) + ", got " +
                                std::to_string(bytes.size()));
  std::vector<size_t> begin{0};
  for (int64_t n : bytes) {
    if (n < 0 || int64_t(begin.back()) > INT64_MAX - n)
      throw std::invalid_argument(wanted + "0 or more, and within int64 together, got " + std::to_string(n));
    begin.push_back(begin.back() + size_t(n));
  }
  return begin;
}

std::shared_ptr<Work> Communicator::all_to_all(const char* send, const std::vector<int64_t>& send_bytes, char* receive,
                                               const std::vector<int64_t>& receive_bytes, CudaStream* stream) {
  same_process("all_to_all");
  std::lock_guard<std::mutex> lock(mutex_);
  usable("all_to_all");
  const std::vector<size_t> from = offsets("send_bytes", send_bytes), to = offsets("receive_bytes", receive_bytes);
  if (send_bytes[size_t(rank_)] != receive_bytes[size_t(rank_)])
    throw std::invalid_argument("all_to_all: receive_bytes of the rank itself must be what it sends itself");
  cuda(api_.set_device(device_), "cudaSetDevice");
  auto work = std::make_shared<Work>(shared_from_this(), api_);
  cuda(api_.event_record(work->ready_, stream), "cudaEventRecord");
  cuda(api_.stream_wait(stream_, work->ready_, 0), "cudaStreamWaitEvent");
  const size_t self = size_t(rank_);
  if (send_bytes[self] > 0)
    cuda(api_.copy(receive + to[self], send + from[self], size_t(send_bytes[self]), kDeviceToDevice, stream_),
         "cudaMemcpyAsync");
  int failed = kSuccess;
  const auto keep = [&](int result) {
    if (failed == kSuccess && result != kInProgress) failed = result;
  };
  keep(api_.group_start());
  for (int step = 1; step < world_; ++step) {  // rotated: not everybody begins with rank 0
    const int next = (rank_ + step) % world_, last = (rank_ - step + world_) % world_;
    // a size of 0 is skipped by both sides, as both know it
    if (const int64_t n = send_bytes[size_t(next)])
      keep(api_.send(send + from[size_t(next)], size_t(n), kBytes, next, comm_, stream_));
    if (const int64_t n = receive_bytes[size_t(last)])
      keep(api_.recv(receive + to[size_t(last)], size_t(n), kBytes, last, comm_, stream_));
  }
  keep(api_.group_end());  // always, or this thread stays in the group
  nccl(failed, "all_to_all");
  settle("all_to_all");
  cuda(api_.event_record(work->finished_, stream_), "cudaEventRecord");
  return work;
}

void Communicator::set_timeout(double seconds) {
  positive(seconds);
  same_process("set_timeout");
  std::lock_guard<std::mutex> lock(mutex_);
  seconds_ = seconds;
}

void Communicator::abort() {
  same_process("abort");
  std::lock_guard<std::mutex> lock(mutex_);
  if (why_.empty()) why_ = "aborted";
  abort_locked();
}

/// NCCL's abort has hung before; it gets a thread and a limit, and is left behind after that.
void Communicator::abort_locked() {
  if (comm_ == nullptr) return;
  auto ended = std::make_shared<std::promise<void>>();
  std::future<void> end = ended->get_future();
  std::thread([ended, comm = comm_, abort = api_.abort] {
    abort(comm);
    ended->set_value();
  }).detach();
  comm_ = nullptr;
  if (end.wait_for(std::chrono::duration<double>(seconds_)) != std::future_status::ready)
    stream_ = nullptr;  // it may still be in use
}

void Communicator::close() {
  same_process("close");
  std::lock_guard<std::mutex> lock(mutex_);
  usable("close");
  nccl(api_.finalize(comm_), "ncclCommFinalize");
  settle("closing");
  NcclComm* comm = comm_;
  comm_ = nullptr;
  why_ = "it was closed";
  api_.destroy(comm);
}

}  // namespace moe::comm

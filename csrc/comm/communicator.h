// SPDX-License-Identifier: Apache-2.0
// An all-to-all of uneven sizes over NCCL, with deadlines. One communicator and one stream of its own, so that no other
// user's calls can interleave with ours. W ranks. Nothing here waits longer than its deadline: a peer that is late or
// gone ends in an abort and a std::runtime_error, after which the communicator is of no more use.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nccl_api.h"

namespace moe::comm {

class Communicator;

/// One all-to-all under way. Its two events belong to it alone: one event an edge, never a shared one.
class Work {
 public:
  Work(std::shared_ptr<Communicator> owner, const Api& api);
  ~Work();
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  /// The stream goes on only after this all-to-all; the host does not wait.
  void join(CudaStream* stream);
  /// True once all rows have come. Throws if the communicator has failed.
  bool done();
  /// Waits on the host; throws, and aborts the communicator, after so many seconds.
  void wait(double seconds);

 private:
  friend class Communicator;
  std::shared_ptr<Communicator> owner_;
  const Api& api_;
  CudaEvent* ready_ = nullptr;     // the caller's stream has written the rows to send
  CudaEvent* finished_ = nullptr;  // the rows have come
};

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  /// Joins W ranks that hold the same id; waits for them for so many seconds.
  static std::shared_ptr<Communicator> connect(const Api& api, int world, int rank, const UniqueId& id, int device,
                                               double seconds);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  /// Starts sending send_bytes[p] to every rank p and receiving receive_bytes[p] from it. Both buffers hold the ranks'
  /// parts one after the other; `stream` has produced `send` and may still be using `receive`. Every rank calls it in
  /// the same order with matching sizes: the sizes have to be agreed upon before.
  std::shared_ptr<Work> all_to_all(const char* send, const std::vector<int64_t>& send_bytes, char* receive,
                                   const std::vector<int64_t>& receive_bytes, CudaStream* stream);

  /// Ends everything in flight, here and soon on the others. Safe to repeat; never throws for a failed abort.
  void abort();
  /// Ends in order, together with the others.
  void close();

  /// From now on, of posting an exchange, of closing and of an abort.
  void set_timeout(double seconds);

  int world() const { return world_; }
  int rank() const { return rank_; }

 private:
  friend class Work;
  Communicator(const Api& api, int world, int rank, int device, double seconds);
  void init(const UniqueId& id);
  void same_process(const char* what) const;
  void usable(const char* what) const;
  void settle(const char* what);
  bool poll(CudaEvent* event, const char* what);
  [[noreturn]] void fail(const std::string& what);
  void cuda(int result, const char* what);
  void nccl(int result, const char* what);
  void abort_locked();
  std::vector<size_t> offsets(const char* name, const std::vector<int64_t>& bytes) const;

  const Api& api_;
  const int world_, rank_, device_;
  double seconds_;
  const pid_t pid_;
  std::mutex mutex_;
  NcclComm* comm_ = nullptr;
  CudaStream* stream_ = nullptr;
  std::string why_;  // why it is of no more use
};

}  // namespace moe::comm

// SPDX-License-Identifier: Apache-2.0
// The part of NCCL and of the CUDA runtime that a communicator needs, as a table filled by dlopen. Neither is linked
// and neither's header is included, so one build runs with any NCCL 2 from 2.18 on, the one that torch has loaded first
// of all; and a stand-in with the same names runs where there is no GPU. Handles are opaque, results are the libraries'
// own.
#pragma once

#include <climits>
#include <cstddef>
#include <string>

namespace moe::comm {

struct NcclComm;
struct CudaStream;
struct CudaEvent;

constexpr int kSuccess = 0;
constexpr int kInProgress = 7;  // ncclInProgress
constexpr int kNotReady = 600;  // cudaErrorNotReady
constexpr int kBytes = 0;       // ncclInt8
constexpr unsigned kNonBlockingStream = 1;
constexpr unsigned kNoTiming = 2;
constexpr int kDeviceToDevice = 3;

struct UniqueId { char bytes[128]; };

/// ncclConfig_t as of 2.18.3. A newer NCCL reads `size` and `version` and takes its defaults for what came later.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21803;
  int blocking = 0;
  int cga_cluster_size = INT_MIN;  // INT_MIN: not set
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};

struct Api {
  int (*get_version)(int*);
  int (*get_unique_id)(UniqueId*);
  int (*init)(NcclComm**, int world, UniqueId, int rank, Config*);
  int (*async_error)(NcclComm*, int*);
  int (*finalize)(NcclComm*);
  int (*destroy)(NcclComm*);
  int (*abort)(NcclComm*);
  int (*group_start)();
  int (*group_end)();
  int (*send)(const void*, size_t count, int dtype, int peer, NcclComm*, CudaStream*);
  int (*recv)(void*, size_t count, int dtype, int peer, NcclComm*, CudaStream*);
  const char* (*error_string)(int);
  const char* (*last_error)(NcclComm*);

  int (*set_device)(int);
  int (*stream_create)(CudaStream**, unsigned flags);
  int (*stream_destroy)(CudaStream*);
  int (*event_create)(CudaEvent**, unsigned flags);
  int (*event_destroy)(CudaEvent*);
  int (*event_record)(CudaEvent*, CudaStream*);
  int (*event_query)(CudaEvent*);
  int (*stream_wait)(CudaStream*, CudaEvent*, unsigned flags);
  int (*copy)(void* to, const void* from, size_t bytes, int kind, CudaStream*);
  const char* (*cuda_error_string)(int);
};

/// Fills the table. An empty path means the library that this process has already loaded (torch's). Throws
/// std::runtime_error that names what is missing. The libraries stay loaded.
const Api& load(const std::string& nccl_path, const std::string& cuda_path);

}  // namespace moe::comm

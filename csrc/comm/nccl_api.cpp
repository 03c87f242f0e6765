// SPDX-License-Identifier: Apache-2.0
#include "nccl_api.h"

#include <dlfcn.h>

#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace moe::comm {
namespace {

void* open(const std::string& path, std::initializer_list<const char*> loaded, const char* what) {
  if (!path.empty()) {
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    throw std::runtime_error(std::string("NcclCommunicator: cannot load ") + what + ": " + dlerror());
  }
  for (const char* name : loaded)
    if (void* library = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return library;
  throw std::runtime_error(std::string("NcclCommunicator: ") + what +
                           " is not loaded in this process (a torch for CUDA loads it); name its path");
}

template <class Function>
void find(void* library, const char* name, Function& slot) {
  slot = reinterpret_cast<Function>(dlsym(library, name));
  if (slot == nullptr) throw std::runtime_error(std::string("NcclCommunicator: the library has no ") + name);
}

void fill(Api& api, void* nccl, void* cuda) {
  find(nccl, "ncclGetVersion", api.get_version);
  find(nccl, "ncclGetUniqueId", api.get_unique_id);
  find(nccl, "ncclCommInitRankConfig", api.init);
  find(nccl, "ncclCommGetAsyncError", api.async_error);
  find(nccl, "ncclCommFinalize", api.finalize);
  find(nccl, "ncclCommDestroy", api.destroy);
  find(nccl, "ncclCommAbort", api.abort);
  find(nccl, "ncclGroupStart", api.group_start);
  find(nccl, "ncclGroupEnd", api.group_end);
  find(nccl, "ncclSend", api.send);
  find(nccl, "ncclRecv", api.recv);
  find(nccl, "ncclGetErrorString", api.error_string);
  find(nccl, "ncclGetLastError", api.last_error);
  find(cuda, "cudaSetDevice", api.set_device);
  find(cuda, "cudaStreamCreateWithFlags", api.stream_create);
  find(cuda, "cudaStreamDestroy", api.stream_destroy);
  find(cuda, "cudaEventCreateWithFlags", api.event_create);
  find(cuda, "cudaEventDestroy", api.event_destroy);
  find(cuda, "cudaEventRecord", api.event_record);
  find(cuda, "cudaEventQuery", api.event_query);
  find(cuda, "cudaStreamWaitEvent", api.stream_wait);
  find(cuda, "cudaMemcpyAsync", api.copy);
  find(cuda, "cudaGetErrorString", api.cuda_error_string);
}

}  // namespace

const Api& load(const std::string& nccl_path, const std::string& cuda_path) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, std::string>, std::unique_ptr<Api>> tables;
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Api>& table = tables[{nccl_path, cuda_path}];
  if (table == nullptr) {
    auto fresh = std::make_unique<Api>();
    void* nccl = open(nccl_path, {"libnccl.so.2"}, "NCCL");
    fill(*fresh, nccl, open(cuda_path, {"libcudart.so.13", "libcudart.so.12"}, "the CUDA runtime"));
    int version = 0;
    if (fresh->get_version(&version) != kSuccess || version < 21800)
      throw std::runtime_error("NcclCommunicator: needs NCCL 2.18 or newer, found " + std::to_string(version));
    table = std::move(fresh);
  }
  return *table;
}

}  // namespace moe::comm

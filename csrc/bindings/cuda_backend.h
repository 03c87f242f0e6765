// SPDX-License-Identifier: Apache-2.0
// The stages on CUDA tensors: queued on torch's current stream, on the tensor's device. No wait, no host read, no
// memory but torch's, so that a CUDA graph can capture every op. For cuda_ops.cpp alone.
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/launchers.h"
#include "queue.h"

#define MOE_LIBRARY moe_kernels
#define MOE_KEY CUDA

namespace moe::binding {
namespace {

// torch.cuda.current_stream(device). Linking the call would keep this library from loading on a CPU torch, so it is
// looked up in the libtorch_cuda that is loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  require(get, "this torch has no CUDA: torch.version.cuda is None");
  void* stream = nullptr;
  require(get(device, &stream) == 0, "torch could not give the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

template <class Args> void run(const Tensor& like, Args&& args) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
#ifdef MOE_NVRTC
  succeed("the CUDA driver", nvrtc::use_device(device));
#endif
  const Tensor space = device_workspace(like, args);
  queue(args, current_stream(device));
}

}  // namespace
}  // namespace moe::binding

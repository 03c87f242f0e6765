// SPDX-License-Identifier: Apache-2.0
// What the ops share at the border to torch (its stable ABI only): errors, threads, dtypes, allocation.
#pragma once
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../cpu/isa.h"
#include "../moe.h"

namespace moe::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A torch call that fails inside an op says only "API call failed at ..."; from torch 2.13 on the reason can be asked
// for.
inline std::string with_reason(const std::string& text) {
  if (text.find("API call failed at") == std::string::npos) return text;
  static const auto get =
      reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* reason = get ? get() : nullptr;
  return reason ? reason : "a torch call failed, torch printed the reason on stderr: " + text;
}

// Every op is registered through this, so that the Python exception is the same whatever the torch.
template <auto F> void boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  try {
    TORCH_BOX(F)(stack, inputs, outputs);
  } catch (const std::exception& e) {
    throw std::runtime_error(with_reason(e.what()));
  }
}

// torch's own pool: honours torch.set_num_threads, serial inside a parallel region. Its threads do not survive a fork.
inline std::atomic<bool> forked{false};
inline Workers torch_workers() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  (void)registered;
  cpu::active_isa();  // a wrong MOE_KERNELS_ISA is reported here, not on a worker
  return {forked ? 1 : int32_t(torch::stable::get_num_threads()),
          [](int32_t count, void (*body)(int32_t, void*), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(int32_t(worker), context);
            });
          }};
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      throw std::runtime_error(std::string(op) + ": " + name + " must be float64, float32, bfloat16 or float16, got " +
                               torch::headeronly::toString(t.scalar_type()));
  }
}
inline ScalarType scalar_of(DType t) {
  constexpr ScalarType types[] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  return types[int(t)];
}
inline ScalarType acc_of(DType t) { return t == DType::f64 ? ScalarType::Double : ScalarType::Float; }

inline void want(const char* op, const char* name, const Tensor& t, std::vector<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(d) == sizes[d];
  if (same) return;
  std::string wanted, came;
  for (int64_t s : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(s);
  for (int64_t d = 0; d < t.dim(); ++d) came += (d ? ", " : "") + std::to_string(t.size(d));
  throw std::runtime_error(std::string(op) + ": " + name + " must be [" + wanted + "], got [" + came + "]");
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.dim() == 2 && t.size(1) > 0 && t.stride(1) == 1 ? t : dense(t);
}
inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}
/// Asks for huge pages where fresh memory is large: gigabytes of small pages take longer to be handed out than to fill.
inline void ask_for_huge_pages(Tensor& t, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kLarge = 32 << 20;
  if (bytes < kLarge) return;
  const uintptr_t begin = (uintptr_t(t.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), (bytes - kPage) / kPage * kPage, MADV_HUGEPAGE);  // advice: may fail
#endif
}
inline Tensor to_type(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) return dense(t);
  Tensor out = empty(t, {t.sizes().begin(), t.sizes().end()}, type);
  torch::stable::copy_(out, t);
  return out;
}
inline MaybeTensor to_type(const MaybeTensor& t, ScalarType type) { return t ? MaybeTensor(to_type(*t, type)) : t; }
inline const void* data_of(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }
template <class Args> Tensor workspace(const Tensor& like, int64_t (*bytes)(const Args&, const Workers&), Args& args,
                                       const Workers& workers) {
  Tensor space = empty(like, {bytes(args, workers)}, ScalarType::Byte);
  args.workspace = space.mutable_data_ptr();
  return space;
}

/// int32 ids in [-1, E), whatever came; flat. `run` fills args.narrow, on the device of the ids.
template <class Run> Tensor narrow_ids(Run&& run, const char* op, const Tensor& topk_ids, int64_t E,
                                       const MaybeTensor& expert_map) {
  const auto is_id = [](const Tensor& t) {
    return t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long;
  };
  require(is_id(topk_ids) && (!expert_map || is_id(*expert_map)), op,
          ": topk_ids and expert_map must be int32 or int64");
  require(topk_ids.numel() < std::numeric_limits<int32_t>::max(), op, ": more than 2^31 slots");
  const Tensor ids = dense(topk_ids);
  const MaybeTensor map = expert_map ? MaybeTensor(dense(*expert_map)) : expert_map;
  Tensor out = empty(ids, {ids.numel()}, ScalarType::Int);
  run(ids, NarrowIdsArgs{ids.numel(), E, map ? map->numel() : 0, ids.scalar_type() == ScalarType::Long,
                         map && map->scalar_type() == ScalarType::Long, ids.const_data_ptr(), data_of(map),
                         out.mutable_data_ptr<int32_t>()});
  return out;
}

/// Strides of w [E, rows, cols] as (n, k) = (rows, cols); (cols, rows) where transposed.
inline Weight weight_of(const Tensor& w, bool transposed) {
  const int64_t row = w.stride(transposed ? 2 : 1), col = w.stride(transposed ? 1 : 2);
  return {w.const_data_ptr(), w.stride(0), row, col, kPanel * row, false};
}

}  // namespace moe::binding

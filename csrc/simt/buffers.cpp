// SPDX-License-Identifier: Apache-2.0
// Registered device memory: what a kernel may touch, and what of it nobody has written.
#include <link.h>

#include <algorithm>

#include "report.h"

namespace moe::simt {
namespace {

struct Buffer {
  uintptr_t begin, end;
  std::string name;
  std::vector<bool> unwritten;  // by byte; empty = all written
};
std::vector<Buffer> buffers;

struct Image { uintptr_t begin = 0, end = 0; };  // the module that holds the kernel: its constants may be read
Image image_of(const void* kernel) {
  static const void* known = nullptr;
  static Image image;
  if (kernel == known) return image;
  known = kernel;
  image = {};
  struct Search {
    uintptr_t kernel;
    Image found;
  } search{reinterpret_cast<uintptr_t>(kernel), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto* const s = static_cast<Search*>(data);
        Image all{UINTPTR_MAX, 0};
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          all.begin = std::min(all.begin, begin);
          all.end = std::max(all.end, begin + info->dlpi_phdr[i].p_memsz);
        }
        if (s->kernel < all.begin || s->kernel >= all.end) return 0;
        s->found = all;
        return 1;
      },
      &search);
  return image = search.found;
}

bool is_argument(uintptr_t address, uint32_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(machine.arguments);
  return address >= begin && address + bytes <= begin + machine.arguments_bytes;
}

std::string nearest(uintptr_t address) {
  const Buffer* best = nullptr;
  uint64_t distance = UINT64_MAX;
  for (const Buffer& buffer : buffers) {
    const uint64_t d = address < buffer.begin ? buffer.begin - address : address - std::min(address, buffer.end);
    if (d < distance) {
      distance = d;
      best = &buffer;
    }
  }
  if (best == nullptr) return "nothing is registered";
  const size_t size = best->end - best->begin;
  if (address < best->begin) {
    return format("%zu bytes before '%s' of %zu bytes", size_t(best->begin - address), best->name.c_str(), size);
  }
  return format("at byte %zu of '%s', which has %zu", size_t(address - best->begin), best->name.c_str(), size);
}

}  // namespace

const char* verb(Access kind) {
  static const char* const verbs[] = {"read", "write", "atomic read", "atomic update"};
  return verbs[int(kind)];
}

bool check_bounds(const Touch& access, uintptr_t address) {
  bool inside = buffers.empty(), written = buffers.empty();
  for (Buffer& buffer : buffers) {
    if (address < buffer.begin || address + access.bytes > buffer.end) continue;
    inside = true;
    if (buffer.unwritten.empty()) {
      written = true;
      continue;
    }
    const auto begin = buffer.unwritten.begin() + long(address - buffer.begin), end = begin + long(access.bytes);
    if (access.overwrites()) std::fill(begin, end, false);
    if (std::find(begin, end, true) == end) written = true;
  }
  if (hooked && inside && !access.overwrites() && !access.is_box && !written) {
    fault("uninitialised",
          format("%s of %u bytes at %s, which nobody has written", verb(access.kind), access.bytes,
                 name_of_address(address).c_str()),
          access.site);
  }
  if (inside && !buffers.empty()) return false;
  if (is_argument(address, access.bytes)) return true;
  const Image image = image_of(machine.config.kernel);
  if (image.begin <= address && address < image.end) {
    if (!writes(access.kind)) return true;
    fault("bounds", format("%s of a static variable: kernels have none", verb(access.kind)), access.site);
  }
  if (inside) return false;
  fault("bounds",
        format("%s of %u bytes outside device memory, %s", verb(access.kind), access.bytes, nearest(address).c_str()),
        access.site);
}

std::string name_of_address(uintptr_t address) {
  if (running != nullptr || !machine.resident.empty()) {
    for (const auto& block : machine.resident) {
      const uintptr_t offset = address - reinterpret_cast<uintptr_t>(block->shared);
      if (offset < machine.config.shared_bytes) return format("shared +0x%zx", size_t(offset));
    }
  }
  for (const Buffer& buffer : buffers) {
    if (buffer.begin <= address && address < buffer.end) {
      return format("'%s' +0x%zx", buffer.name.c_str(), size_t(address - buffer.begin));
    }
  }
  return format("global memory (%s)", nearest(address).c_str());
}

void register_buffer(const void* p, size_t bytes, const char* name, bool written) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  buffers.push_back({begin, begin + bytes, name, std::vector<bool>(written ? 0 : bytes, true)});
}

void mark_written(const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  for (Buffer& buffer : buffers) {
    if (buffer.unwritten.empty() || begin >= buffer.end || begin + bytes <= buffer.begin) continue;
    const uintptr_t from = std::max(begin, buffer.begin), to = std::min(begin + bytes, buffer.end);
    std::fill(buffer.unwritten.begin() + long(from - buffer.begin), buffer.unwritten.begin() + long(to - buffer.begin),
              false);
  }
}

void unregister_buffer(const void* p) {
  for (size_t i = buffers.size(); i-- > 0;) {
    if (buffers[i].begin != reinterpret_cast<uintptr_t>(p)) continue;
    buffers.erase(buffers.begin() + long(i));
    return;
  }
}

}  // namespace moe::simt

// SPDX-License-Identifier: Apache-2.0
// A libcuda.so.1 without a GPU: it takes what csrc/nvrtc/driver.cpp hands to the driver and writes it down. One device
// of compute capability 9.0. Nothing runs.
#include <cstdint>
#include <cstring>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string written;
void* context = nullptr;
int loads = 0;

// As in cuda.h.
struct Attribute {
  int id;
  char pad[4];
  union {
    char bytes[64];
    int value;
  };
};
struct Config {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned count;
};

}  // namespace

EXPORT const char* fake_log() { return written.c_str(); }
EXPORT int cuInit(unsigned) { return 0; }
EXPORT int cuGetErrorString(int error, const char** text) {
  *text = error == 700 ? "an illegal memory access was encountered" : "invalid argument";
  return 0;
}
EXPORT int cuCtxGetCurrent(void** out) { return *out = context, 0; }
EXPORT int cuCtxSetCurrent(void* in) {
  written += "context\n";
  return context = in, 0;
}
EXPORT int cuCtxGetDevice(int* device) { return *device = 0, context ? 0 : 201; }
EXPORT int cuDeviceGet(int* handle, int ordinal) { return *handle = ordinal, 0; }
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 227 * 1024;
  return 0;
}
EXPORT int cuDevicePrimaryCtxRetain(void** out, int) { return *out = &written, 0; }
EXPORT int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
EXPORT int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void*, const uint64_t* size, const uint64_t*,
                                  const unsigned* box, const unsigned*, int, int swizzle, int, int) {
  std::memset(map, 0, 128);
  written += "map " + std::to_string(type) + " " + std::to_string(swizzle);
  for (unsigned i = 0; i < rank; ++i) written += " " + std::to_string(size[i]) + "/" + std::to_string(box[i]);
  written += "\n";
  return 0;
}
EXPORT int cuMemsetD8Async(void*, unsigned char value, size_t bytes, void*) {
  written += "memset " + std::to_string(value) + " " + std::to_string(bytes) + "\n";
  return 0;
}
EXPORT int cuModuleLoadData(void** module, const void* image) {
  if (std::memcmp(image,
                  "\x7f"
                  "ELF",
                  4) != 0)
    return 200;
  written += "load " + std::to_string(++loads) + "\n";
  return *module = const_cast<void*>(image), 0;
}
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
  const auto* image = static_cast<const char*>(module);
  uint64_t sections = 0;
  uint16_t size = 0, count = 0;  // of an ELF file the section headers come last
  std::memcpy(&sections, image + 40, 8), std::memcpy(&size, image + 58, 2), std::memcpy(&count, image + 60, 2);
  const std::string all(image, sections + uint64_t(size) * count);
  if (all.find(std::string(".text.") + name + '\0') == std::string::npos) return 500;
  return *function = new std::string(name), 0;
}
EXPORT int cuFuncSetAttribute(void*, int attribute, int value) {
  written += "attribute " + std::to_string(attribute) + " " + std::to_string(value) + "\n";
  return 0;
}
EXPORT int cuLaunchKernelEx(const Config* c, void* function, void** arguments, void**) {
  const auto text = [](uint64_t v) { return std::to_string(v) + " "; };
  written += "launch " + *static_cast<std::string*>(function) + " " + text(c->grid[0]) + text(c->grid[1]) +
             text(c->block[0]) + text(c->shared_bytes) + text(reinterpret_cast<uintptr_t>(c->stream));
  for (unsigned i = 0; i < c->count; ++i) written += text(c->attributes[i].id) + text(c->attributes[i].value);
  uint64_t first = 0;  // of the first parameter
  std::memcpy(&first, arguments[0], 8);
  written += "first " + std::to_string(first) + "\n";
  return context ? 0 : 201;
}

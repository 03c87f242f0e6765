// SPDX-License-Identifier: Apache-2.0
// Prints the maps of csrc/cuda/probe.cuh as JSON, from a GPU if nvcc built it and from the emulator if g++ did. The
// products take their registers from standard input: probe mma KIND, then the words of a and b of `count` products.
#include "../../csrc/cuda/probe.cuh"

#include <cstdint>

#include "harness.h"

using namespace moe::cuda;
using moe::test::Device;
using moe::test::outcome;

namespace {

template <class T> void print(const char* name, const std::vector<T>& values, bool last = false) {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) std::printf("%s%lld", i ? "," : "", static_cast<long long>(values[i]));
  std::printf("]%s\n", last ? "" : ",");
}

bool ok(cudaError_t launched) {
  const std::string report = outcome(launched);
  if (!report.empty()) std::fprintf(stderr, "%s\n", report.c_str());
  return report.empty();
}

template <int Matrices, bool Transposed> bool tiles(const char* name) {
  const LaunchShape shape{dim3(1), dim3(32), Matrices * 128};
  Device<uint32_t> registers(32 * Matrices);
  if (!ok(launch(shape, nullptr, probe_ldmatrix<Matrices, Transposed>, static_cast<uint32_t*>(registers))))
    return false;
  print((std::string("ldmatrix.") + name).c_str(), registers.host());
  Device<uint16_t> elements(64 * Matrices);
  if (!ok(launch(shape, nullptr, probe_stmatrix<Matrices, Transposed>, static_cast<uint16_t*>(elements)))) return false;
  print((std::string("stmatrix.") + name).c_str(), elements.host());
  return true;
}

int all_tiles() {
  std::printf("{");
  Device<uint32_t> elected(std::vector<uint32_t>(1, 0));
  const bool good = tiles<1, false>("x1") && tiles<2, false>("x2") && tiles<4, false>("x4") &&
                    tiles<1, true>("x1.trans") && tiles<2, true>("x2.trans") && tiles<4, true>("x4.trans") &&
                    ok(launch({dim3(1), dim3(32)}, nullptr, probe_elect, static_cast<uint32_t*>(elected)));
  print("elected", elected.host(), true);
  std::printf("}\n");
  return good ? 0 : 1;
}

template <Product kind, int A, int B> int products() {
  std::vector<uint32_t> words;
  for (unsigned word; std::scanf("%u", &word) == 1;) words.push_back(word);
  const size_t count = words.size() / (32 * (A + B));
  const auto middle = words.begin() + long(count) * 32 * A;
  Device<uint32_t> a(std::vector<uint32_t>(words.begin(), middle)), b(std::vector<uint32_t>(middle, words.end()));
  Device<float> d(count * 32 * 4);
  if (!ok(launch({dim3(unsigned(count)), dim3(32)}, nullptr, probe_mma<kind, A, B>, static_cast<const uint32_t*>(a),
                 static_cast<const uint32_t*>(b), static_cast<float*>(d)))) {
    return 1;
  }
  std::printf("{");
  print("d", d.host(), true);
  std::printf("}\n");
  return 0;
}

}  // namespace

int main(int count, char** words) {
  const std::string kind = count > 1 ? words[1] : "tiles";
  if (kind == "tiles") return all_tiles();
  if (kind == "m16n8k16_bf16") return products<Product::m16n8k16_bf16, 4, 2>();
  if (kind == "m16n8k16_f16") return products<Product::m16n8k16_f16, 4, 2>();
  if (kind == "m16n8k8_bf16") return products<Product::m16n8k8_bf16, 2, 1>();
  if (kind == "m16n8k8_tf32") return products<Product::m16n8k8_tf32, 4, 2>();
  std::fprintf(stderr, "probe tiles | m16n8k16_bf16 | m16n8k16_f16 | m16n8k8_bf16 | m16n8k8_tf32\n");
  return 2;
}

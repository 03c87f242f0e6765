// SPDX-License-Identifier: Apache-2.0
// Prints the maps of csrc/cuda/probe_sm90.cuh as JSON, or what disagrees with the tables that standard input holds.
//   probe_sm90 accumulators   {"N": {"rows": [...], "columns": [...]}, ...}
//   probe_sm90 a_registers    128 x 4 words in; {"d": [128 x 8]}
//   probe_sm90 descriptors    tiles in, see tests/test_simt_hw_sm90.py; a line for every wrong element, then how many
//   probe_sm90 boxes          maps in; a line of elements for each
#include <cinttypes>
#include <iostream>

#include "../../csrc/cuda/probe_sm90.cuh"
#include "harness.h"

using namespace moe::cuda;
using moe::test::Device;
using moe::test::outcome;

namespace {

bool ok(cudaError_t launched) {
  const std::string report = outcome(launched);
  if (!report.empty()) std::fprintf(stderr, "%s\n", report.c_str());
  return report.empty();
}

template <class T> std::vector<T> read(size_t n) {
  std::vector<T> values(n);
  for (T& v : values) std::cin >> v;
  return values;
}

template <class T> void print(const std::vector<T>& values) {
  std::printf("[");
  for (size_t i = 0; i < values.size(); ++i) std::printf("%s%lld", i ? "," : "", static_cast<long long>(values[i]));
  std::printf("]");
}

template <int N> bool accumulator() {
  Device<float> rows(128 * N / 2), columns(128 * N / 2);
  if (!ok(launch({dim3(1), dim3(128), 1024 + 2048 + N * 32}, nullptr, probe_accumulator<N>, static_cast<float*>(rows),
                 static_cast<float*>(columns)))) {
    return false;
  }
  std::printf("%s\"%d\": {\"rows\": ", N == 8 ? "{" : ", ", N);
  print(rows.host());
  std::printf(", \"columns\": ");
  print(columns.host());
  std::printf(N == 256 ? "}}\n" : "}");
  return true;
}

int a_registers() {
  Device<uint32_t> registers(read<uint32_t>(128 * 4));
  Device<float> d(128 * 8);
  if (!ok(launch({dim3(1), dim3(128), 2048}, nullptr, probe_a_registers, static_cast<const uint32_t*>(registers),
                 static_cast<float*>(d)))) {
    return 1;
  }
  std::printf("{\"d\": ");
  print(d.host());
  std::printf("}\n");
  return 0;
}

// Any value in the wrong place shows, unless it comes from a multiple of 251 away.
int value_of(int64_t mn, int64_t k) { return int((mn * 37 + k * 11) % 251); }

struct Tile {
  int is_a, transposed, columns, mn, k, count;
  std::vector<uint16_t> image;
  std::vector<uint64_t> descriptors;
  std::vector<int> first_mn, first_k;
};

template <int N, bool IsA, int Transposed> bool check(const Tile& tile, int64_t& wrong) {
  Device<uint16_t> image(tile.image);
  Device<uint64_t> descriptors(tile.descriptors);
  Device<float> out(size_t(tile.count) * 128 * (N / 2));
  const auto bytes = uint32_t(1024 + 2048 + tile.image.size() * 2);
  if (!ok(launch({dim3(1), dim3(128), bytes}, nullptr, probe_descriptors<N, IsA, Transposed>,
                 static_cast<const uint16_t*>(image), int(tile.image.size()), static_cast<const uint64_t*>(descriptors),
                 tile.count, static_cast<float*>(out)))) {
    return false;
  }
  const std::vector<float> d = out.host();
  for (int i = 0; i < tile.count; ++i) {
    for (int thread = 0; thread < 128; ++thread) {
      for (int r = 0; r < N / 2; ++r) {
        const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (r / 2 % 2),
                  column = 8 * (r / 4) + 2 * (thread % 4) + r % 2;
        if (!IsA && row >= 16) continue;
        const int want = IsA ? value_of(tile.first_mn[i] + row, tile.first_k[i] + column)
                             : value_of(tile.first_mn[i] + column, tile.first_k[i] + row);
        if (d[(size_t(i) * 128 + size_t(thread)) * (N / 2) + size_t(r)] != float(want)) ++wrong;
      }
    }
  }
  return true;
}

template <int N> bool check_b(const Tile& tile, int64_t& wrong) {
  return tile.transposed ? check<N, false, 1>(tile, wrong) : check<N, false, 0>(tile, wrong);
}

// A tile: is_a transposed columns mn k count, the offset of every element, then of each descriptor its 64 bits for a
// tile at address 0 and the first mn and k it selects.
int descriptors() {
  int64_t checked = 0, wrong = 0;
  for (Tile tile; std::cin >> tile.is_a >> tile.transposed >> tile.columns >> tile.mn >> tile.k >> tile.count;) {
    const auto offsets = read<uint32_t>(size_t(tile.mn) * size_t(tile.k));
    tile.image.assign(offsets.size(), 0);
    for (size_t i = 0; i < offsets.size(); ++i) {
      tile.image[offsets[i]] = moe::bf16(float(value_of(int64_t(i) / tile.k, int64_t(i) % tile.k))).bits;
    }
    tile.descriptors.clear(), tile.first_mn.clear(), tile.first_k.clear();
    for (int i = 0; i < tile.count; ++i) {
      uint64_t bits;
      int mn, k;
      std::cin >> bits >> mn >> k;
      tile.descriptors.push_back(bits), tile.first_mn.push_back(mn), tile.first_k.push_back(k);
    }
    const int64_t before = wrong;
    const bool ran = tile.is_a ? tile.transposed ? check<16, true, 1>(tile, wrong) : check<16, true, 0>(tile, wrong)
                     : tile.columns == 8   ? check_b<8>(tile, wrong)
                     : tile.columns == 64  ? check_b<64>(tile, wrong)
                     : tile.columns == 128 ? check_b<128>(tile, wrong)
                                           : check_b<256>(tile, wrong);
    if (!ran) return 1;
    if (wrong != before) std::printf("tile of %d x %d: %" PRId64 " elements wrong\n", tile.mn, tile.k, wrong - before);
    checked += tile.count;
  }
  std::printf("%" PRId64 " descriptors, %" PRId64 " elements wrong\n", checked, wrong);
  return 0;
}

template <int D>
bool boxes_of(const std::vector<int64_t>& size, const std::vector<int64_t>& box, int swizzle, int count) {
  std::vector<int32_t> at;
  std::vector<uint32_t> to;
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < D; ++j) at.push_back(read<int32_t>(1)[0]);
    to.push_back(read<uint32_t>(1)[0]);
  }
  size_t elements = 1, bytes = 2;
  for (int j = 0; j < D; ++j) elements *= size_t(size[size_t(j)]), bytes *= size_t(box[size_t(j)]);
  std::vector<uint16_t> values(elements);
  for (size_t i = 0; i < elements; ++i) values[i] = uint16_t(i * 40503 >> 3);
  Device<uint16_t> tensor(values);
  BoxedTensor boxed{static_cast<uint16_t*>(tensor), moe::DType::bf16, D, {}, {}, {}, swizzle};
  int64_t stride = 2;
  for (int j = 0; j < D; ++j) {
    boxed.size[j] = size[size_t(j)], boxed.box[j] = box[size_t(j)], boxed.stride[j] = stride;
    stride *= size[size_t(j)];
  }
  TensorMap map;
  if (encode_tensor_map(boxed, &map) != cudaSuccess) {
    std::fprintf(stderr, "the tensor map was refused\n");
    return false;
  }
  const auto all = uint32_t(bytes) * uint32_t(count);
  Device<int32_t> corners(at);
  Device<uint32_t> offsets(to);
  Device<uint16_t> out(all / 2);
  if (!ok(launch({dim3(1), dim3(128), 1024 + all + 8}, nullptr, probe_boxes<D>, map,
                 static_cast<const int32_t*>(corners), static_cast<const uint32_t*>(offsets), count, uint32_t(bytes),
                 all, static_cast<uint16_t*>(out)))) {
    return false;
  }
  print(out.host());
  std::printf("\n");
  return true;
}

// A map: rank, sizes, boxes, swizzle, count, then of each copy its corner and its byte offset in shared memory.
int boxes() {
  for (size_t rank; std::cin >> rank;) {
    const auto size = read<int64_t>(rank), box = read<int64_t>(rank);
    const int swizzle = read<int>(1)[0], count = read<int>(1)[0];
    if (!(rank == 2   ? boxes_of<2>(size, box, swizzle, count)
          : rank == 3 ? boxes_of<3>(size, box, swizzle, count)
                      : boxes_of<4>(size, box, swizzle, count))) {
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  const std::string kind = count > 1 ? words[1] : "";
  if (kind == "accumulators") {
    const bool good = accumulator<8>() && accumulator<16>() && accumulator<32>() && accumulator<64>() &&
                      accumulator<96>() && accumulator<128>() && accumulator<160>() && accumulator<192>() &&
                      accumulator<256>();
    return good ? 0 : 1;
  }
  if (kind == "a_registers") return a_registers();
  if (kind == "descriptors") return descriptors();
  if (kind == "boxes") return boxes();
  std::fprintf(stderr, "probe_sm90 accumulators | a_registers | descriptors | boxes\n");
  return 2;
}

// SPDX-License-Identifier: Apache-2.0
// permute, for the mutation suite: the index by one block and by several, aligned or not, then rows of every width.
#include "stage_cases.h"

namespace moe::faults {
namespace {

cudaError_t index(int64_t S, int E, int align, bool inverse, Outputs& out) {
  const int64_t P = S + int64_t(E) * (align - 1);
  test::Device<int32_t> chosen(ids(size_t(S), E, 7)), offsets(size_t(E) + 1), rows(static_cast<size_t>(P)),
      slots(static_cast<size_t>(S));
  test::Device<uint8_t> workspace(size_t(cuda::permute_index_workspace_bytes(S, E)));
  PermuteIndexArgs args{};
  args.S = S, args.E = E, args.P = P, args.align = align, args.topk_ids = raw(chosen);
  args.expert_offsets = raw(offsets), args.row_to_slot = raw(rows), args.slot_to_row = inverse ? raw(slots) : nullptr;
  args.workspace = raw(workspace);
  const cudaError_t error = cuda::permute_index(args, nullptr);
  out.add(offsets), out.add(rows);
  if (inverse) out.add(slots);
  return error;
}

template <class T> cudaError_t rows_of(DType dtype, int P, int H, int K, int stride, Outputs& out) {
  std::vector<int32_t> slots(size_t(P), -1);
  for (int r = 0; r < P; r += 2) slots[size_t(r)] = P - 1 - r;
  test::Device<T> x(numbers<T>(size_t(P + K - 1) / K * stride, 8)), x_rows(size_t(P) * H);
  test::Device<int32_t> row_to_slot(slots);
  PermuteArgs args{};
  args.P = P, args.H = H, args.K = K, args.dtype = dtype, args.x = raw(x), args.x_stride = stride;
  args.row_to_slot = raw(row_to_slot), args.x_rows = raw(x_rows);
  const cudaError_t error = cuda::permute(args, nullptr);
  out.add(x_rows);
  return error;
}

template <class Id> cudaError_t narrowed(bool mapped, Outputs& out) {
  std::vector<Id> given = {3, -1, 0, 9, 12, 5, 1, 2, 8, 700, 11, 4, 10, Id(-7), 6, 7};
  std::vector<Id> map = {0, 2, -1, 1, 4, 3, 5, 99, 2, 1, 0, 6};
  test::Device<Id> chosen(given), table(map);
  test::Device<int32_t> narrow(given.size());
  NarrowIdsArgs args{};
  args.S = int64_t(given.size()), args.E = 6, args.map_size = int64_t(map.size());
  args.ids64 = args.map64 = sizeof(Id) == 8;
  args.topk_ids = raw(chosen), args.expert_map = mapped ? raw(table) : nullptr, args.narrow = raw(narrow);
  const cudaError_t error = cuda::narrow_ids(args, nullptr);
  out.add(narrow);
  return error;
}

}  // namespace

MOE_CASE(narrow_plain) {
  return compare([](Outputs& out) { return narrowed<int32_t>(false, out); });
}
MOE_CASE(narrow_mapped) {
  return compare([](Outputs& out) { return narrowed<int64_t>(true, out); });
}
MOE_CASE(index_one_block) {
  return compare([](Outputs& out) { return index(150, 5, 4, true, out); });
}
MOE_CASE(index_exact) {
  return compare([](Outputs& out) { return index(64, 32, 1, false, out); });
}
MOE_CASE(index_tiles) {
  return compare([](Outputs& out) { return index(333, 37, 8, true, out); });
}
MOE_CASE(index_many_experts) {
  return compare([](Outputs& out) { return index(330, 300, 1, true, out); });
}
MOE_CASE(rows_16) {
  return compare([](Outputs& out) { return rows_of<float>(DType::f32, 11, 532, 3, 536, out); });
}
MOE_CASE(rows_8) {
  return compare([](Outputs& out) { return rows_of<float>(DType::f32, 5, 6, 1, 10, out); });
}
MOE_CASE(rows_4) {
  return compare([](Outputs& out) { return rows_of<float>(DType::f32, 5, 7, 2, 7, out); });
}
MOE_CASE(rows_2) {
  return compare([](Outputs& out) { return rows_of<bf16>(DType::bf16, 9, 5, 2, 5, out); });
}

}  // namespace moe::faults

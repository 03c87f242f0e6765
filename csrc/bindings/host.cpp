// SPDX-License-Identifier: Apache-2.0
// _host: what Python asks of the compiled code without torch. pybind11 ties it to one Python version, never to a torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/choice.h"
#include "../cpu/isa.h"
#include "../cpu/limits.h"
#include "../cuda/grouped_gemm_config.h"
#include "comm.h"

namespace py = pybind11;
using namespace moe::cpu;

namespace {

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= int(best_isa()); ++level) names.push_back(isa_name(Isa(level)));
  return names;
}

/// How one panel of a product runs: the ways that refuse it and why, the way taken, its columns, and its depth (0:
/// all). halves: gate and up side by side.
py::tuple panel_way(int64_t row_stride, int64_t col_stride, bool padded, int64_t bytes, int64_t n, int64_t rows,
                    bool halves) {
  const int64_t acc_bytes = bytes == 8 ? 8 : 4;
  const int64_t width = halves || n > moe::kPanel ? kPair : moe::kPanel;
  const PanelCase panel{row_stride, col_stride, padded, bytes == acc_bytes, std::min(n, kPair), width, rows, false};
  std::vector<std::pair<std::string, std::string>> refused;
  const WayRow* way = kWays;
  for (; way->refusal(panel) != nullptr; ++way) refused.emplace_back(way->name, way->refusal(panel));
  const int64_t depth = way->way == Way::packed ? depth_block(acc_bytes) : 0;
  return py::make_tuple(refused, way->name, width, depth);
}

/// Which row of the CUDA table computes a grouped product: the rows that refuse it and why, and the row taken.
py::tuple cuda_product(int arch, int64_t E, int64_t S, int64_t N, int64_t K, int dtype, bool in_16_bytes,
                       bool allow_tf32) {
  using namespace moe::cuda;
  const ProductShape shape{E, S, N, K, moe::DType(dtype), allow_tf32, in_16_bytes};
  const Processor on = processor_of(arch);
  std::vector<std::pair<std::string, std::string>> refused;
  for (const TileRow& row : kTileRows)
    if (const char* why = refusal(row, shape, on)) refused.emplace_back(row.name, why);
  return py::make_tuple(refused, kTileRows[choose_config(shape, on)].name);
}

/// Into how many parts the rows of an expert are cut for a gradient [E, N, K] of weights.
int64_t cuda_wgrad_parts(int arch, int64_t E, int64_t S, int64_t N, int64_t K, int dtype, bool in_16_bytes,
                         bool allow_tf32) {
  using namespace moe::cuda;
  return wgrad_parts({E, S, N, K, moe::DType(dtype), allow_tf32, in_16_bytes}, processor_of(arch));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  bind_comm(m);
  m.attr("build_info") = py::dict(py::arg("compiler") = __VERSION__, py::arg("cplusplus") = long(__cplusplus));
  m.def(
      "active_isa", [] { return isa_name(active_isa()); },
      "The level in use; RuntimeError if MOE_KERNELS_ISA is no level.");
  m.def("isa_levels", &isa_levels, "The levels that this processor has, lowest first.");
  m.attr("token_block") = kTokenBlock;
  m.attr("dot_rows") = kDotRows;
  m.attr("few_tokens") = moe::kFewTokens;
  m.def("panel_way", &panel_way, "(refused, way, columns, depth) of a product with a weight of these strides.",
        py::arg("row_stride"), py::arg("col_stride"), py::arg("padded"), py::arg("bytes"), py::arg("n"),
        py::arg("rows"), py::arg("halves"));
  m.def("cuda_product", &cuda_product, "(refused, row) of a grouped product on an architecture such as 90.",
        py::arg("arch"), py::arg("E"), py::arg("S"), py::arg("N"), py::arg("K"), py::arg("dtype"),
        py::arg("in_16_bytes"), py::arg("allow_tf32") = false);
  m.def("cuda_wgrad_parts", &cuda_wgrad_parts, "The parts of an expert's rows in a gradient of weights.",
        py::arg("arch"), py::arg("E"), py::arg("S"), py::arg("N"), py::arg("K"), py::arg("dtype"),
        py::arg("in_16_bytes"), py::arg("allow_tf32") = false);
  m.def("multiply_add_rate", &multiply_add_rate, "Operations a second of a loop of multiply-adds on registers.",
        py::arg("threads"), py::arg("float64"), py::arg("steps"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "read_rate",
      [](int threads, uintptr_t address, int64_t bytes) {
        return read_rate(threads, reinterpret_cast<const void*>(address), bytes);
      },
      "Bytes a second of reading memory at an address.", py::arg("threads"), py::arg("address"), py::arg("bytes"),
      py::call_guard<py::gil_scoped_release>());
}

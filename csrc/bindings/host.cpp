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

namespace py = pybind11;
using namespace moe::cpu;

namespace {

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= int(best_isa()); ++level) names.push_back(isa_name(Isa(level)));
  return names;
}

/// How one panel of a product runs: the ways that refuse it and why, the way taken, its columns, and its depth (0:
/// all). columns: at most so many at a time; 0 lets the layout say.
py::tuple panel_way(int64_t row_stride, int64_t col_stride, bool padded, int64_t bytes, int64_t n, int64_t rows,
                    int64_t columns) {
  const int64_t acc_bytes = bytes == 8 ? 8 : 4;
  if (columns == 0) columns = panel_columns({nullptr, 0, row_stride, col_stride, 0, padded});
  const PanelCase panel{row_stride, col_stride, padded, bytes == acc_bytes, std::min(n, columns), rows, false};
  std::vector<std::pair<std::string, std::string>> refused;
  const WayRow* way = kWays;
  for (; way->refusal(panel) != nullptr; ++way) refused.emplace_back(way->name, way->refusal(panel));
  const int64_t depth = way->way == Way::packed ? depth_block(acc_bytes, panel.width()) : 0;
  return py::make_tuple(refused, way->name, panel.width(), depth);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.attr("build_info") = py::dict(py::arg("compiler") = __VERSION__, py::arg("cplusplus") = long(__cplusplus));
  m.def(
      "active_isa", [] { return isa_name(active_isa()); },
      "The level in use; RuntimeError if MOE_KERNELS_ISA is no level.");
  m.def("isa_levels", &isa_levels, "The levels that this processor has, lowest first.");
  m.attr("token_block") = kTokenBlock;
  m.def("panel_way", &panel_way, "(refused, way, columns, depth) of a product with a weight of these strides.",
        py::arg("row_stride"), py::arg("col_stride"), py::arg("padded"), py::arg("bytes"), py::arg("n"),
        py::arg("rows"), py::arg("columns"));
}

// SPDX-License-Identifier: Apache-2.0
// _host: what Python asks of the compiled code without torch. pybind11 ties it to one Python version, never to a torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/limits.h"

namespace py = pybind11;
using namespace moe::cpu;

namespace {

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= int(best_isa()); ++level) names.push_back(isa_name(Isa(level)));
  return names;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.attr("build_info") = py::dict(py::arg("compiler") = __VERSION__, py::arg("cplusplus") = long(__cplusplus));
  m.def(
      "active_isa", [] { return isa_name(active_isa()); },
      "The level in use; RuntimeError if MOE_KERNELS_ISA is no level.");
  m.def("isa_levels", &isa_levels, "The levels that this processor has, lowest first.");
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

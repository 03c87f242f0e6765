// SPDX-License-Identifier: Apache-2.0
// _host: what Python asks of the compiled code without torch. pybind11 ties it to one Python version, never to a torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"

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
}

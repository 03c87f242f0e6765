// SPDX-License-Identifier: Apache-2.0
// _host.NcclCommunicator: csrc/comm for Python. Addresses and streams are integers; the lock of the interpreter is
// released while anything waits.
#include "comm.h"

#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../comm/communicator.h"

namespace py = pybind11;
using namespace moe::comm;

namespace {

using Sizes = std::vector<int64_t>;

UniqueId id_of(const std::string& bytes) {
  UniqueId id;
  if (bytes.size() != sizeof(id.bytes))
    throw std::invalid_argument("NcclCommunicator: unique_id must be 128 bytes, got " + std::to_string(bytes.size()));
  std::memcpy(id.bytes, bytes.data(), sizeof(id.bytes));
  return id;
}

CudaStream* stream_of(uintptr_t handle) { return reinterpret_cast<CudaStream*>(handle); }

}  // namespace

void bind_comm(py::module_& m) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<Work, std::shared_ptr<Work>>(m, "NcclWork", "One all-to-all under way.")
      .def(
          "join", [](Work& work, uintptr_t stream) { work.join(stream_of(stream)); },
          "That stream goes on only after it; the host does not wait.", py::arg("stream"), release)
      .def("done", &Work::done, "Whether all rows have come; RuntimeError if the communicator failed.", release)
      .def("wait", &Work::wait, "Waits on the host; RuntimeError, and the end of the communicator, after the timeout.",
           py::arg("timeout"), release);
  py::class_<Communicator, std::shared_ptr<Communicator>>(m, "NcclCommunicator", "All-to-all over NCCL with deadlines.")
      .def(py::init([](int world, int rank, const py::bytes& id, int device, double timeout, const std::string& nccl,
                       const std::string& cuda) {
             const UniqueId unique = id_of(id);
             py::gil_scoped_release released;
             return Communicator::connect(load(nccl, cuda), world, rank, unique, device, timeout);
           }),
           "Joins world_size ranks with the same unique_id. Empty paths: the libraries that torch has loaded.",
           py::arg("world_size"), py::arg("rank"), py::arg("unique_id"), py::kw_only(), py::arg("device") = 0,
           py::arg("timeout") = 30.0, py::arg("nccl") = "", py::arg("cuda") = "")
      .def_static(
          "unique_id",
          [](const std::string& nccl, const std::string& cuda) {
            UniqueId id;
            const Api& api = load(nccl, cuda);
            if (const int result = api.get_unique_id(&id); result != kSuccess)
              throw std::runtime_error(std::string("NcclCommunicator: ncclGetUniqueId: ") + api.error_string(result));
            return py::bytes(id.bytes, sizeof(id.bytes));
          },
          "128 bytes that one rank makes and all join with.", py::arg("nccl") = "", py::arg("cuda") = "")
      .def_static(
          "version",
          [](const std::string& nccl, const std::string& cuda) {
            int version = 0;
            load(nccl, cuda).get_version(&version);
            return version;
          },
          "Of NCCL: 22304 is 2.23.4.", py::arg("nccl") = "", py::arg("cuda") = "")
      .def(
          "all_to_all",
          [](Communicator& comm, uintptr_t send, const Sizes& send_bytes, uintptr_t receive, const Sizes& receive_bytes,
             uintptr_t stream) {
            return comm.all_to_all(reinterpret_cast<const char*>(send), send_bytes, reinterpret_cast<char*>(receive),
                                   receive_bytes, stream_of(stream));
          },
          "Starts sending send_bytes[p] to every rank p, from one buffer to another; returns an NcclWork. The caller "
          "keeps both buffers until it is done.",
          py::arg("send"), py::arg("send_bytes"), py::arg("receive"), py::arg("receive_bytes"), py::arg("stream") = 0,
          release)
      .def("set_timeout", &Communicator::set_timeout, "Seconds from now on, for what is not connecting.",
           py::arg("timeout"), release)
      .def("abort", &Communicator::abort, "Ends everything in flight.", release)
      .def("close", &Communicator::close, "Ends in order, with all ranks.", release)
      .def_property_readonly("world_size", &Communicator::world)
      .def_property_readonly("rank", &Communicator::rank);
}

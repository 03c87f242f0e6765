// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

/// Adds NcclCommunicator to the module.
void bind_comm(pybind11::module_& m);

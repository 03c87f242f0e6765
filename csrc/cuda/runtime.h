// SPDX-License-Identifier: Apache-2.0
// The few runtime calls that a launcher makes, whoever answers them: the toolkit's runtime (included by device.h), the
// emulator, or the driver where kernels are compiled at first use. Kernels need none of them.
#pragma once
#include "device.h"
#if defined(MOE_NVRTC)
#include "../nvrtc/driver.h"
#elif defined(MOE_SIMT)
#include "../simt/host_api.h"
#endif

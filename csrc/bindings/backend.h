// SPDX-License-Identifier: Apache-2.0
// What run(tensor, args) means where the ops are compiled: on CPUs, on GPUs, or on the emulator.
#pragma once
#if defined(MOE_CUDA_OPS)
#include "cuda_backend.h"
#elif defined(MOE_SIMT)
#include "simt_backend.h"
#else
#include "cpu_backend.h"
#endif

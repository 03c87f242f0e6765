// SPDX-License-Identifier: Apache-2.0
// The micro-kernels for avx2. Standard headers come before the pragma, so that no shared inline function is compiled
// for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "../sinkhorn.h"
#include "tile.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define MOE_ISA avx2
#define MOE_VEC_BYTES 32
#define MOE_VEC_REGS 16
#include "tile_impl.h"
// The rows of tile_impl.h come first: math_impl.h is written on its vectors.
#include "math_impl.h"
#include "rank_impl.h"
#include "router_impl.h"
#include "table_impl.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

// SPDX-License-Identifier: Apache-2.0
// The micro-kernels for avx512. Standard headers come before the pragma, so that no shared inline function is compiled
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
// GCC 12 warns of its own undefined-value idiom inside the intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define MOE_ISA avx512
#define MOE_VEC_BYTES 64
#define MOE_VEC_REGS 32
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

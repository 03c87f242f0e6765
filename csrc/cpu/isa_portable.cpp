// SPDX-License-Identifier: Apache-2.0
// The micro-kernels on 16-byte vectors, for any processor and compiler with vector types.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "../sinkhorn.h"
#include "isa.h"
#include "tile.h"

#define MOE_ISA portable
#define MOE_VEC_BYTES 16
#define MOE_VEC_REGS 16
#include "tile_impl.h"
// The rows of tile_impl.h come first: math_impl.h is written on its vectors.
#include "math_impl.h"
#include "rank_impl.h"
#include "router_impl.h"
#include "table_impl.h"

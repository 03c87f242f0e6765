# SPDX-License-Identifier: Apache-2.0
"""Faults written by hand, a rule of the emulator each: file -> (what, the text as it is, the text as it should not be).

The text is an expression and stands once in its file.
"""

FAULTS: dict[str, list[tuple[str, str, str]]] = {
    "tests/simt/rules_sync.cu": [
        (
            "shuffle reads a lane outside its mask",
            "__match_any_sync(0xffu, v & 1)",
            "__shfl_sync(0xffu, unsigned(v), 9)",
        ),
        ("mask leaves out a lane that calls", "__reduce_add_sync(kFullWarp, v)", "__reduce_add_sync(0x7fffffffu, v)"),
        (
            "collective under divergence",
            "__shfl_xor_sync(kFullWarp, v, 5)",
            "(lane < 16 ? __shfl_xor_sync(kFullWarp, v, 5) : 0)",
        ),
        ("wrong segment width", "__shfl_sync(kFullWarp, v, lane + 1, 8)", "__shfl_sync(kFullWarp, v, lane + 1, 16)"),
        (
            "shuffle the wrong way",
            "__shfl_up_sync(kFullWarp, sum, unsigned(step))",
            "__shfl_down_sync(kFullWarp, sum, unsigned(step))",
        ),
        ("barrier for too few threads", "2 * kWarp", "kWarp"),
        (
            "one past the end of shared memory",
            "shared[warp * kWarp + (lane + 1) % kWarp]",
            "shared[warp * kWarp + (lane + 1)]",
        ),
        (
            "a barrier that half of the block reaches",
            "int(__popc(__ballot_sync(kFullWarp, v > 3)))",
            "(lane < 16 ? (__syncthreads(), 1) : 0)",
        ),
        (
            "thread leaves before a barrier",
            "values[blockIdx.x * kWarp + threadIdx.x]",
            "threadIdx.x == 3 && blockIdx.x == 1 ? (__trap(), 0) : values[0]",
        ),
        (
            "look back at a block that comes later",
            "int(atomicAdd(tickets, 1u))",
            "int(gridDim.x - 1 - atomicAdd(tickets, 1u))",
        ),
        ("flag of the wrong block", "&flags[ticket - 1]", "&flags[ticket]"),
    ],
    "tests/simt/rules_sm90.cu": [
        ("stage taken a round too early", "uint32_t(step / kStages & 1) ^ 1", "uint32_t(step / kStages & 1)"),
        ("slices exchanged", "step * kDepth", "(step ^ 1) * kDepth"),
    ],
    "tests/simt/rules_cluster.cu": [
        ("multicast to one block alone", "uint16_t(3)", "uint16_t(1u << rank)"),
        ("neighbour's half on top of the own", "shared + rank * kHalf", "shared"),
    ],
    "tests/simt/rules_async.cu": [
        ("tail copied past the end", "inside ? 16u : 0u", "16u"),
        (
            "ring one stage short",
            "((step % kStages) * kChunks + thread) * 16",
            "((step % (kStages - 1)) * kChunks + thread) * 16",
        ),
        (
            "misaligned copy",
            "values + (inside ? i : 0)",
            "(const int4*)((const char*)(values + (inside ? i : 0)) + 4)",
        ),
        ("swizzle left out", "row * 128 + ((chunk ^ (row % 8)) * 16)", "row * 128 + chunk * 16"),
        (
            "swizzle of the wrong rows",
            "base + swizzled(lane % 16, 2 * k + lane / 16)",
            "base + swizzled(lane % 16, (2 * k + lane / 16) ^ 1)",
        ),
        ("wrong half of the fragment", "lane / 8 % 2", "0"),
        ("wrong accumulator row", "(lane / 4 + 8 * (v / 2)) * 8", "(lane / 4 + 8 * (v % 2)) * 8"),
        ("row address misaligned", "base + 16 * 128", "base + 16 * 128 + 8"),
        ("32-bit row offset", "int64_t(row) * stride", "int(row) * int(stride)"),
        (
            "slot of the wrong round",
            "shared->slots[slot][(lane + 3) % kWarp]",
            "shared->slots[slot ^ 1][(lane + 3) % kWarp]",
        ),
        ("mbarrier beside its place", "cvta_to_shared(&shared->full)", "cvta_to_shared(&shared->full) + 4"),
        (
            "plain load of an mbarrier",
            "shared->slot[(lane + 5) % kWarp]",
            "shared->slot[(lane + 5) % kWarp] + int(shared->full)",
        ),
        ("written bytes in the wrong order", "bytes[63 - threadIdx.x]", "bytes[(62 - threadIdx.x) & 63]"),
    ],
    "csrc/cuda/fused_experts.cuh": [
        ("gradient of the slot, not of its token", "slot / args.K * args.grad_y_stride", "slot * args.grad_y_stride"),
        ("expert of the row before", "args.expert_offsets[middle + 1] <= r", "args.expert_offsets[middle + 1] < r"),
        ("share of another row", "p * args.S + r", "p * args.S + slot"),
        ("a warp's sum taken twice", "w * kWarp + lane", "(w - 1) * kWarp + lane"),
        ("row of the slot, not of its token", "args.row_to_slot ? slot / args.K : r", "args.row_to_slot ? slot : r"),
        (
            "weight of the row, not of its slot",
            "static_cast<const A*>(args.topk_weights)[slot]",
            "static_cast<const A*>(args.topk_weights)[r]",
        ),
        ("bias of the next expert", "e * args.H", "(e + 1) * args.H"),
    ],
    "csrc/cuda/grouped_fma.cuh": [
        ("an expert's first block taken by the one before", "begin / kFmaRows + e", "begin / kFmaRows"),
        ("the second tile of an expert begins where the first does", "begin + tile * kFmaRows", "begin"),
        ("token of the slot left undivided", "g.gather[r] / g.per_token", "g.gather[r]"),
        ("row of the next token", "row * g.a_stride + k0 + k", "(row + 1) * g.a_stride + k0 + k"),
        ("up rows as if they were interleaved", "half * (apart == 1 ? units : 1)", "half"),
        ("share of the slot's row", "part * g.S + r", "part * g.S + row.slot"),
        (
            "sums of the neighbouring column",
            "shared->b[half][k][across + j * kFmaAcross]",
            "shared->b[half][k][across + j]",
        ),
        ("depth past the end", "row >= 0 && k0 + k < g.K", "row >= 0"),
    ],
    "csrc/cuda/grouped_wgrad.cuh": [
        ("rows past the end are copied", "rows[i] >= 0 ? read : 0", "read"),
        ("the ring is filled a stage early", "fill(step + Tile::kStages - 1)", "fill(step + Tile::kStages - 2)"),
        ("weights of another stage", "slot * Tile::kDepth + threadIdx.x", "threadIdx.x"),
        ("halves of a fragment swapped", "lane % 8 + lane / 8 % 2 * 8", "lane % 8 + lane / 16 * 8"),
        ("accumulation forgets what was there", "load_again<each>(to)", "(Elements<O, each>{})"),
        (
            "tiles counted the wrong way",
            "int64_t(tile / k_tiles) * Tile::kWidth",
            "int64_t(tile % n_tiles) * Tile::kWidth",
        ),
        ("the other half of a row first", "(turned ? 4 : 0)", "0"),
        ("slot for token", "side.gather[from] / side.per_token", "side.gather[from]"),
        (
            "rows turned the wrong way",
            "row * kChunks + (chunk ^ 2 * (row & 3))",
            "row * kChunks + (chunk ^ 2 * (row & 1))",
        ),
        ("a row of the neighbour", "from >= 0 && slot >= 0", "slot >= 0 && row + r < args.S"),
    ],
    "csrc/cuda/mma_tile.cuh": [
        ("swizzle left out", "row * Chunks + (chunk ^ (row & 7))", "row * Chunks + chunk"),
        ("tf32 cut off instead of rounded", "0x1p-11f", "0.f"),
    ],
    "csrc/cuda/expert_rows.cuh": [
        ("slots above the bound", "min(ends[e], int32_t(S))", "ends[e]"),
        ("the expert after the wanted one", "wanted >= __popc(active)", "wanted > __popc(active)"),
        (
            "an expert counted twice",
            "__popc(active & ((1u << lane) - 1))",
            "__popc(active & ((2u << lane) - 1)) - 1 + lane % 2",
        ),
    ],
    "csrc/cuda/decode.cuh": [
        ("a part of k left out", "int64_t(part) * step", "int64_t(part + 1) * step"),
        ("parts overlap", "k += kDecodeWarps * step", "k += (kDecodeWarps - 1) * step"),
        ("rows of a product swapped", "lane / 4 + v / 2 * 8", "lane / 4 + (1 - v / 2) * 8"),
        ("up row of another unit", "m * p.I + unit", "m * p.I + unit / 2"),
        ("slot for token", "p.row_to_slot[r0 + row] / p.K", "p.row_to_slot[r0 + row] / 1"),
        ("more rows than there is room for", "r0 + rows - base > kDecodeTokens", "r0 - base > kDecodeTokens"),
        ("bias of the expert before", "list[e].end <= base + row", "list[e].end < base + row"),
        ("weight left out", "static_cast<const A*>(p.topk_weights)[slot] * sum", "sum"),
        ("tokens past the expert's end", "n * 8 + lane / 4 < rows", "r0 + n * 8 + lane / 4 < S"),
        ("a column past the last", "h0 + h >= p.H", "h0 + h > p.H"),
    ],
    "csrc/cuda/grouped_gemm.cuh": [
        ("swizzle left out", "row * kSlice + (chunk ^ turn) * 16", "row * kSlice + chunk * 16"),
        ("swizzle of too few rows", "sizeof(T) == 2 ? k % 8 : k % 4 * 2", "sizeof(T) == 2 ? k % 4 : 0"),
        (
            "column tile of the neighbour",
            "int64_t(tile.column_tile) * S::columns + b",
            "int64_t(tile.column_tile ^ 1) * S::columns + b",
        ),
        ("up rows for gate rows", "b % S::warp_columns < half ? 0 : I", "b % S::warp_columns < half ? I : 0"),
        ("bytes past the sum are copied", "at < end ? rows : 0", "rows"),
        ("columns past the sum are copied", "at < end ? 16 : 0", "16"),
        ("sums past the last k are copied", "i * step < left ? 16 : 0", "16"),
        ("rows past the expert's end are copied", "r >= tile.end", "r >= g.S"),
        ("slot for token", "slot / int32_t(g.per_token)", "slot / 1"),
        (
            "wrong half of A's fragment",
            "along_sum<S::slice>(warp_m * S::warp_rows + lane % 16, lane / 16)",
            "along_sum<S::slice>(warp_m * S::warp_rows + lane % 16, 1 - lane / 16)",
        ),
        (
            "wrong half of B's fragment",
            "along_sum<S::slice>(column + lane / 16 * 8 + lane % 8, lane / 8 % 2)",
            "along_sum<S::slice>(column + lane / 8 % 2 * 8 + lane % 8, lane / 16)",
        ),
        (
            "wrong half of a turned fragment",
            "along_columns<T, S::columns>(lane % 16, column / 8 + lane / 16)",
            "along_columns<T, S::columns>(lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2)",
        ),
        (
            "the ring is read past its end",
            "read + S::stage_bytes == ring_end ? shared : read + S::stage_bytes",
            "read + S::stage_bytes",
        ),
        ("a slice that is not there is read", "s + 1 < slices", "s < slices"),
        ("the last slice is not copied", "s + S::stages - 1 < slices", "s + S::stages < slices"),
        ("accumulator rows swapped", "to + 8 * stride + n * 32", "to + 7 * stride + n * 32"),
        ("pairs read with conflicts", "lane / 4 % 2", "0"),
        (
            "rows of eight lanes next to each other",
            "lanes == 4 ? (turn & 4) | (turn & 1) << 1 | (turn & 2) >> 1 : turn",
            "turn",
        ),
        ("columns past the last are written", "n < limit", "true"),
        ("share of another part", "column / S::warp_columns * g.S + r", "column / S::columns * g.S + r"),
        ("rows of another warp", "tile.row + warp_m * S::warp_rows + m * 16", "tile.row + warp_m * 16 + m * 16"),
    ],
    "csrc/cuda/tile_scheduler.cuh": [
        ("ends that are not clamped", "int32_t(min(max(end, int64_t(0)), S))", "int32_t(end)"),
        ("first row of a tile too early", "row = x.begin[i], end", "row = x.begin[i] - 1, end"),
        ("m-tiles rounded down", "x.begin[i + 1] - x.begin[i] + kTileRows - 1", "x.begin[i + 1] - x.begin[i]"),
        ("first row off by one", "row + row_tile * kTileRows", "row + row_tile * kTileRows + 1"),
        ("column tile off by one", "int32_t(turn / in_group)", "int32_t((turn + 1) / in_group)"),
    ],
}

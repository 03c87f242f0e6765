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
}

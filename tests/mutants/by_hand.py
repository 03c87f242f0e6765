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
}

# SPDX-License-Identifier: Apache-2.0
"""Which kernel computes a grouped product on a GPU: the table and the model of clocks, written down a second time."""

import importlib

import pytest

from moe_kernels import presets

host = importlib.import_module("moe_kernels._host")

# name: rows, columns, bytes of the sum in a stage, stages, warps by rows and by columns
TILES = {
    "mma 128x256": (128, 256, 64, 4, 2, 4),
    "mma 128x128": (128, 128, 64, 3, 2, 2),
    "mma 64x128": (64, 128, 64, 4, 2, 2),
    "mma 16x128": (16, 128, 128, 4, 1, 4),
}
# multiprocessors, KiB of shared memory of a block and in all, multiply-adds a clock, bytes a clock from L2
PROCESSORS = {
    80: (108, 163, 164, 1024, 48),
    86: (84, 99, 100, 512, 24),
    89: (128, 99, 100, 512, 24),
    90: (132, 227, 228, 1280, 40),
    100: (148, 227, 228, 1280, 40),
    120: (170, 99, 100, 512, 24),
}
# name: rows, columns, stages, whether consumers alternate, blocks of a cluster
WGMMA = {
    "wgmma 2x128x256": (128, 256, 4, False, 2),
    "wgmma 128x256": (128, 256, 4, False, 1),
    "wgmma 2x64x256": (64, 256, 5, True, 2),
    "wgmma 64x256": (64, 256, 5, True, 1),
}
WGMMA_RATE = 2048  # multiply-adds a clock: 64x256x16 in 128 clocks
BF16, F32, F64 = 2, 1, 0  # codes of the dtypes


def ceil(n, d):
    return -(-n // d)


def clocks(tile, arch, E, S, N, K):
    """Of a product of 16-bit numbers; None where the tile does not fit."""
    rows, columns, slice_, stages, warps_m, warps_n = TILES[tile]
    count, block_kib, all_kib, multiply_adds, cache = PROCESSORS[arch]
    warps, warp_rows, warp_columns = warps_m * warps_n, rows // warps_m, columns // warps_n
    stage = (rows + columns) * slice_
    shared = max(stages * stage, warps * 16 * (warp_columns + 8) * 4)
    if shared > block_kib << 10:
        return None
    busy = min(E, S)
    tiles = busy * ceil(ceil(S, busy), rows) * ceil(N, columns)
    products = rows * columns * slice_ // 2
    longest = max(products // multiply_adds, warps * (warp_rows + warp_columns) * slice_ // 128, stage // cache)
    registers = warp_rows * warp_columns // 32 + 112
    at_once = max(1, min((all_kib << 10) // (shared + 1024), 65536 // (32 * warps * registers)))
    rounds = ceil(tiles, count)
    return rounds * ceil(2 * K, slice_) * longest + ceil(rounds, at_once) * (1200 + rows * columns // 16)


def wgmma_clocks(tile, E, S, N, K):
    """The same by wgmma, on sm_90: slices of 128 bytes, one block a multiprocessor."""
    rows, columns, _, ping_pong, cluster = WGMMA[tile]
    count, _, _, _, cache = PROCESSORS[90]
    busy = min(E, S)
    rounds = ceil(busy * ceil(ceil(S, busy), rows * cluster) * cluster * ceil(N, columns), count)
    of_slice = max(
        rows * columns * 64 // WGMMA_RATE, rows // 64 * (64 + columns), (rows + columns // cluster) * 128 // cache
    )
    slices, once = ceil(2 * K, 128) * of_slice, 1000 + rows * columns // 8
    return rounds * max(slices, (slices + once + 1) // 2) + once if ping_pong else rounds * (slices + once)


def products():
    """(E, K, H, I) of every preset with experts."""
    for name in presets.names():
        preset = presets.get(name)
        kwargs = preset.layer_kwargs()
        yield name, kwargs


def shapes_of(kwargs):
    E, H, I = kwargs["num_experts"], kwargs["hidden_size"], kwargs["intermediate_size"]
    return E, kwargs["top_k"], ((2 * I, H), (H, I), (I, H), (H, 2 * I))


@pytest.mark.parametrize("arch", PROCESSORS)
def test_the_model_of_every_preset(arch):
    """The row taken is the one of the fewest clocks, and never the last one."""
    seen = set()
    for name, kwargs in products():
        E, top_k, sizes = shapes_of(kwargs)
        for tokens in (1, 8, 64, 512, 4096, 65536):
            for N, K in sizes:
                rated = {tile: clocks(tile, arch, E, tokens * top_k, N, K) for tile in TILES}
                rated = {tile: value for tile, value in rated.items() if value is not None}
                if arch == 90:
                    rated |= {tile: wgmma_clocks(tile, E, tokens * top_k, N, K) for tile in WGMMA}
                refused, taken = host.cuda_product(arch, E, tokens * top_k, N, K, BF16, True)
                assert {tile for tile, _ in refused} == {*TILES, *WGMMA} - set(rated)
                assert rated[taken] == min(rated.values()), (name, tokens, N, K, rated)
                seen.add(taken)
    assert "fma" not in seen
    if arch == 90:
        assert {"mma 16x128", "wgmma 2x128x256", "wgmma 2x64x256", "wgmma 64x256"} <= seen, seen
    else:
        assert {"mma 16x128", "mma 64x128", "mma 128x128"} <= seen


def test_what_goes_to_multiply_adds():
    for arch, dtype, in_16_bytes in ((90, F64, True), (90, F32, True), (90, BF16, False), (75, BF16, True)):
        refused, taken = host.cuda_product(arch, 8, 512, 128, 64, dtype, in_16_bytes)
        assert taken == "fma"
        assert {tile for tile, _ in refused} == {*TILES, *WGMMA}
        assert all(why for _, why in refused)
    assert host.cuda_product(90, 8, 2**31, 128, 64, BF16, True)[1] == "fma"  # rows are counted in 31 bits


def test_few_rows_take_the_small_tile():
    assert host.cuda_product(90, 128, 8, 1536, 2048, BF16, True)[1] == "mma 16x128"
    assert host.cuda_product(80, 8, 65536, 28672, 4096, BF16, True)[1] in ("mma 128x256", "mma 128x128")


def test_why_wgmma_is_refused():
    for arch in (80, 89, 100, 120):
        refused = dict(host.cuda_product(arch, 8, 65536, 4096, 7168, BF16, True)[0])
        assert {tile: refused[tile] for tile in WGMMA} == dict.fromkeys(
            WGMMA, "wgmma is sm_90's, in a build for sm_90a"
        )
    for K, dtype, why in ((7168, F32, "16-bit types"), (0, BF16, "the sum is empty")):
        refused = dict(host.cuda_product(90, 8, 65536, 4096, K, dtype, True)[0])
        assert all(why in refused[tile] for tile in WGMMA), refused


def test_the_stages_of_wgmma_fit():
    for rows, columns, stages, *_ in WGMMA.values():
        assert stages >= 4
        assert 1024 + stages * ((rows + columns) * 128 + 16) + 16 <= 227 * 1024


def test_the_model_of_a_large_product_is_near_the_peak():
    """A model, not a measurement: 8 experts of 1024 rows, 4096 columns, sums of 7168."""
    E, S, N, K = 8, 8192, 4096, 7168
    taken = host.cuda_product(90, E, S, N, K, BF16, True)[1]
    least = S * N * K / WGMMA_RATE / PROCESSORS[90][0]
    assert taken == "wgmma 2x128x256"
    assert 0.7 <= least / wgmma_clocks(taken, E, S, N, K) <= 1

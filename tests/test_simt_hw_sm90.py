# SPDX-License-Identifier: Apache-2.0
"""What wgmma and TMA do, against tables taken from a library that runs on silicon (tests/golden/hw).

csrc/cuda/probe_sm90.cuh dumps the maps: here from the emulator, and from a GPU where MOE_KERNELS_PROBE_SM90 names the
same program built by nvcc.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SIMT = Path(__file__).with_name("simt")
sys.path.insert(0, str(SIMT))
import programs  # noqa: E402

GOLDEN = Path(__file__).with_name("golden") / "hw"


def table(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


if reason := programs.missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def probe():
    if on_gpu := os.environ.get("MOE_KERNELS_PROBE_SM90"):
        return Path(on_gpu)
    return programs.build("probe_sm90", [SIMT / "probe_sm90.cu", SIMT.parents[1] / "csrc/cuda/tensor_map.cu"])


def run(probe, kind, words=(), seed=4):
    done = subprocess.run(
        [str(probe), kind],
        input=" ".join(map(str, words)),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "MOE_KERNELS_SIMT_SEED": str(seed)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_accumulators(probe):
    """Row and column of every register, for every N of the table."""
    maps = json.loads(run(probe, "accumulators"))
    for shape in table("wgmma_c")["shapes"]:
        n, got = shape["n"], maps[str(shape["n"])]
        want = [rc for registers in shape["rc"] for rc in registers]
        assert [int(r) * n + int(c) for r, c in zip(got["rows"], got["columns"], strict=True)] == want, n


def test_a_from_registers(probe):
    """Random integers, packed by the table; the product with an identity gives them back by the accumulator's table."""
    op = next(op for op in table("wgmma_a_reg")["ops"] if op["A"]["bits"] == 16)
    rng = random.Random(0)
    a = [rng.randint(-99, 99) for _ in range(64 * 16)]

    def bf16(value):
        exponent = abs(value).bit_length() - 1
        bits = (exponent + 127) << 23 | (abs(value) << 23 >> exponent) & 0x7FFFFF if value else 0
        return (bits >> 16) | (0x8000 if value < 0 else 0)

    words = []
    for thread in range(128):
        halves = [bf16(a[rc]) for rc in op["A"]["rc"][thread]]
        words += [halves[i] | halves[i + 1] << 16 for i in range(0, 8, 2)]
    accumulator = next(s for s in table("wgmma_c")["shapes"] if s["n"] == 16)["rc"]
    got = json.loads(run(probe, "a_registers", words))["d"]
    assert got == [a[rc] for registers in accumulator for rc in registers]


def tiles_with_layout():
    layouts = {}
    for layout in table("smem_layouts")["layouts"]:
        layouts[tuple(layout[key] for key in ("major", "swizzle", "mn", "k", "atom_order"))] = layout["off"]
    for tile in table("wgmma_desc")["tiles"]:
        key = tuple(tile[key] for key in ("major", "swizzle", "mn", "k", "atom_order"))
        if key in layouts:
            yield tile, layouts[key]


@pytest.mark.parametrize("seed", [3, 4])  # random schedule and in order, operands read late
def test_descriptors(probe, seed):
    """Every descriptor of the table reads the elements that the layout table puts there, of both majors."""
    words, count = [], 0
    for tile, offsets in tiles_with_layout():
        selected = {}
        for at in tile["desc"]:  # the same for every base but for the start address
            for i, row in enumerate(at["lohi"]):
                for j, (low, high) in enumerate(row):
                    count += 1
                    bits = (high << 32 | low) - (at["base"] >> 4)
                    assert selected.setdefault((i, j), bits) == bits
        words += [int(tile["role"] == "A"), tile["tnsp"], tile["inst_mn"], tile["mn"], tile["k"], len(selected)]
        words += offsets
        for (i, j), bits in selected.items():
            words += [bits, i * tile["inst_mn"], j * 16]
    assert count > 1400
    assert run(probe, "descriptors", words, seed).splitlines()[-1].endswith(" descriptors, 0 elements wrong")


def source(index):
    return (index * 40503 >> 3) & 0xFFFF


def test_swizzled_boxes(probe):
    boxes = table("tma_swizzle")["boxes"]
    words = []
    for box in boxes:
        words += [2, box["cols"], box["rows"], box["cols"], box["rows"], box["swizzle"], 1, 0, 0, 0]
    lines = run(probe, "boxes", words).splitlines()
    assert len(lines) == len(boxes)
    for box, line in zip(boxes, lines, strict=True):
        got = json.loads(line)
        assert all(got[byte // 2] == source(i) for i, byte in enumerate(box["byte"])), box["swizzle"]


def test_tiles_loaded_as_the_library_loads_them(probe):
    """The arguments of the tensor map and the copies of the table; every element of the tile lies where it should."""
    layouts = {}
    for layout in table("smem_layouts")["layouts"]:
        layouts[tuple(layout[key] for key in ("major", "swizzle", "mn", "k", "atom_order"))] = layout["off"]
    tiles, words = table("tma_encode")["tiles"], []
    for tile in tiles:
        encode = tile["encode"]
        swizzle = (0, 32, 64, 128)[encode["swizzle"]]
        words += [encode["rank"], *encode["globalDim"], *encode["boxDim"], swizzle, len(tile["instructions"])]
        for copy in tile["instructions"]:
            words += [*copy["coords"], copy["smem_elem"] * 2]
    lines = run(probe, "boxes", words).splitlines()
    for tile, line in zip(tiles, lines, strict=True):
        got = json.loads(line)
        size = tile["encode"]["globalDim"]
        offsets = layouts[tuple(tile[key] for key in ("major", "swizzle", "mn", "k", "atom_order"))]
        first_mn, first_k = tile["tile_coord"][0] * tile["mn"], tile["tile_coord"][1] * tile["k"]
        batch = tile["tile_coord"][2] if len(size) == 3 else 0
        for i, offset in enumerate(offsets):
            mn, k = first_mn + i // tile["k"], first_k + i % tile["k"]
            inner, outer = (k, mn) if tile["major"] == "K" else (mn, k)
            assert got[offset] == source((batch * size[1] + outer) * size[0] + inner), (tile["major"], i)


def test_a_misread_descriptor_shows(probe):
    """The check of the descriptors can fail: leading and stride offset exchanged."""
    for tile, offsets in tiles_with_layout():
        if tile["major"] == "MN" and tile["swizzle"] == 64 and tile["role"] == "A" and tile["lbo"] != tile["sbo"]:
            low, high = tile["desc"][0]["lohi"][0][0]
            bits = (high & ~0x3FFF | low >> 16 & 0x3FFF) << 32 | (high & 0x3FFF) << 16 | low & 0x3FFF
            words = [1, 1, 64, tile["mn"], tile["k"], 1, *offsets, bits, 0, 0]
            assert not run(probe, "descriptors", words).endswith(" 0 elements wrong\n")
            return
    raise AssertionError("no such tile")

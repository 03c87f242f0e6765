# SPDX-License-Identifier: Apache-2.0
"""What ldmatrix, stmatrix and mma.sync do, against tables taken from a library that runs on silicon (tests/golden/hw).

csrc/cuda/probe.cuh dumps the maps: here from the emulator, and from a GPU where MOE_KERNELS_PROBE names the same
program built by nvcc.
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
TILES = [op for name in ("ldmatrix", "stmatrix") for op in json.loads((GOLDEN / f"{name}.json").read_text())["ops"]]
ATOMS = json.loads((GOLDEN / "mma_warp.json").read_text())["atoms"]
KINDS = ("m16n8k16_bf16", "m16n8k16_f16", "m16n8k8_bf16", "m16n8k8_tf32")

if reason := programs.missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def probe():
    on_gpu = os.environ.get("MOE_KERNELS_PROBE")
    return Path(on_gpu) if on_gpu else programs.build("probe", [SIMT / "probe.cu"])


@pytest.fixture(scope="module")
def maps(probe):
    return json.loads(programs.run(probe, "tiles", seed=4))


@pytest.mark.parametrize("op", TILES, ids=lambda op: op["ptx"])
def test_tiles(maps, op):
    """Register j, half h of lane l is this element of this matrix, whichever way it goes."""
    name, _, _, x, *rest = op["ptx"].replace(".sync.aligned", "").replace(".m8n8", ".m8n8.").split(".")
    key = f"{name}.{x}" + (".trans" if "trans" in rest else "")
    n = op["matrices"]
    halves = [(lane, j, h) for lane in range(32) for j in range(n) for h in range(2)]
    for lane, j, h in halves:
        matrix, row, column = op["regs"][lane][2 * j + h]
        element = matrix * 64 + row * 8 + column
        if name == "ldmatrix":
            got = maps[key][lane * n + j] >> (16 * h) & 0xFFFF
            assert got == element, (lane, j, h)
        else:
            assert maps[key][element] == (lane * n + j) * 2 + h, (lane, j, h)


def test_every_address_a_tile_reads_is_the_one_the_table_names(maps):
    """Lanes 8j .. 8j + 7 name the rows of matrix j: the probe gives each lane the address that the table says."""
    for op in TILES:
        for lane, named in enumerate(op["addr"]):
            assert named == [-1, -1] or named == [lane // 8, lane % 8], (op["ptx"], lane)
    assert maps["elected"] == [1]


def bits_of(kind, value):
    """A small integer as the element type of a product."""
    if kind.endswith("f16") and not kind.endswith("bf16"):
        sign, value = (0x8000, -value) if value < 0 else (0, value)
        exponent = value.bit_length() - 1
        return sign | ((exponent + 15) << 10 | (value << 10 >> exponent) & 0x3FF if value else 0)
    sign, value = (0x80000000, -value) if value < 0 else (0, value)
    exponent = value.bit_length() - 1
    single = sign | ((exponent + 127) << 23 | (value << 23 >> exponent) & 0x7FFFFF if value else 0)
    return single if kind.endswith("tf32") else single >> 16


def packed(kind, fragment, matrix):
    """The registers of 32 lanes that hold `matrix` as the table says."""
    per_word, words = 32 // fragment["bits"], []
    for lane in range(32):
        values = [bits_of(kind, matrix[rc]) for rc in fragment["rc"][lane]]
        for word in range(0, len(values), per_word):
            words.append(sum(values[word + i] << (fragment["bits"] * i) for i in range(per_word)))
    return words


@pytest.mark.parametrize("kind", KINDS)
def test_products(probe, kind):
    """Random integer matrices, packed by the table and multiplied: any other map gives other numbers."""
    shape, dtype = kind.split("_")
    atom = next(a for a in ATOMS if f".{shape}." in a["ptx"] and f".{dtype}.{dtype}." in a["ptx"])
    rng, n, k, count = random.Random(0), atom["n"], atom["k"], 4
    words, want = {"A": [], "B": []}, []
    for _ in range(count):
        matrices = {s: [rng.randint(-9, 9) for _ in range(atom[s]["rows"] * k)] for s in "AB"}
        for side, matrix in matrices.items():
            words[side] += packed(kind, atom[side], matrix)
        for lane in range(32):
            for rc in atom["C"]["rc"][lane]:
                row, column = divmod(rc, n)
                want.append(sum(matrices["A"][row * k + i] * matrices["B"][column * k + i] for i in range(k)))
    text = " ".join(map(str, words["A"] + words["B"]))
    environment = {**os.environ, "MOE_KERNELS_SIMT_SEED": "4"}
    done = subprocess.run(
        [str(probe), kind], input=text, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["d"] == want

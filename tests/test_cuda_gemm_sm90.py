# SPDX-License-Identifier: Apache-2.0
"""Grouped products by TMA and wgmma, on the emulator as an sm_90 device: tiles, forms, epilogues, against float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import simt_direct
import simt_ops
import test_fused_experts as bodies
import torch
from test_cuda_gemm import FORMS, ROWS, Mlp, bound, expert_of, numbers, plain, product_of, run, weight
from test_fused_experts import OPTIONS, compare

from moe_kernels.testing import check, make_case

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())

TILES = {name.removeprefix("wgmma "): index for name, index in ROWS.items() if name.startswith("wgmma")}
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _sm_90(monkeypatch):
    monkeypatch.setenv(simt_ops.ARCH, "90")
    simt_ops.restart()


def truth_of(a, b, ends, bias=None):
    """(a[r] @ b[e].T + bias[e] in float64, its size) of the rows that an expert owns."""
    used = int(ends.clamp(min=0).max())
    e = expert_of(ends, used)
    add = 0 if bias is None else bias.double()[e]
    exact = [torch.einsum("rk,rnk->rn", f(a[:used].double()), f(b.double())[e]) for f in (torch.clone, torch.abs)]
    return exact[0] + add, exact[1] + abs(add)


# ---- the product: tails in every direction, empty experts, both layouts


@pytest.mark.parametrize("along_columns", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_product(tile, along_columns):
    dtype = HALVES[along_columns]
    ends = torch.tensor([0, 1, 1, 18, 37, 37], dtype=torch.int32)
    N, K = 136, 72
    a, b, bias = numbers(40, K, dtype=dtype), weight(6, N, K, dtype, along_columns), numbers(6, N, dtype=dtype)
    out = plain(a, b, ends, TILES[tile], bias=bias)
    assert out[37:].isnan().all()  # rows of no expert are not touched
    truth, size = truth_of(a, b, ends, bias)
    check(out[:37], truth, bound(size, truth, K, dtype), tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("counts", "N", "K"), [([150, 0, 70], 264, 72), ([300], 8, 520)])
def test_several_tiles_and_rounds(tile, counts, N, K):
    """More tiles than blocks, more slices than stages: every barrier goes round, every consumer has several tiles."""
    ends = torch.tensor(counts).cumsum(0).int()
    a, b = numbers(int(ends[-1]), K, dtype=torch.bfloat16), weight(len(counts), N, K, torch.bfloat16)
    truth, size = truth_of(a, b, ends)
    check(plain(a, b, ends, TILES[tile]), truth, bound(size, truth, K, torch.bfloat16), tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("counts", [[0, 0, 0], [1] * 40, [0, 0, 290, 0], [17, 0, 129, 64, 0, 5], [0] * 300 + [3]])
def test_where_the_rows_are(tile, counts):
    """Every row of every expert is computed once, whatever the counts; blocks go on where their search has ended."""
    ends = torch.tensor(counts).cumsum(0).int()
    S, K = int(ends[-1]) + 2, 8
    a, b = numbers(S, K, dtype=torch.bfloat16), weight(len(counts), 16, K, torch.bfloat16)
    truth, size = truth_of(a, b, ends)
    out = plain(a, b, ends, TILES[tile])
    check(out[: S - 2], truth, bound(size, truth, K, torch.bfloat16))
    assert out[S - 2 :].isnan().all()


@pytest.mark.parametrize("tile", TILES)
def test_as_many_rows_for_every_expert(tile):
    """No ends: an expert's rows are a box of a's map, and what is behind them another expert's, or not there."""
    memory = numbers(3, 9, 64, dtype=torch.bfloat16)
    a, b = memory[:, :5], weight(3, 24, 64, torch.bfloat16)
    g, reads = product_of(a.flatten(0, 1), b, None, S=15)
    out = torch.full((15, 24), math.nan)
    g.a, g.a_stride, g.a_expert = memory.data_ptr(), 64, 9 * 64
    g.epilogue = simt_direct.make("RowsEpilogue", kind=0, out=out, out_stride=24, out_dtype=out.dtype)
    run(g, TILES[tile], {**reads, "a": memory}, {"out": out})
    truth = torch.einsum("erk,enk->ern", a.double(), b.double()).flatten(0, 1)
    size = torch.einsum("erk,enk->ern", a.double().abs(), b.double().abs()).flatten(0, 1)
    check(out, truth, bound(size, truth, 64, torch.bfloat16, torch.float32))


@pytest.mark.parametrize("ends", [[-5, 3, 2**31 - 1], [9, 4, 9], [40, -1, 7], [2**31 - 1] * 3, [-1, -1, -1]])
def test_ends_that_are_wrong_stay_in_bounds(ends):
    """Nothing is read or written out of bounds, and every row at most once: the emulator would report it."""
    a, b = numbers(9, 32, dtype=torch.bfloat16), weight(3, 24, 32, torch.bfloat16)
    gather = torch.arange(9, dtype=torch.int32)
    for by in TILES.values():
        plain(a, b, torch.tensor(ends, dtype=torch.int32), by)
        plain(a, b, torch.tensor(ends, dtype=torch.int32), by, gather=gather)


@pytest.mark.parametrize("along_columns", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_gather_and_weights(tile, along_columns):
    """Rows by token, -1 is a row of zeros, and the weight of each row's slot; more slices than stages."""
    T, per_token, N, K, dtype = 70, 3, 264, 456, HALVES[along_columns]
    x, weights = numbers(T, K + 8, dtype=dtype)[:, :K], torch.rand(T * per_token)  # rows further apart than long
    gather = torch.randperm(T * per_token)[:159].int()
    gather[4] = -1
    ends, bias = torch.tensor([6, 6, 158], dtype=torch.int32), numbers(3, N, dtype=dtype)
    b, e = weight(3, N, K, dtype, along_columns), expert_of(ends, 159)[:158]
    rows = x.double()[gather[:158].long() // per_token] * (gather[:158, None] >= 0)
    w = torch.where(gather >= 0, weights[gather.clamp(min=0).long()], 0.0)[:158, None].double()
    truth = w * (torch.einsum("rk,rnk->rn", rows, b.double()[e]) + bias.double()[e])
    size = w * (torch.einsum("rk,rnk->rn", rows.abs(), b.double().abs()[e]) + bias.double().abs()[e])
    out = plain(x, b, ends, TILES[tile], gather=gather, per_token=per_token, bias=bias, weights=weights)
    check(out[:158], truth, bound(size, truth, K, dtype))
    assert out[158:].isnan().all()


def test_a_neighbours_nan_stays_there():
    """Rows past an expert's end, columns past N and products past K are not part of any sum."""
    memory = torch.full((24, 80), math.nan, dtype=torch.bfloat16)
    memory[:10, :40] = 1
    b = torch.full((2, 24, 80), math.nan, dtype=torch.bfloat16)
    b[:, :, :40] = 0.5
    ends = torch.tensor([3, 10], dtype=torch.int32)
    for by in TILES.values():
        for gather in (None, torch.arange(24, dtype=torch.int32)):
            out = plain(memory[:, :40], b[:, :, :40], ends, by, gather=gather)
            assert out[:10].eq(20).all()
            assert out[10:].isnan().all()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_every_schedule_gives_the_same_bits(tile, gathered):
    ends = torch.tensor([20, 53], dtype=torch.int32)
    a, b = numbers(53, 264, dtype=torch.float16), weight(2, 40, 264, torch.float16)
    gather, found = torch.arange(53, dtype=torch.int32) if gathered else None, []
    for seed in (0, 4, 8):  # each of three schedules of the threads and of three of the asynchronous copies
        simt_ops.restart(seed)
        found.append(plain(a, b, ends, TILES[tile], gather=gather))
    assert all(torch.equal(out, found[0]) for out in found)


# ---- the epilogues of the expert MLP


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", TILES)
def test_expert_mlp(tile, form):
    index = list(FORMS).index(form) + list(TILES).index(tile)
    Mlp(HALVES[index // 2 % 2], **FORMS[form], along_columns=index % 2 == 1).check(TILES[tile])


@pytest.mark.parametrize("tile", ["128x256", "2x64x256"])
def test_expert_mlp_of_several_tiles(tile):
    """Units that fill no tile and no half of one: I = 136 is 2 tiles of units and a part, I = 264 two."""
    for form in ("gated", "interleaved"):
        Mlp(
            torch.bfloat16,
            **FORMS[form],
            along_columns=form == "gated",
            T=70,
            I=264 if form == "interleaved" else 136,
            H=16,
        ).check(TILES[tile])


# ---- end to end: every grouped product of fused_experts, of the layer and of models by one tile


@pytest.fixture(params=TILES)
def by_tile(request, monkeypatch):
    monkeypatch.setenv(simt_ops.ROW, str(TILES[request.param]))


def on_wgmma(records):
    return any("grouped_gemm_sm90" in record["site"] for record in records)


@pytest.mark.parametrize("option", ["plain", "everything"])
def test_fused_experts(by_tile, option):
    with simt_ops.audit() as records:
        compare(simt_ops.BACKEND, make_case(13, 64, 48, 8, 2, dtype=torch.bfloat16, **OPTIONS[option]))
    assert on_wgmma(records)


@pytest.mark.parametrize("tile", ["2x128x256", "64x256"])
@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "empty"])
def test_skew(monkeypatch, tile, skew):
    monkeypatch.setenv(simt_ops.ROW, str(TILES[tile]))
    for T in (1, 37):
        compare(simt_ops.BACKEND, make_case(T, 24, 16, 8, 2, dtype=torch.bfloat16, skew=skew))


def test_no_tokens(by_tile):
    bodies.test_no_tokens(simt_ops.BACKEND)


def test_ids_that_name_no_expert(by_tile):
    bodies.test_all_ids_absent(simt_ops.BACKEND)
    bodies.test_absent_slots_are_never_multiplied(simt_ops.BACKEND)


def test_strides(by_tile):
    bodies.test_strides(simt_ops.BACKEND, torch.bfloat16, True)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_replaced_model(monkeypatch, family):
    """Logits, loss and every gradient of a tiny model in bfloat16, within the bound that test_hf_models measures."""
    pytest.importorskip("transformers")
    import test_hf_models

    monkeypatch.setenv(simt_ops.ROW, str(TILES["64x256"]))
    monkeypatch.setitem(test_hf_models.WORDS, "intermediate_size", 24)  # rows of whole 16 bytes
    monkeypatch.setitem(test_hf_models.WORDS, "moe_intermediate_size", 16)
    model = test_hf_models.build(family).bfloat16()
    with simt_ops.patched(), simt_ops.audit() as records:
        assert test_hf_models.compare(model, torch.bfloat16) <= 1.0
    assert on_wgmma(records)


# ---- what is refused


def test_refusals(monkeypatch):
    """By name each product would run; by a row of wgmma it is refused and nothing is launched."""
    b, ends = weight(2, 24, 32, torch.bfloat16), torch.tensor([3, 5], dtype=torch.int32)
    a = numbers(5, 32, dtype=torch.bfloat16)
    cases = {
        "float32": (a.float(), b.float()),
        "an empty sum": (a[:, :0], b[..., :0]),
        "rows that are not aligned": (numbers(5, 33, dtype=torch.bfloat16)[:, 1:], b),
        "every expert the same weight": (a, b[:1].expand(2, 24, 32)),
    }
    for x, w in cases.values():
        plain(x, w, ends, -1)
        for by in TILES.values():
            with pytest.raises(RuntimeError, match="invalid argument"):
                plain(x, w, ends, by)
    for arch in ("80", "89", "100", "120"):
        monkeypatch.setenv(simt_ops.ARCH, arch)
        with pytest.raises(RuntimeError, match="invalid argument"):
            plain(a, b, ends, TILES["64x256"])


def test_what_a_tensor_map_holds():
    refusal = simt_direct.function("tensor_map_refusal", ctypes.c_char_p)

    def why(base=256, dtype=2, size=(64, 8, 2), stride=(0, 128, 1024), box=(64, 8, 1), swizzle=128):
        arrays = [(ctypes.c_int64 * 5)(*sequence[:5]) for sequence in (size, stride, box)]
        found = refusal(ctypes.c_void_p(base), dtype, len(size), *arrays, swizzle)
        return found.decode() if found else None

    assert why() is None
    assert why(size=(64, 8, 1), stride=(0, 128, 0)) is None  # nobody goes to a second one
    assert why(size=(2**32, 8), stride=(0, 2**33), box=(64, 256)) is None
    assert "start at a multiple" in why(base=264)
    assert "1 to 5" in why(size=(1,) * 6)
    assert "float64" in why(dtype=0)
    assert "empty" in why(size=(64, 0, 2))
    assert "2^32" in why(size=(2**32 + 1, 8, 2))
    assert "1 to 256" in why(box=(64, 257, 1))
    assert "1 to 256" in why(box=(64, 8, 0))
    assert "longer than the swizzle" in why(box=(72, 8, 1))
    assert "multiple of 16" in why(box=(60, 8, 1))
    assert "rows do not start" in why(stride=(0, 136, 1024))
    assert "a stride" in why(stride=(0, 128, 2**40))
    assert "a stride" in why(stride=(0, 128, -1024))
    assert "swizzled by" in why(swizzle=256)

# SPDX-License-Identifier: Apache-2.0
"""Grouped products on the tensor cores, run on the emulator: every tile, type, layout and epilogue, against float64."""

from __future__ import annotations

import ctypes
import math
import re

import pytest
import simt_direct
import simt_ops
import torch
from simt_direct import make, type_of
from test_cuda_kernels import source

from moe_kernels import reference
from moe_kernels.schemas import ACTIVATIONS
from moe_kernels.testing import SAFETY, UNIT, check, rounding

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())

TABLE = re.findall(r'^ {4}\{"([\w ]+)", ', (simt_direct.CUDA / "grouped_gemm_config.h").read_text(), re.M)
ROWS = {name: index for index, name in enumerate(TABLE)}  # of kTileRows
TILES = {name.removeprefix("mma "): index for name, index in ROWS.items() if name.startswith("mma")}
SMALL = (TILES["64x128"], TILES["16x128"])
FMA = ROWS["fma"]
# Columns of D in one of the weight_parts: a warp's.
PART_COLUMNS = {
    "wgmma 2x128x256": 256, "wgmma 128x256": 256, "wgmma 2x64x256": 256, "wgmma 64x256": 256, "mma 128x256": 64,
    "mma 128x128": 64, "mma 64x128": 64, "mma 16x128": 32, "fma": 32,
}  # fmt: skip
TF32 = 2.0**-11  # half a unit of ten bits of mantissa
TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _first_seed():
    simt_ops.restart()


class RowsBy(ctypes.Structure):
    """As in tests/simt/direct.cpp: a product, and the row of the table that computes it."""

    _fields_ = [("rows", type_of("GroupedRows")), ("by", ctypes.c_int32)]


def product_of(a, b, ends, *, gather=None, per_token=1, S=None, tf32=True):
    """(struct of the sums a[row] @ b[e].T, what it reads). b is [E, N, K] of any strides."""
    E, N, K = b.shape
    strides = make("Weight", data=b, expert_stride=b.stride(0), row_stride=b.stride(1), col_stride=b.stride(2))
    rows = S if S is not None else len(a) if gather is None else len(gather)
    g = make("GroupedRows", E=E, S=rows, N=N, K=K, dtype=a.dtype, allow_tf32=tf32, a=a, a_stride=a.stride(0), b=strides,
             ends=ends, per_token=per_token, gather=gather)  # fmt: skip
    return g, {"a": a, "b": b, "ends": ends, "gather": gather}


def run(g, by, reads, writes):
    simt_direct.call("grouped_rows", RowsBy(g, by), reads, writes)


def plain(a, b, ends, by, *, out_dtype=None, bias=None, weights=None, **options):
    """out = w * (a @ b[e].T + bias[e]); NaN where nothing was written."""
    g, reads = product_of(a, b, ends, **options)
    out = torch.full((g.S, g.N), math.nan, dtype=out_dtype or a.dtype)
    slots = options.get("gather")
    g.epilogue = make("RowsEpilogue", kind=0, out=out, out_stride=g.N, out_dtype=out.dtype, bias=bias,
                      topk_weights=weights, row_to_slot=slots)  # fmt: skip
    run(g, by, {**reads, "bias": bias, "weights": weights}, {"out": out})
    return out


def weight(E, N, K, dtype, along_columns=False):
    b = torch.randn(E, N, K, dtype=torch.float64).to(dtype)
    return b.mT.contiguous().mT if along_columns else b


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def bound(size, truth, K, dtype, out_dtype=None):
    unit = 2 * TF32 if dtype == torch.float32 else UNIT[torch.float32] * math.sqrt(K)
    return SAFETY * (unit * size + rounding(truth, out_dtype or dtype))


def tiles_of(dtype):
    return [by for by in TILES.values() if by != TILES["128x256"] or dtype != torch.float32]


def expert_of(ends, S):
    """[S] the expert of each row, -1 past the last one."""
    experts = torch.searchsorted(ends.long(), torch.arange(S), right=True)
    return torch.where(experts < len(ends), experts, -1)


# ---- the product: tails in every direction, empty experts, both layouts


ENDS = [0, 1, 1, 18, 37, 37]


@pytest.mark.parametrize("along_columns", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_product(tile, dtype, along_columns):
    if TILES[tile] not in tiles_of(dtype):
        pytest.skip("the table has no tf32 kernel of this size")
    ends = torch.tensor(ENDS, dtype=torch.int32)
    N, K = 136, 72
    a, b, bias = numbers(40, K, dtype=dtype), weight(6, N, K, dtype, along_columns), numbers(6, N, dtype=dtype)
    out = plain(a, b, ends, TILES[tile], bias=bias)
    assert out[37:].isnan().all()  # rows of no expert are not touched
    e = expert_of(ends, 40)[:37]
    truth = torch.einsum("rk,rnk->rn", a[:37].double(), b.double()[e]) + bias.double()[e]
    size = torch.einsum("rk,rnk->rn", a[:37].double().abs(), b.double().abs()[e]) + bias.double().abs()[e]
    check(out[:37], truth, bound(size, truth, K, dtype), tile)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("N", "K"), [(8, 8), (16, 256), (264, 200), (1, 64), (130, 24)])
def test_widths(N, K, dtype):
    """Widths that fill no tile, or several; the sum ends inside of a slice, or goes round the ring."""
    ends = torch.tensor([9, 20], dtype=torch.int32)
    a, b = numbers(20, K, dtype=dtype), weight(2, N, K, dtype)
    e = expert_of(ends, 20)
    truth = torch.einsum("rk,rnk->rn", a.double(), b.double()[e])
    size = torch.einsum("rk,rnk->rn", a.double().abs(), b.double().abs()[e])
    for by in tiles_of(dtype)[1:]:
        check(plain(a, b, ends, by), truth, bound(size, truth, K, dtype), str(by))


@pytest.mark.parametrize(
    "counts", [[0, 0, 0], [300], [0, 0, 150, 0], [1] * 40, [17, 0, 129, 64, 0, 5], [0] * 300 + [3]]
)
def test_where_the_rows_are(counts):
    """The tile scheduler: every row of every expert is computed once, whatever the counts."""
    ends = torch.tensor(counts).cumsum(0).int()
    S, K = int(ends[-1]) + 2, 8
    e = expert_of(ends, S)
    a, b = numbers(S, K, dtype=torch.bfloat16), weight(len(counts), 8, K, torch.bfloat16)
    truth = torch.einsum("rk,rnk->rn", a.double(), b.double()[e])
    size = torch.einsum("rk,rnk->rn", a.double().abs(), b.double().abs()[e])
    for by in SMALL:
        out = plain(a, b, ends, by)
        check(out[e >= 0], truth[e >= 0], bound(size, truth, K, torch.bfloat16)[e >= 0])
        assert out[e < 0].isnan().all()


def test_no_rows_and_an_empty_sum():
    b, none = weight(3, 16, 32, torch.bfloat16), torch.zeros(3, dtype=torch.int32)
    assert plain(numbers(0, 32, dtype=torch.bfloat16), b, none, SMALL[0]).shape == (0, 16)
    bias, ends = numbers(3, 16, dtype=torch.bfloat16), torch.tensor([1, 1, 2], dtype=torch.int32)
    out = plain(numbers(2, 32, dtype=torch.bfloat16)[:, :0], b[..., :0], ends, SMALL[0], bias=bias)
    assert torch.equal(out, bias[[0, 2]])


@pytest.mark.parametrize("ends", [[-5, 3, 2**31 - 1], [9, 4, 9], [40, -1, 7], [2**31 - 1] * 3, [-1, -1, -1]])
def test_ends_that_are_wrong_stay_in_bounds(ends):
    """Nothing is read or written out of bounds, and every row at most once: the emulator would report it."""
    a, b = numbers(9, 32, dtype=torch.bfloat16), weight(3, 24, 32, torch.bfloat16)
    for by in SMALL:
        plain(a, b, torch.tensor(ends, dtype=torch.int32), by)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gather_and_weights(dtype):
    """Rows by token, -1 is a row of zeros, and the weight of each row's slot."""
    T, per_token, N, K = 7, 3, 40, 32
    x, weights = numbers(T, K + 8, dtype=dtype)[:, :K], torch.rand(T * per_token)  # rows further apart than long
    gather = torch.randperm(T * per_token)[:19].int()
    gather[4] = -1
    ends, bias = torch.tensor([6, 6, 18], dtype=torch.int32), numbers(3, N, dtype=dtype)
    b, e = weight(3, N, K, dtype), expert_of(ends, 19)[:18]
    rows = x.double()[gather[:18].long() // per_token] * (gather[:18, None] >= 0)
    w = torch.where(gather >= 0, weights[gather.clamp(min=0).long()], 0.0)[:18, None].double()
    truth = w * (torch.einsum("rk,rnk->rn", rows, b.double()[e]) + bias.double()[e])
    size = w * (torch.einsum("rk,rnk->rn", rows.abs(), b.double().abs()[e]) + bias.double().abs()[e])
    for out_dtype in {dtype, torch.float32}:
        for by in SMALL:
            out = plain(x, b, ends, by, gather=gather, per_token=per_token, bias=bias, weights=weights,
                        out_dtype=out_dtype)  # fmt: skip
            check(out[:18], truth, bound(size, truth, K, dtype, out_dtype))


def test_a_neighbours_nan_stays_there():
    """Rows past an expert's end, columns past N and products past K are not part of any sum."""
    memory = torch.full((24, 80), math.nan, dtype=torch.bfloat16)
    memory[:10, :40] = 1
    b = torch.full((2, 24, 80), math.nan, dtype=torch.bfloat16)
    b[:, :, :40] = 0.5
    ends = torch.tensor([3, 10], dtype=torch.int32)
    for by in TILES.values():
        out = plain(memory[:, :40], b[:, :, :40], ends, by)
        assert out[:10].eq(20).all()
        assert out[10:].isnan().all()


def test_nan_and_infinity_pass_through_tf32():
    a = torch.zeros(4, 32)
    a[0, 3], a[1, 5], a[2, 7] = math.nan, math.inf, -3e38
    a.view(torch.int32)[3, 1] = -1  # the other NaN
    b = torch.ones(1, 8, 32)
    for by in tiles_of(torch.float32):
        out = plain(a, b, torch.tensor([4], dtype=torch.int32), by)
        assert out[0].isnan().all()
        assert out[1].eq(math.inf).all()
        check(out[2], torch.full((8,), -3e38, dtype=torch.float64), torch.full((8,), 3e35, dtype=torch.float64))
        assert out[3].isnan().all()


def test_rounding_to_tf32():
    """Numbers that tf32 holds stay; others are off by at most 0.64 of its unit, and on average of mantissas by none."""
    one = torch.eye(8)[None]
    a = torch.exp2(20 * torch.rand(512, 8) - 10) * torch.where(torch.rand(512, 8) < 0.5, -1.0, 1.0)
    ends = torch.tensor([512], dtype=torch.int32)
    rounded = plain(a, one, ends, TILES["64x128"])
    off = (rounded.double() - a.double()) / a.double()
    assert off.abs().max() <= 0.64 * 2 * TF32
    assert off.abs().max() > 0.5 * 2 * TF32  # the bound is near, and this is not the nearest number
    deviation = 2 * TF32 / 12**0.5  # of a number cut off within its unit, at most
    assert off.mean().abs() <= SAFETY * deviation / math.sqrt(a.numel())
    assert torch.equal(plain(rounded, one, ends, TILES["64x128"]), rounded)


@pytest.mark.parametrize("tile", ["64x128", "16x128"])
def test_every_schedule_gives_the_same_bits(tile):
    ends = torch.tensor([20, 23], dtype=torch.int32)
    a, b = numbers(23, 136, dtype=torch.float16), weight(2, 40, 136, torch.float16)
    found = []
    for seed in range(9):  # three schedules of the threads times three of the asynchronous copies
        simt_ops.restart(seed)
        found.append(plain(a, b, ends, TILES[tile]))
    assert all(torch.equal(out, found[0]) for out in found)


# ---- the epilogues of the expert MLP, on every tile

EXPS = 2.0**-18  # of an activation in float32, relative to its arguments


class Mlp:
    """One set of numbers: `forward` and `backward` run an epilogue each and give (what came, truth, bound) by name."""

    def __init__(self, dtype, *, gated, interleaved=False, on_input=False, activation="silu", mask=True,
                 along_columns=False, T=11, per_token=2, H=40, I=24, E=3):  # fmt: skip
        slots, self.width, self.T, self.per_token, self.I = T * per_token, 2 * I if gated else I, T, per_token, I
        self.dtype, self.gated, self.interleaved, self.on_input = dtype, gated, interleaved, on_input
        self.activation, self.unit = activation, 2 * TF32 if dtype == torch.float32 else UNIT[torch.float32] * H**0.5
        self.ends = torch.tensor([slots // 2] * (E - 1) + [slots], dtype=torch.int32)
        self.e, self.row_to_slot = expert_of(self.ends, slots), torch.randperm(slots).int()
        self.slot = self.row_to_slot.long()
        self.x, self.grad_y = numbers(T, H, dtype=dtype), numbers(T, H, dtype=dtype)
        self.w13, self.w2t = (weight(E, n, H, dtype, along_columns) for n in (self.width, I))
        self.bias, self.topk = numbers(E, self.width, dtype=dtype), torch.rand(slots) + 0.5
        self.mask = torch.rand(slots, I) if mask else None
        w = self.topk.double()[self.slot, None]
        self.s, self.v = (w, torch.ones_like(w)) if on_input else (torch.ones_like(w), w)
        self.m = 1.0 if self.mask is None else self.mask.double()[self.slot]

    def product(self, by, x, b, **members):
        """Runs x[token of r] @ b[e].T with an epilogue; its exact sums and their size, [slots, N]."""
        g, reads = product_of(x, b, self.ends, gather=self.row_to_slot, per_token=self.per_token)
        inputs = {
            "row_to_slot": self.row_to_slot,
            "topk_weights": self.topk,
            "bias": self.bias,
            "hidden_mask": self.mask,
        }
        g.epilogue = make("RowsEpilogue", gated=self.gated, interleaved=self.interleaved, limit=0.75, alpha=1.2,
                          weight_on_input=self.on_input, activation=ACTIVATIONS.index(self.activation), **inputs,
                          **members)  # fmt: skip
        outs = {name: t for name, t in members.items() if isinstance(t, torch.Tensor) and t.isnan().all()}
        kept = {name: t for name, t in members.items() if isinstance(t, torch.Tensor) and name not in outs}
        run(g, by, {**reads, **inputs, **kept}, outs)
        rows = x.double()[self.slot // self.per_token]
        exact = [torch.einsum("rk,rnk->rn", f(rows), f(b.double())[self.e]) for f in (torch.clone, torch.abs)]
        return [t.unflatten(1, (-1, 2)).mT.flatten(1) if self.interleaved and kept == {} else t for t in exact]

    def empty(self, columns):
        return torch.full((len(self.slot), columns), math.nan, dtype=self.dtype)

    def value(self, raw):
        """activation(h) of sums, gate block first."""
        bias = self.bias.double()
        if self.interleaved:
            bias = bias.unflatten(1, (-1, 2)).mT.flatten(1)
        return reference.activate(self.s * raw + bias[self.e], self.activation, self.gated, 0.75, 1.2)

    def halves(self, t):
        """[slots, I, 1 | 2]: gate and up of a unit side by side."""
        return t.detach().unflatten(1, (-1, self.I)).mT

    def spread(self, raw):
        return (1 + self.halves(raw).abs()).prod(2)

    def forward(self, by):
        hidden, act = self.empty(self.width), self.empty(self.I)
        raw, size = self.product(by, self.x, self.w13, kind=1, hidden=hidden, act=act)
        value = self.value(raw.requires_grad_())
        (slope,) = torch.autograd.grad(value.sum(), raw)
        raw, truth = raw.detach(), (self.m * value).detach()
        moved = self.m * (self.halves(slope.abs() * self.unit * size).sum(2) + EXPS * self.spread(raw))
        return {
            "hidden": (hidden, raw, SAFETY * (self.unit * size + rounding(raw, self.dtype))),
            "act": (act, truth, SAFETY * (moved + rounding(truth, self.dtype))),
        }

    def backward(self, by):
        hidden = numbers(len(self.slot), self.width, dtype=self.dtype)
        columns = PART_COLUMNS[TABLE[by]]
        grad_hidden, grad_biased, weighted = self.empty(self.width), self.empty(self.width), self.empty(self.I)
        parts = torch.full((-(-self.I // columns), len(self.slot)), math.nan)
        u, size = self.product(by, self.grad_y, self.w2t, kind=2, hidden=hidden, grad_hidden=grad_hidden,
                               grad_biased=grad_biased, weighted_act=weighted, weight_parts=parts)  # fmt: skip
        u, size, raw = self.m * u, self.m * size, hidden.double().requires_grad_()
        value = self.value(raw)
        (grad,) = torch.autograd.grad(value, raw, self.v * u, retain_graph=True)  # through h = s * raw + bias
        (grad_size,) = torch.autograd.grad(value, raw, self.v * size)
        raw, value, spread = raw.detach(), value.detach(), self.spread(raw)
        rough = EXPS * (spread * self.v * u.abs()).repeat(1, self.width // self.I)
        moved = (self.unit * grad_size.abs() + rough * self.s) / self.s
        biased, act = grad / self.s, self.v * self.m * value
        if self.on_input:
            share, share_moved = self.halves(biased * raw).sum(2), self.halves(moved * raw.abs()).sum(2)
        else:
            share, share_moved = u * value, self.unit * size * value.abs() + EXPS * spread * u.abs()
        chunks = [torch.stack([p.sum(1) for p in t.split(columns, 1)]) for t in (share, share_moved)]

        def as_w13(t):
            return self.halves(t).flatten(1) if self.interleaved else t

        return {
            "grad_hidden": (grad_hidden, as_w13(grad),
                            SAFETY * as_w13(moved * self.s + rounding(grad, self.dtype))),
            "grad_biased": (grad_biased, as_w13(biased), SAFETY * as_w13(moved + rounding(biased, self.dtype))),
            "weighted_act": (weighted, act, SAFETY * (self.v * EXPS * spread + rounding(act, self.dtype))),
            "weight_parts": (parts, chunks[0], SAFETY * chunks[1]),
        }  # fmt: skip

    def check(self, by):
        for name, (got, truth, limit) in (self.forward(by) | self.backward(by)).items():
            check(got, truth, limit, name)


FORMS = {
    "gated": {"gated": True},
    "interleaved": {"gated": True, "interleaved": True, "activation": "swigluoai"},
    "ungated": {"gated": False, "activation": "gelu"},
    "on_input": {"gated": True, "on_input": True, "mask": False},
    "ungated_on_input": {"gated": False, "on_input": True, "activation": "gelu_tanh"},
    "interleaved_on_input": {"gated": True, "interleaved": True, "on_input": True, "activation": "relu2"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_expert_mlp(dtype, form):
    for by in tiles_of(dtype):
        Mlp(dtype, **FORMS[form], along_columns=by % 2 == 1).check(by)


@pytest.mark.parametrize("tile", ["128x128", "16x128"])
def test_expert_mlp_of_several_tiles(tile):
    """Units that fill no tile, no warp and no vector: I = 150 is 2 and 5 tiles of units, and 3 or 5 parts."""
    for form in ("gated", "interleaved"):
        Mlp(torch.bfloat16, **FORMS[form], T=70, I=150, H=16).check(TILES[tile])


# ---- addresses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_no_bank_conflict_and_whole_sectors(tile, dtype):
    """Every request to shared memory takes as few passes, every request to rows as few sectors, as its bytes need."""
    by = TILES[tile]
    if by not in tiles_of(dtype):
        pytest.skip("the table has no tf32 kernel of this size")
    with simt_direct.audit() as records:
        for along_columns in (False, True):
            ends = torch.tensor([128, 160], dtype=torch.int32)
            plain(numbers(160, 64, dtype=dtype), weight(2, 256, 64, dtype, along_columns), ends, by)
        for interleaved in (False, True):
            Mlp(dtype, gated=True, interleaved=interleaved, T=32, H=64, I=128, E=2).check(by)
    assert {r["space"] for r in records} == {"shared", "global"}
    by_id = ("row_to_slot", "topk_weights", "weight_parts", "ends[e]", "g.gather[")  # one number a row
    rows = [r for r in records if not any(text in source(r) for text in by_id)]
    assert [(source(r), r["served"], r["ideal"]) for r in rows if r["served"] > r["ideal"]] == []

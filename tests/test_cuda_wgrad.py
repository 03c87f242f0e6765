# SPDX-License-Identifier: Apache-2.0
"""grouped_wgrad on the emulator: every type, tail and layout, against float64 within c * u * sqrt(rows) * |a| |b|."""

import math

import pytest
import simt_direct as direct
import simt_ops
import torch

from moe_kernels.schemas import DTYPE_CODE, acc_dtype
from moe_kernels.testing import SAFETY, UNIT, check, rounding

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())
TF32 = "tf32"
KINDS = [torch.float64, torch.float32, TF32, torch.bfloat16, torch.float16]
ON_TENSOR_CORES = (TF32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _first_seed():
    simt_ops.restart()


class Case:
    """Random sides for experts with these many rows. What no expert may read is NaN: rows behind the last expert, and
    columns beside a side that is part of something wider."""

    def __init__(self, counts, N, K, kind, *, gather="", padding=False, per_token=2, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.counts, self.N, self.K, self.kind, self.per_token = counts, N, K, kind, per_token
        self.dtype = torch.float32 if kind == TF32 else kind
        self.ends = torch.tensor(counts).cumsum(0).int()
        self.S = sum(counts) + 3  # a bound: the rows that there are stand in ends
        tokens = max(self.S // per_token, 1)
        self.slots = torch.randint(0, tokens * per_token, (self.S,), generator=g).int()
        if padding:
            self.slots[torch.rand(self.S, generator=g) < 0.3] = -1
        self.slots[sum(counts) :] = 2**30  # never looked up
        self.sides, self.rows = [], []
        live = self.slots[: sum(counts)].long()
        for name, width in (("n", N), ("k", K)):
            data = torch.randn(tokens if name in gather else self.S, width, generator=g, dtype=torch.float64)
            data = data.to(self.dtype)
            if name not in gather:
                data[sum(counts) :] = math.nan
            wide = torch.full((len(data), width + 8), math.nan, dtype=self.dtype)
            wide[:, :width] = data
            self.sides.append((wide[:, :width], name in gather))
            rows = data[(live // per_token).clamp(min=0)] if name in gather else data[: sum(counts)]
            self.rows.append(torch.where((live < 0)[:, None], 0.0, rows.double()) if name in gather else rows.double())

    def truth(self, out_dtype, before=None):
        """float64, and what a correct kernel may differ by."""
        value, size = (torch.zeros(len(self.counts), self.N, self.K, dtype=torch.float64) for _ in range(2))
        terms = torch.tensor(self.counts).clamp(min=1)[:, None, None]
        begin = 0
        for e, count in enumerate(self.counts):
            n, k = (rows[begin : begin + count] for rows in self.rows)
            value[e], size[e] = n.T @ k, n.T.abs() @ k.abs()
            begin += count
        unit = UNIT[acc_dtype(self.dtype)] * terms.sqrt()
        if self.kind == TF32:
            unit = unit + math.sqrt(2) * 2.0**-11  # both sides, rounded to nearest
        if before is not None:
            value, size = value + before.double(), size + before.double().abs()
        return value, SAFETY * (unit * size + rounding(value, out_dtype))

    def arguments(self, out, **options):
        """GroupedWgradArgs and what the kernel may read."""
        sides = {}
        reads = {"ends": self.ends, "gather": self.slots}
        for name, (data, gathered) in zip("nk", self.sides):
            sides[f"{name}_side"] = direct.make(
                "WgradSide", data=data, row_stride=data.stride(0), col_stride=data.stride(1),
                gather=self.slots if gathered else None, per_token=self.per_token,
            )  # fmt: skip
            reads[name] = data
        args = direct.make(
            "GroupedWgradArgs", E=len(self.counts), S=self.S, N=self.N, K=self.K, dtype=self.dtype,
            out_dtype=out.dtype, allow_tf32=self.kind == TF32, ends=self.ends, out=out,
            out_expert=out.stride(0), out_row=out.stride(1), out_col=out.stride(2), **(sides | options),
        )  # fmt: skip
        return args, reads

    def empty(self, out_dtype=None, transposed=False):
        size = (len(self.counts), self.K, self.N) if transposed else (len(self.counts), self.N, self.K)
        out = torch.full(size, math.nan, dtype=out_dtype or self.dtype)
        return out.mT if transposed else out

    def partial(self, parts):
        return torch.full((parts, len(self.counts), self.N * self.K), math.nan, dtype=acc_dtype(self.dtype))

    def run(self, out_dtype=None, *, transposed=False, mma=None, parts=1):
        out, partial = self.empty(out_dtype, transposed), self.partial(parts)
        args, reads = self.arguments(out, **({"parts": parts, "partial": partial} if parts > 1 else {}))
        assert mma is None or direct.uses_mma("grouped_wgrad", args) == mma
        direct.call("grouped_wgrad", args, reads, {"out": out, "partial": partial})
        return out

    def compare(self, out_dtype=None, *, transposed=False, mma=None, parts=1):
        out = self.run(out_dtype, transposed=transposed, mma=mma, parts=parts)
        check(out, *self.truth(out.dtype), "out")
        empty = torch.tensor(self.counts) == 0
        assert out[empty].eq(0).all(), "an expert without rows has a gradient of exactly 0"


COUNTS = [(5, 0, 40), (1,), (0, 0, 150, 0), (33, 32, 31, 0, 64)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_experts_of_any_size(kind, counts):
    Case(counts, 72, 40, kind).compare(mma=kind in ON_TENSOR_CORES)


@pytest.mark.parametrize(("N", "K"), [(8, 8), (136, 128), (64, 264), (1, 1), (65, 13), (3, 130)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_widths(kind, N, K):
    Case((7, 0, 33), N, K, kind).compare(mma=kind in ON_TENSOR_CORES and N % 8 == 0)


@pytest.mark.parametrize("gather", ["", "n", "k", "nk"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_in_place_or_gathered(kind, gather):
    """Either side, with padding rows where it is gathered."""
    Case((21, 0, 47), 40, 24, kind, gather=gather, padding=bool(gather), per_token=3).compare()
    Case((50,), 5, 3, kind, gather=gather, padding=bool(gather)).compare(mma=False)


@pytest.mark.parametrize("per_token", [1, 3, 6, 7, 22, 641])
def test_the_token_of_a_slot(per_token):
    """The kernel divides by a multiplication: exact for every slot below 2^31."""
    Case((9, 30), 16, 8, torch.bfloat16, gather="nk", per_token=per_token).compare(mma=True)
    multiplier, shift = quotient(per_token)
    assert multiplier < 2**32
    g = torch.Generator().manual_seed(per_token)
    slots = [*torch.randint(0, 2**31, (2000,), generator=g).tolist(), 0, 2**31 - 1]
    slots += [n for q in (1, 2, 1000, (2**31 - 1) // per_token) for n in (q * per_token - 1, q * per_token)]
    assert all(n * multiplier >> shift == n // per_token for n in slots)


def quotient(d):
    """As quotient_by in expert_rows.cuh."""
    log = (d - 1).bit_length()
    return 2 ** (31 + log) // d + 1, 31 + log


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_either_major_and_a_float32_gradient(kind, transposed, out_dtype):
    if kind == torch.float64 and out_dtype is not None:
        out_dtype = torch.float64
    case = Case((30, 0, 9), 72, 136, kind, gather="k")
    case.compare(out_dtype, transposed=transposed, mma=kind in ON_TENSOR_CORES)


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_of_any_type(kind, out_dtype):
    Case((12, 0, 20), 24, 16, kind).compare(out_dtype)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_out_may_lie_in_something_wider(kind):
    case = Case((12, 0, 20), 24, 16, kind)
    for width, mma in ((32, kind == torch.bfloat16), (33, False)):
        memory = torch.full((3, 30, width), 7.0, dtype=kind)
        out = memory[:, 2:26, :16]
        args, reads = case.arguments(out)
        assert direct.uses_mma("grouped_wgrad", args) == mma
        direct.call("grouped_wgrad", args, reads, {"memory": memory})
        check(out, *case.truth(kind), "out")
        memory[:, 2:26, :16] = 7
        assert memory.eq(7).all(), "only out is written"


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sides_of_any_stride(kind):
    """Columns that are not contiguous: a token-major view of a transposed tensor."""
    case = Case((12, 20), 24, 16, kind)
    data, gathered = case.sides[0]
    case.sides[0] = (data.contiguous().T.contiguous().T, gathered)
    case.compare(mma=False)


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, TF32, torch.bfloat16], ids=str)
def test_accumulate(kind, out_dtype):
    """out += : an expert without rows keeps what it had, even NaN."""
    case = Case((17, 0, 40), 40, 72, kind, gather="n")
    before = torch.randn(3, 40, 72).to(out_dtype or case.dtype)
    before[1] = math.nan
    out = before.clone()
    args, reads = case.arguments(out, accumulate=True)
    direct.call("grouped_wgrad", args, reads | {"out": out}, {})
    truth, bound = case.truth(out.dtype, before)
    check(out[[0, 2]], truth[[0, 2]], bound[[0, 2]], "out")
    assert out[1].isnan().all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_nan_stays_with_its_expert(kind):
    """The neighbours' rows end and begin inside the same tile; only the expert of the NaN row may show it."""
    for gather in ("", "nk"):
        clean = Case((5, 1, 30, 3), 24, 16, kind, gather=gather, per_token=1)
        clean.slots[:39] = torch.randperm(39).int()
        dirty = Case((5, 1, 30, 3), 24, 16, kind, gather=gather, per_token=1)
        dirty.slots[:39] = clean.slots[:39]
        for data, gathered in dirty.sides:
            data[int(dirty.slots[5]) if gathered else 5] = math.nan
        a, b = clean.run(), dirty.run()
        assert b[1].isnan().all()
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_ends_are_not_trusted(kind):
    """Past S, below 0, descending: wrong numbers perhaps, no access outside. The emulator reports any."""
    case = Case((5, 9, 20), 16, 8, kind)
    case.sides = [(data.nan_to_num(), gathered) for data, gathered in case.sides]
    for ends in ([2**31 - 1, 3, -7], [-(2**31), 2**30, 0]):
        case.ends = torch.tensor(ends, dtype=torch.int32)
        case.run()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_every_schedule_gives_the_same_bits(kind, seed):
    case = Case((40, 3, 0, 131), 24, 40, kind, gather="k")
    for parts in (1, 3):
        found = []
        for first in (0, 1 + 3 * seed, 2 + 3 * seed, 3 + 3 * seed):
            simt_ops.restart(first)
            found.append(case.run(parts=parts))
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_nothing_to_do():
    Case((), 8, 8, torch.bfloat16).run()
    assert Case((0, 0), 8, 8, torch.bfloat16).run().eq(0).all()
    assert Case((0, 4), 0, 8, torch.bfloat16).run().shape == (2, 0, 8)


# ---- rows in parts: few tiles and many rows


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parts(kind, parts):
    """Experts with fewer rows than parts, none, rows that fill no stage, and a last part that is empty."""
    Case((5, 0, 40), 72, 40, kind, gather="k").compare(mma=kind in ON_TENSOR_CORES, parts=parts)
    Case((0, 150, 33), 16, 136, kind).compare(transposed=True, parts=parts)
    Case((37, 2), 5, 3, kind).compare(parts=parts, mma=False)


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parts_of_any_type(kind, out_dtype):
    Case((70, 0, 20), 24, 16, kind).compare(out_dtype, parts=2)


def test_one_part_of_several_is_what_one_block_sums():
    """The parts are stretches of whole stages in order: their sums are those of experts with just these rows."""
    whole, kind = Case((96,), 24, 40, torch.bfloat16), torch.float32
    apart = Case((32, 32, 32), 24, 40, torch.bfloat16)
    apart.sides, apart.S = whole.sides, whole.S
    thirds = apart.run(kind)
    assert torch.equal(whole.run(kind, parts=3)[0], thirds[0] + thirds[1] + thirds[2])


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, TF32, torch.bfloat16], ids=str)
def test_parts_accumulate(kind):
    case = Case((17, 0, 90), 40, 72, kind)
    before = torch.randn(3, 40, 72).to(acc_dtype(case.dtype))
    before[1] = math.nan
    out, partial = before.clone(), case.partial(2)
    args, reads = case.arguments(out, accumulate=True, parts=2, partial=partial)
    direct.call("grouped_wgrad", args, reads | {"out": out}, {"partial": partial})
    truth, bound = case.truth(out.dtype, before)
    check(out[[0, 2]], truth[[0, 2]], bound[[0, 2]], "out")
    assert out[1].isnan().all(), "an expert without rows keeps what it had"


def test_parts_need_memory():
    case = Case((17,), 8, 8, torch.bfloat16)
    out = case.empty()
    args, reads = case.arguments(out, parts=2)
    with pytest.raises(RuntimeError, match="invalid"):
        direct.call("grouped_wgrad", args, reads, {"out": out})


@pytest.mark.parametrize(("E", "S", "N", "K", "dtype", "parts"), [
    (1, 65536, 1024, 1024, torch.bfloat16, 5),  # 64 tiles, room for 264
    (8, 16384, 512, 256, torch.bfloat16, 4),  # 64 tiles, but an expert has 2048 rows, if they are spread evenly
    (8, 16384, 512, 2048, torch.bfloat16, 1),  # 512 tiles: the processors are full
    (66, 2**20, 256, 128, torch.bfloat16, 2),  # 132 tiles
    (1, 512, 128, 128, torch.bfloat16, 1), (1, 1024, 128, 128, torch.bfloat16, 2),
    (1, 2**30, 128, 128, torch.bfloat16, 264),
    (1, 2**30, 128, 128, torch.float32, 66),  # tiles of 64 x 64
    (4, 0, 128, 128, torch.bfloat16, 1),
])  # fmt: skip
def test_how_many_parts(E, S, N, K, dtype, parts):
    """Of sizes and the processors alone; never of where the rows are. An H100 has 132, the emulator 4."""
    host = pytest.importorskip("moe_kernels._host")
    assert host.cuda_wgrad_parts(90, E, S, N, K, DTYPE_CODE[dtype], True) == parts
    for tf32, wide in ((False, 64), (True, 128)):
        found = host.cuda_wgrad_parts(90, 2, 2**30, 256, 128, DTYPE_CODE[torch.float32], True, tf32)
        assert found == ceil(264, 2 * (256 // wide) * (128 // wide))


def ceil(n, d):
    return -(-n // d)


def test_the_launcher_asks_the_same_function():
    sides = {f"{side}_side": direct.make("WgradSide", row_stride=128, col_stride=1) for side in "nk"}
    args = direct.make("GroupedWgradArgs", E=1, S=65536, N=128, K=128, dtype=torch.bfloat16, out_dtype=torch.bfloat16,
                       out_row=128, out_col=1, out_expert=128 * 128, **sides)  # fmt: skip
    assert direct.wgrad_parts(args) == 8  # two blocks on each of the emulator's four
    assert direct.wgrad_partial_bytes(args) == 0
    args.parts = 8
    assert direct.wgrad_partial_bytes(args) == 8 * 128 * 128 * 4
    args.dtype = args.out_dtype = DTYPE_CODE[torch.float64]
    assert direct.wgrad_parts(args) == 2
    assert direct.wgrad_partial_bytes(args) == 8 * 128 * 128 * 8


# ---- addresses


def source(record):
    file, line = record["site"].split(",")[0].rsplit(":", 1)
    return (simt_ops.ROOT / file).read_text().splitlines()[int(line) - 1].strip()


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ON_TENSOR_CORES, ids=str)
def test_whole_sectors_and_no_bank_conflict(kind, transposed, out_dtype):
    case = Case((64, 32), 128, 128, kind, gather="n")
    case.sides = [(data.clone(), gathered) for data, gathered in case.sides]  # rows of whole sectors
    with direct.audit() as records:
        case.run(out_dtype, transposed=transposed, mma=True)
    single = ("ends[e", "__ldg(at + i * Tile::kRowsAtOnce)")  # one number a row
    worse = {source(r) for r in records if r["served"] > r["ideal"]}
    assert not {text for text in worse if not any(word in text for word in single)}
    size = 2 if case.dtype == torch.bfloat16 or case.dtype == torch.float16 else 4
    copies = [r for r in records if r["space"] == "global" and "cp_async_cg_16(" in source(r)]
    assert 32 * sum(r["served"] for r in copies) == 96 * 256 * size, "each row of both sides once a tile"

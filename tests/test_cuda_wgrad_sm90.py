# SPDX-License-Identifier: Apache-2.0
"""grouped_wgrad by wgmma, on the emulator as an sm_90 device, against float64 within c * u * sqrt(rows) * |a| |b|."""

import ctypes
import math

import pytest
import simt_direct as direct
import simt_ops
import torch
from test_cuda_wgrad import Case

from moe_kernels.testing import check

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _sm_90(monkeypatch):
    monkeypatch.setenv(simt_ops.ARCH, "90")
    simt_ops.restart()


def uses_wgmma(case, **options):
    args, _ = case.arguments(case.empty(None, False), **options)
    return bool(direct.function("grouped_wgrad_uses_wgmma", ctypes.c_bool)(ctypes.byref(args)))


def compare(case, out_dtype=None, *, transposed=False):
    assert uses_wgmma(case)
    case.compare(out_dtype, transposed=transposed)


@pytest.mark.parametrize("counts", [(64,), (5, 0, 70), (0, 0, 200, 0), (63, 64, 65, 0, 128)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_experts_of_any_size(dtype, counts):
    """No rows, less than a slice, whole slices, one row more: the last slice is the threads', the others are TMA's."""
    compare(Case(counts, 72, 40, dtype))


@pytest.mark.parametrize(("N", "K"), [(8, 8), (128, 256), (136, 264), (264, 128), (64, 520)])
def test_widths(N, K):
    """Tiles of 128 and of 256 columns, one, several and less than one; boxes that begin past the side's end."""
    compare(Case((70, 0, 33), N, K, torch.bfloat16))


@pytest.mark.parametrize("gather", ["n", "k", "nk"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_gathered(dtype, gather):
    """With padding rows, which count as zeros; the other side comes by TMA but for each expert's last slice."""
    compare(Case((130, 0, 47), 72, 136, dtype, gather=gather, padding=True, per_token=3))


def test_more_tiles_than_blocks_and_slices_than_stages():
    compare(Case((600, 3, 0, 150), 264, 136, torch.bfloat16, gather="k"))


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_either_major_and_a_float32_gradient(transposed, out_dtype):
    compare(Case((70, 0, 9), 72, 136, torch.bfloat16, gather="k"), out_dtype, transposed=transposed)


@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_accumulate(out_dtype):
    """out += : an expert without rows keeps what it had, even NaN."""
    case = Case((70, 0, 40), 40, 72, torch.bfloat16, gather="n")
    before = torch.randn(3, 40, 72).to(out_dtype or case.dtype)
    before[1] = math.nan
    out = before.clone()
    args, reads = case.arguments(out, accumulate=True)
    direct.call("grouped_wgrad", args, reads | {"out": out}, {})
    truth, bound = case.truth(out.dtype, before)
    check(out[[0, 2]], truth[[0, 2]], bound[[0, 2]], "out")
    assert out[1].isnan().all()
    with pytest.raises(AssertionError):  # the bound notices a gradient that is added twice
        check(out[[0, 2]] + (truth - before.double())[[0, 2]], truth[[0, 2]], bound[[0, 2]], "out")


@pytest.mark.parametrize("gather", ["", "k", "nk"])
def test_a_nan_stays_with_its_expert(gather):
    """The neighbours' rows end and begin inside the same box of 64 rows; only the NaN row's expert may show it."""
    clean, dirty = (Case((66, 1, 130, 3), 24, 16, torch.bfloat16, gather=gather, per_token=1) for _ in range(2))
    order = torch.randperm(200).int()
    for case in (clean, dirty):
        case.slots[:200] = order
    for data, gathered in dirty.sides:
        data[int(order[66]) if gathered else 66] = math.nan
    a, b = clean.run(), dirty.run()
    assert b[1].isnan().all()
    assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]]) and not b[[0, 2, 3]].isnan().any()


def test_ends_are_not_trusted():
    case = Case((5, 90, 20), 16, 8, torch.bfloat16)
    case.sides = [(data.nan_to_num(), gathered) for data, gathered in case.sides]
    for ends in ([2**31 - 1, 3, -7], [-(2**31), 2**30, 0]):
        case.ends = torch.tensor(ends, dtype=torch.int32)
        case.run()


def test_every_schedule_gives_the_same_bits():
    case = Case((140, 3, 0, 70), 24, 40, torch.bfloat16, gather="k")
    found = []
    for seed in range(4):
        simt_ops.restart(seed)
        found.append(case.run())
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_it_refuses_the_portable_kernel_takes(monkeypatch):
    """tf32, sides that no map holds; and the same numbers where the device is an older one."""
    assert not uses_wgmma(Case((5,), 8, 8, "tf32")) and not uses_wgmma(Case((5,), 9, 8, torch.bfloat16))
    case = Case((70, 0, 9), 40, 24, torch.bfloat16)
    assert uses_wgmma(case)
    monkeypatch.setenv(simt_ops.ARCH, "80")
    assert not uses_wgmma(case)
    case.compare(mma=True)

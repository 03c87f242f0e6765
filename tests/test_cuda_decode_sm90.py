# SPDX-License-Identifier: Apache-2.0
"""decode by TMA and wgmma, run on the emulator as an sm_90 device, against float64 within the bound of the data."""

import ctypes
import math
from dataclasses import replace

import pytest
import simt_direct as direct
import simt_ops
import test_cuda_decode as portable
import torch

from moe_kernels.testing import check, expert_layer, make_case, must_fail_when_perturbed

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _sm_90(monkeypatch):
    monkeypatch.setenv(simt_ops.ARCH, "90")
    simt_ops.restart()


def uses_wgmma(case):
    args, _ = portable.arguments(case, torch.empty(0), torch.empty(0))
    return bool(direct.function("decode_uses_wgmma", ctypes.c_bool)(ctypes.byref(args)))


def compare(case):
    assert uses_wgmma(case)
    truth, bound = expert_layer(case)["y"]
    y = portable.decode(case)
    check(y, truth, bound, "y")
    return y, truth, bound


OPTIONS = {name: options for name, options in portable.OPTIONS.items() if not options.get("transposed")}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    dtype = HALVES[len(option) % 2]
    compare(make_case(5, 136, 40, 6, 2, dtype=dtype, seed=1, **OPTIONS[option]))


SHAPES = [  # T, H, I, E, K: one of each; slices for every block of the cluster and for none; more experts than slots;
    # K = E; more than eight tokens; many experts; two columns of blocks
    (1, 8, 8, 1, 1), (1, 264, 520, 8, 4), (3, 16, 8, 128, 2), (6, 72, 32, 4, 4), (20, 40, 16, 3, 2),
    (2, 8, 24, 2048, 3), (9, 136, 72, 4, 2),
]  # fmt: skip


@pytest.mark.parametrize("skew", ["uniform", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, skew):
    T, H, I, E, K = shape
    compare(make_case(T, H, I, E, K, dtype=torch.bfloat16, skew=skew, seed=T))


def test_one_expert_with_more_rows_than_a_pass_multiplies():
    """32 rows at a time where tokens are many, 8 where they are few: an id may be there twice."""
    compare(make_case(64, 24, 16, 2, 1, dtype=torch.bfloat16, skew="one"))
    compare(replace(make_case(8, 24, 16, 2, 2, dtype=torch.float16), topk_ids=torch.ones(8, 2).int()))


def test_more_rows_than_a_block_keeps_the_parts_of():
    """Three times the cluster adds up, in two buffers in turn."""
    compare(make_case(50, 16, 72, 16, 4, dtype=torch.bfloat16, skew="zipf"))


def test_more_slices_than_stages():
    compare(make_case(1, 16, 2824, 1, 1, dtype=torch.bfloat16))
    y, truth, bound = compare(make_case(2, 1032, 72, 2, 2, dtype=torch.bfloat16, bias=True))
    must_fail_when_perturbed(y, truth, bound, "y")


def test_a_nan_reaches_the_token_that_has_it_and_no_other():
    case = make_case(6, 24, 16, 4, 2, dtype=torch.bfloat16, bias=True)
    ids = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1], [2, 1], [0, -1]]).int()
    clean = portable.decode(replace(case, topk_ids=ids))
    x = torch.where(torch.arange(6)[:, None] == 2, math.nan, case.x)
    w13 = torch.where(torch.arange(4)[:, None, None] == 3, math.nan, case.w13)  # of an expert that nobody chose
    dirty = portable.decode(replace(case, topk_ids=ids, x=x, w13=w13))
    assert dirty[2].isnan().all()
    assert torch.equal(torch.cat([dirty[:2], dirty[3:]]), torch.cat([clean[:2], clean[3:]]))


def test_nothing_to_do():
    case = make_case(4, 16, 8, 4, 2, dtype=torch.bfloat16, bias=True)
    assert portable.decode(replace(case, topk_ids=torch.full((4, 2), -1))).eq(0).all()


def test_every_schedule_gives_the_same_bits():
    case = make_case(7, 264, 168, 5, 3, dtype=torch.bfloat16, bias=True, absent=True, seed=4)
    found = []
    for seed in range(5):
        simt_ops.restart(seed)
        found.append(portable.decode(case))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_token_alone_gets_what_it_gets_in_company():
    case = make_case(8, 136, 72, 6, 2, dtype=torch.bfloat16, bias=True, seed=3)
    together = portable.decode(case)
    for t in (0, 5):
        one = {name: getattr(case, name)[t : t + 1].contiguous() for name in ("x", "topk_ids", "topk_weights")}
        assert torch.equal(portable.decode(replace(case, **one))[0], together[t])


def test_what_it_refuses_the_portable_kernels_take(monkeypatch):
    assert not uses_wgmma(make_case(3, 40, 16, 4, 2, dtype=torch.bfloat16, transposed=True))
    assert not uses_wgmma(make_case(3, 40, 16, 4, 2, dtype=torch.float32))
    assert not uses_wgmma(make_case(3, 36, 16, 4, 2, dtype=torch.bfloat16))
    case = make_case(3, 40, 16, 4, 2, dtype=torch.bfloat16)
    assert uses_wgmma(case)
    monkeypatch.setenv(simt_ops.ARCH, "80")
    assert not uses_wgmma(case)
    portable.compare(case, mma=True)

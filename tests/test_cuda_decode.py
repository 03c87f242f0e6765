# SPDX-License-Identifier: Apache-2.0
"""decode on the emulator: few tokens, every option, against float64 within the bound that the data gives."""

import math
from dataclasses import replace

import pytest
import simt_direct as direct
import simt_ops
import torch
from test_fused_experts import DTYPES, OPTIONS

from moe_kernels.reference import local_ids, permute
from moe_kernels.schemas import ACTIVATION_CODE, ACTIVATIONS
from moe_kernels.testing import check, expert_layer, make_case

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _first_seed():
    simt_ops.restart()


def weight_of(w, transposed):
    """struct Weight: element (e, n, k) of w, which has k last, or n last where transposed."""
    n, k = (2, 1) if transposed else (1, 2)
    return direct.make("Weight", data=w, expert_stride=w.stride(0), row_stride=w.stride(n), col_stride=w.stride(k))


def arguments(case, y, act):
    """DecodeArgs of the case, what its kernels may read, and what the struct points to."""
    (T, H), E, K = case.x.shape, case.w13.shape[0], case.topk_ids.shape[1]
    I = case.w2.shape[1 if case.transposed else 2]
    rows = permute(case.x, local_ids(case.topk_ids, case.expert_map), E)
    reads = {
        "x": case.x, "w13": case.w13, "w2": case.w2, "w13_bias": case.w13_bias, "w2_bias": case.w2_bias,
        "topk_weights": case.topk_weights, "hidden_mask": case.hidden_mask,
        "row_to_slot": rows.row_to_slot.int(), "expert_offsets": rows.expert_offsets.int(),
    }  # fmt: skip
    pointers = reads | {"w13": weight_of(case.w13, case.transposed), "w2": weight_of(case.w2, case.transposed)}
    mlp = direct.make(
        "ExpertMlp", T=T, H=H, I=I, E=E, K=K, dtype=case.x.dtype, weight_dtype=case.w13.dtype,
        activation=ACTIVATION_CODE[case.activation], gated=case.gated, interleaved=case.interleaved,
        weight_on_input=case.weight_on_input, limit=case.swiglu_limit, alpha=case.swiglu_alpha,
        x_stride=case.x.stride(0), **{name: value for name, value in pointers.items() if value is not None},
    )  # fmt: skip
    return direct.make("DecodeArgs", mlp=mlp, y=y, act=act), reads


def decode(case, *, mma=None):
    """y. `mma` says which kernel must have run."""
    y = torch.empty(case.x.shape, dtype=case.x.dtype)
    act = torch.empty(case.topk_ids.numel(), case.w2.shape[1 if case.transposed else 2], dtype=case.x.dtype)
    args, reads = arguments(case, y, act)
    assert mma is None or direct.uses_mma("decode", args) == mma
    direct.call("decode", args, reads, {"y": y, "act": act})
    return y


def compare(case, *, mma=None):
    truth, bound = expert_layer(case)["y"]
    check(decode(case, mma=mma), truth, bound, "y")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, option):
    wide = make_case(5, 136, 40, 6, 2, dtype=dtype, seed=1, **OPTIONS[option])
    compare(wide, mma=dtype in HALVES and not wide.transposed)
    compare(make_case(3, 37, 11, 4, 2, dtype=dtype, seed=2, **OPTIONS[option]), mma=False)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated):
    gated = gated or activation == "swigluoai"  # it exists gated only
    compare(make_case(4, 64, 24, 4, 2, dtype=torch.bfloat16, activation=activation, gated=gated, bias=True), mma=True)


SHAPES = [  # T, H, I, E, K: one of each; more experts than slots; K = E; many rows an expert; many experts
    (1, 8, 8, 1, 1), (1, 264, 520, 8, 4), (3, 16, 8, 128, 2), (6, 72, 32, 4, 4), (20, 40, 16, 3, 2),
    (2, 8, 24, 2048, 3),
]  # fmt: skip


@pytest.mark.parametrize("skew", ["uniform", "one", "empty"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, skew):
    T, H, I, E, K = shape
    compare(make_case(T, H, I, E, K, dtype=torch.bfloat16, skew=skew, seed=T), mma=True)


def test_one_expert_with_more_rows_than_a_pass_multiplies():
    """64 rows at a time where tokens are many, 8 where they are few: an id may be there twice."""
    compare(make_case(70, 24, 16, 2, 1, dtype=torch.bfloat16, skew="one"), mma=True)
    compare(replace(make_case(8, 24, 16, 2, 2, dtype=torch.float16), topk_ids=torch.ones(8, 2).int()), mma=True)


def test_more_rows_than_a_block_keeps_the_parts_of():
    compare(make_case(60, 16, 8, 16, 4, dtype=torch.bfloat16, skew="zipf"), mma=True)


def test_the_most_slots():
    compare(make_case(64, 8, 8, 8, 8, dtype=torch.bfloat16), mma=True)
    with pytest.raises(RuntimeError, match="invalid"):
        decode(make_case(57, 8, 8, 16, 9, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_do(dtype):
    case = make_case(4, 16, 8, 4, 2, dtype=dtype, bias=True)
    assert decode(replace(case, topk_ids=torch.full((4, 2), -1))).eq(0).all()
    no_tokens = make_case(0, 16, 8, 4, 2, dtype=dtype)
    assert decode(no_tokens).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_reaches_the_token_that_has_it_and_no_other(dtype):
    case = make_case(6, 24, 16, 4, 2, dtype=dtype, bias=True)
    ids = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1], [2, 1], [0, -1]]).int()
    clean = decode(replace(case, topk_ids=ids))
    x = torch.where(torch.arange(6)[:, None] == 2, math.nan, case.x)
    weights = case.topk_weights.clone()
    weights[5, 1] = math.nan  # of an absent slot
    w13 = torch.where(torch.arange(4)[:, None, None] == 3, math.nan, case.w13)  # of an expert that nobody chose
    dirty = decode(replace(case, topk_ids=ids, x=x, topk_weights=weights, w13=w13))
    assert dirty[2].isnan().all()
    assert torch.equal(torch.cat([dirty[:2], dirty[3:]]), torch.cat([clean[:2], clean[3:]]))


@pytest.mark.parametrize("seed", range(9))  # three schedules of the threads times three of the asynchronous copies
def test_every_schedule_gives_the_same_bits(seed):
    case = make_case(7, 264, 40, 5, 3, dtype=torch.bfloat16, bias=True, absent=True, seed=4)
    simt_ops.restart(0)
    first = decode(case)
    simt_ops.restart(seed)
    assert torch.equal(decode(case), first)


def test_a_token_does_not_see_the_tokens_beside_it():
    """The same bits alone and among eight: the order of its sums depends on nothing but the sizes."""
    case = make_case(8, 392, 264, 6, 3, dtype=torch.bfloat16, bias=True, seed=5)
    together = decode(case)
    for t in range(8):
        one = replace(
            case, x=case.x[t : t + 1], topk_ids=case.topk_ids[t : t + 1], topk_weights=case.topk_weights[t : t + 1]
        )
        assert torch.equal(decode(one)[0], together[t])


def test_rows_may_be_strided():
    case = make_case(5, 24, 16, 4, 2, dtype=torch.bfloat16)
    wide = torch.full((5, 40), math.nan, dtype=torch.bfloat16)
    wide[:, 8:32] = case.x
    compare(replace(case, x=wide[:, 8:32]), mma=True)
    wide = torch.full((5, 41), math.nan, dtype=torch.bfloat16)
    wide[:, 1:25] = case.x
    compare(replace(case, x=wide[:, 1:25]), mma=False)


# ---- addresses: every weight is read once, in whole sectors, and no access meets a bank twice


def source(record):
    file, line = record["site"].split(",")[0].rsplit(":", 1)
    return (simt_ops.ROOT / file).read_text().splitlines()[int(line) - 1].strip()


@pytest.mark.parametrize("T", [1, 8, 16])
def test_weights_are_read_once(T):
    """All tokens choose the same two experts, so that every lane does as much and the audit counts exactly."""
    E, H, I, K = 4, 256, 64, 2
    case = replace(make_case(T, H, I, E, K, dtype=torch.bfloat16), topk_ids=torch.tensor([[1, 3]] * T).int())
    with direct.audit() as records:
        decode(case, mma=True)
    loads = [r for r in records if r["space"] == "global" and "__ldg(static_cast<const uint4*>" in source(r)]
    tokens = -(-I // 16) * H + -(-H // 16) * I  # every block reads the rows of its experts
    assert 32 * sum(r["served"] for r in loads) == 2 * (K * 3 * I * H + T * K * tokens)
    assert all(r["served"] == r["ideal"] for r in loads)
    shared = {source(r) for r in records if r["space"] == "shared" and r["served"] > r["ideal"]}
    assert not {text for text in shared if "slot" not in text}, "only a sum goes where an id says"

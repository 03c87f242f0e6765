# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the emulator, beyond the stage tests: many blocks, every schedule, equal ids, bytes moved."""

import os

import pytest
import simt_ops
import torch

import moe_kernels as mk
from moe_kernels import reference
from moe_kernels.schemas import SCORING
from moe_kernels.testing import make_ids

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())
SIMT = simt_ops.BACKEND


@pytest.fixture(autouse=True)
def _first_seed():
    simt_ops.restart()


# ---- the same ids as on the CPU, to the last bit


def close_calls(T, E):
    """Logits whose neighbours differ by one to four units in the last place, or not at all."""
    base = torch.randn(T, 1) * 3
    steps = torch.randint(0, 5, (T, E), dtype=torch.int32)
    return (base.view(torch.int32) + steps).view(torch.float32) + torch.randint(0, 3, (T, 1)) * 20.0


RULES = {
    "plain": {},
    "bias": {"bias": 1e-7},
    "groups": {"num_expert_group": 8, "topk_group": 3, "group_top": 2},
    "group_sum": {"num_expert_group": 8, "topk_group": 3, "group_top": 4, "bias": 1e-7},
    "softcap": {"logit_softcap": 5.0},
}


@pytest.mark.skipif(
    os.environ.get("MOE_KERNELS_ISA") == "portable", reason="without fused multiply-add exp rounds twice"
)
@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize("rule", RULES)
def test_ids_are_those_of_the_cpu_where_scores_nearly_tie(rule, scoring):
    T, E, K = 64, 64, 8
    options = dict(RULES[rule])
    bias = torch.randint(-2, 3, (E,)) * options.pop("bias", 0.0)
    call = dict(options, scoring_func=scoring, e_score_correction_bias=bias if "bias" in RULES[rule] else None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = close_calls(T, E).to(dtype)
        got, wanted = SIMT.route(logits, K, **call), mk.route(logits, K, **call)
        assert torch.equal(got.topk_ids, wanted.topk_ids)
        assert torch.equal(got.tokens_per_expert, wanted.tokens_per_expert)
        scores = (a.topk_weights * a.topk_weights.sum(-1, keepdim=True) for a in (got, wanted))
        torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-7)


# ---- any schedule gives the same bits


@pytest.mark.parametrize("seed", range(9))  # three schedules of the threads times three of the asynchronous copies
def test_every_schedule_gives_the_same_bits(seed):
    torch.manual_seed(seed)
    logits = torch.randn(37, 24, dtype=torch.bfloat16, requires_grad=True)
    x, pull = torch.randn(37, 16, requires_grad=True), torch.randn(37, 16)
    found = []
    for first in (seed, 9 + seed):
        simt_ops.restart(first)
        routing = SIMT.route(logits, 3)
        rows = SIMT.permute(x, routing.topk_ids, 24, align=4)
        y = SIMT.unpermute(rows.x_rows, rows.slot_to_row, routing.topk_weights)
        grads = torch.autograd.grad(y, (logits, x), pull)
        found.append((*routing[:4], *rows, y, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("seed", range(9))
def test_every_schedule_gives_the_same_sums_and_drops(seed):
    torch.manual_seed(seed)
    logits, pull = torch.randn(150, 37, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 37)
    found = []
    for first in (seed, 9 + seed):
        simt_ops.restart(first)
        routing, sums = SIMT.route_with_sums(logits, 3, 2, scoring_func="sigmoid")
        grads = torch.autograd.grad((sums, routing.topk_weights.sum()), logits, (pull, torch.ones(())))
        late = SIMT.limit_capacity(routing.topk_ids, 37, 4, group_size=60)
        found.append((sums, *grads, late))
    assert all(torch.equal(a, b) for a, b in zip(*found))


# ---- more slots than one block takes


@pytest.mark.parametrize(("E", "align"), [(5, 1), (37, 8), (2048, 1)])
def test_permute_over_many_blocks(E, align):
    T, K = 6000, 3
    assert T * K > 16384
    ids = make_ids(T, E, K, "zipf", torch.Generator().manual_seed(3)).long()
    ids[::7, 1] = -1
    ids[5, 0] = 2**33 + 1
    x = torch.randn(T, 2)
    for got, wanted in zip(SIMT.permute(x, ids, E, align=align), mk.permute(x, ids, E, align=align)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("slots", [16384, 16385])
def test_permute_around_the_border_of_one_block(slots):
    ids = torch.randint(0, 3, (slots, 1), dtype=torch.int32)
    got, wanted = SIMT.permute(torch.zeros(slots, 1), ids, 3), mk.permute(torch.zeros(slots, 1), ids, 3)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize(("E", "group_size"), [(5, None), (300, 3000)])
def test_limit_capacity_over_many_blocks(E, group_size):
    T, K = 7000, 6
    ids = make_ids(T, E, min(K, E), "zipf", torch.Generator().manual_seed(3))
    assert (group_size or T) * ids.shape[1] > 16384
    got, wanted = (f.limit_capacity(ids, E, 200, group_size=group_size) for f in (SIMT, mk))
    assert torch.equal(got, wanted) and got.any() and not got.all()


def test_sums_of_many_runs_and_groups():
    """Groups that several blocks sum, and more groups than there are blocks."""
    logits = torch.randn(4400, 9)
    for B in (1, 4, 1100, 4400):
        _, sums = SIMT.route_with_sums(logits, 2, B)
        _, wanted = mk.route_with_sums(logits, 2, B)
        torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(sums, SIMT.sum_scores(logits, 0, True, 0.0, B, None))


# ---- shapes and maps that the stage tests do not have


def test_many_experts_a_token():
    logits = torch.randn(3, 200)
    for K in (33, 64, 200):
        got, wanted = SIMT.route(logits, K), mk.route(logits, K)
        assert torch.equal(got.topk_ids, wanted.topk_ids)
        assert torch.equal(got.tokens_per_expert, wanted.tokens_per_expert)


@pytest.mark.parametrize("E", [4096, 6000])
def test_a_row_that_leaves_room_for_few_warps(E):
    logits = torch.randn(3, E, requires_grad=True)
    got, wanted = SIMT.route(logits, 4), mk.route(logits, 4)
    assert torch.equal(got.topk_ids, wanted.topk_ids)
    (grad,) = torch.autograd.grad(got.topk_weights.square().sum(), logits)
    (truth,) = torch.autograd.grad(wanted.topk_weights.square().sum(), logits)
    torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_that_are_not_aligned(dtype, offset):
    T, H = 9, 40
    memory = torch.randn(T * H + offset, dtype=torch.float64).to(dtype)
    x, ids = memory[offset:].view(T, H), make_ids(T, 6, 2, "uniform", torch.Generator().manual_seed(0))
    got, wanted = SIMT.permute(x, ids, 6), mk.permute(x, ids, 6)
    assert torch.equal(got.x_rows, wanted.x_rows)
    weights = torch.rand(T, 2)
    logits = SIMT.route(x, 3), mk.route(x, 3)
    assert torch.equal(*(r.topk_ids for r in logits))
    y = [f.unpermute(r.x_rows, r.slot_to_row, weights) for f, r in ((SIMT, got), (mk, wanted))]
    torch.testing.assert_close(*y)


@pytest.mark.parametrize("H", [3, 64])
def test_rows_that_several_slots_name(H):
    slots = torch.tensor([2, 0, -1, 2, 1, 2, 99, 0], dtype=torch.int32)
    rows, weights = torch.randn(5, H, requires_grad=True), torch.rand(4, 2, requires_grad=True)
    pull = torch.randn(4, H)
    found = [torch.autograd.grad(f.unpermute(rows, slots, weights), (rows, weights), pull) for f in (SIMT, reference)]
    assert found[0][0][3:].eq(0).all()
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted)


def test_an_empty_hidden_dimension():
    got = SIMT.permute(torch.zeros(4, 0), torch.zeros(4, 1, dtype=torch.int32), 2)
    assert got.x_rows.shape == (4, 0)
    assert got.row_to_slot.tolist() == [0, 1, 2, 3]


# ---- bytes: counted from the addresses, in sectors of 32 bytes


def audited(run):
    """(bytes that global memory moved, bytes asked for, records) of the kernels that `run` starts."""
    with simt_ops.audit() as records:
        run()
    of_global = [r for r in records if r["space"] == "global"]
    return 32 * sum(r["served"] for r in of_global), 32 * sum(r["ideal"] for r in of_global), records


def source(record):
    """The line of the kernel that a record counts."""
    file, line = record["site"].split(",")[0].rsplit(":", 1)
    return f"{file}:{line}: " + (simt_ops.ROOT / file).read_text().splitlines()[int(line) - 1].strip()


def conflicts(records):
    """The source lines whose shared requests took more wavefronts than their bytes need. None may be avoidable: an
    access that goes where an id says is not."""
    by_id = ("ids[", "mine[expert]", "row_to_slot[")
    worse = {source(r) for r in records if r["space"] == "shared" and r["served"] > r["ideal"]}
    return {text for text in worse if not any(word in text for word in by_id)}


ROUTE_SHAPES = [(8, 2), (37, 4), (128, 8), (256, 8), (512, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("E", "K"), ROUTE_SHAPES)
def test_route_reads_the_logits_once(E, K, dtype):
    T = 1024 if E > 256 else 4096 // dtype.itemsize  # four tokens a warp: a block adds its counts up only once
    logits = torch.randn(T, E).to(dtype)
    least = logits.nbytes + T * K * 8 + T * 4
    total, _, records = audited(lambda: SIMT.route(logits, K))
    assert total <= 1.15 * least
    assert not conflicts(records)
    logits = logits[:256]
    leaf, pull = logits.requires_grad_(), torch.ones(len(logits), K)
    routing = SIMT.route(leaf, K)
    least = 2 * logits.nbytes + len(logits) * K * 12
    total, _, records = audited(lambda: torch.autograd.grad(routing.topk_weights, leaf, pull))
    assert total <= 1.15 * least
    assert not conflicts(records)


@pytest.mark.parametrize(("E", "K", "T", "dtype"), [(37, 4, 2048, torch.float32), (40, 8, 4096, torch.bfloat16)])
def test_sums_of_scores_read_nothing_twice(E, K, T, dtype):
    """With the sums that losses want, too: the logits once, what is returned once."""
    logits = torch.randn(T, E).to(dtype)
    total, _, records = audited(lambda: SIMT.route_with_sums(logits, K))
    assert total <= 1.15 * (logits.nbytes + T * K * 8 + T * 4 + E * 8)
    assert not conflicts(records)
    logits = logits[:512]
    leaf = logits.requires_grad_()
    routing, sums = SIMT.route_with_sums(leaf, K)
    pulls = (torch.ones(len(leaf), K), torch.ones(1, E), torch.ones(len(leaf)))
    least = 2 * leaf.nbytes + len(leaf) * (K * 12 + 4) + E * 4
    outputs = (routing.topk_weights, sums, routing.lse)
    total, _, records = audited(lambda: torch.autograd.grad(outputs, leaf, pulls))
    assert total <= 1.15 * least
    assert not conflicts(records)


@pytest.mark.parametrize(("G", "M"), [(8, 4), (4, 1)])
def test_route_with_groups_has_no_bank_conflict(G, M):
    bias = torch.randn(256)
    _, _, records = audited(
        lambda: SIMT.route(torch.randn(16, 256), 8, scoring_func="sigmoid", e_score_correction_bias=bias,
                           num_expert_group=G, topk_group=M)
    )  # fmt: skip
    assert not conflicts(records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [8, 64, 1040])
def test_rows_move_whole_sectors(H, dtype):
    """Every request to rows of a multiple of 32 bytes is served by as few sectors as its bytes need."""
    H = max(H, 32 // dtype.itemsize)
    ids = make_ids(64, 8, 4, "uniform", torch.Generator().manual_seed(0))
    x, weights = torch.randn(64, H).to(dtype).requires_grad_(), torch.rand(64, 4, requires_grad=True)

    def layer():
        rows = SIMT.permute(x, ids, 8)
        y = SIMT.unpermute(rows.x_rows, rows.slot_to_row, weights)
        torch.autograd.grad(y, (x, weights), torch.ones_like(y))

    _, _, records = audited(layer)
    scattered = ("args.row_to_slot[row] =", "atomicMin(", "atomicMax(")  # one number an id, wherever it belongs
    rows = [r for r in records if r["space"] == "global" and not any(text in source(r) for text in scattered)]
    assert rows
    assert [source(r) for r in rows if r["served"] > r["ideal"]] == []
    assert not conflicts(records)

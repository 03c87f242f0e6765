# SPDX-License-Identifier: Apache-2.0
"""What holds for any sizes and any ids: maps invert each other, token order does not matter, counts add up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_kernels as mk
from moe_kernels import reference

settings.register_profile("moe_kernels", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("moe_kernels")


@st.composite
def routed(draw):
    """topk_ids [T, K] with absent ones, E, and a seed for everything else."""
    T, K, E = draw(st.integers(0, 20)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    flat = draw(st.lists(st.integers(-1, E), min_size=T * K, max_size=T * K))
    return torch.tensor(flat, dtype=torch.int32).reshape(T, K), E, draw(st.integers(0, 2**20))


@given(routed(), st.integers(1, 8))
def test_slot_to_row_inverts_row_to_slot(case, align):
    ids, E, _ = case
    got = mk.permute(torch.ones(len(ids), 1), ids, E, align=align)
    rows = torch.where(got.row_to_slot >= 0)[0]
    assert torch.equal(got.slot_to_row[got.row_to_slot[rows].long()].long(), rows)
    kept = (ids.flatten() >= 0) & (ids.flatten() < E)
    assert torch.equal(got.slot_to_row >= 0, kept)
    counts = torch.bincount(ids.flatten()[kept], minlength=E)
    assert torch.equal(got.expert_offsets.diff().long(), (counts + align - 1) // align * align)
    assert got.expert_offsets[-1] <= len(got.row_to_slot)
    slots = got.row_to_slot[rows]
    owner = torch.bucketize(rows, got.expert_offsets[1:].long(), right=True)
    assert torch.equal(owner, ids.flatten()[slots.long()].long())
    assert all(slots[owner == e].diff().gt(0).all() for e in range(E))  # stable


@given(routed(), st.integers(1, 4))
def test_combine_of_dispatch_is_identity(case, align):
    ids, E, seed = case
    x = torch.randint(-8, 9, (len(ids), 3), generator=torch.Generator().manual_seed(seed)).float()
    got = mk.permute(x, ids, E, align=align)
    kept = ((ids >= 0) & (ids < E)).float()
    y = mk.unpermute(got.x_rows, got.slot_to_row, torch.ones(ids.shape))
    assert torch.equal(y, x * kept.sum(1, keepdim=True))


@given(routed())
def test_permuting_the_tokens_permutes_the_result(case):
    ids, E, seed = case
    g = torch.Generator().manual_seed(seed)
    x, w13, w2, weights = small_integers(ids, E, g)
    order = torch.randperm(len(ids), generator=g)
    y = mk.fused_experts(x, w13, w2, weights, ids, activation="relu")
    assert torch.equal(mk.fused_experts(x[order], w13, w2, weights[order], ids[order], activation="relu"), y[order])


def small_integers(ids, E, g):
    """x, w13, w2, topk_weights in which every sum is exact in float32, so that its order does not matter."""
    sizes = (len(ids), 6), (E, 8, 6), (E, 6, 4), ids.shape
    return [torch.randint(-3, 4, size, generator=g).float() for size in sizes]


@given(routed())
def test_absent_slots_can_be_left_out(case):
    """A slot with weight 0 of a live expert gives what an absent slot gives."""
    ids, E, seed = case
    g = torch.Generator().manual_seed(seed)
    x, w13, w2, weights = small_integers(ids, E, g)
    gone = (ids < 0) | (ids >= E)
    zero = mk.fused_experts(x, w13, w2, torch.where(gone, 0.0, weights), torch.where(gone, 0, ids), activation="relu")
    assert torch.equal(zero, mk.fused_experts(x, w13, w2, weights, ids, activation="relu"))


@given(st.integers(0, 12), st.integers(1, 40), st.data())
def test_route_of_any_logits(T, E, data):
    K = data.draw(st.integers(1, E))
    floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
    logits = torch.tensor(data.draw(st.lists(floats, min_size=T * E, max_size=T * E))).reshape(T, E)
    scoring = data.draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    got = mk.route(logits, K, scoring_func=scoring)
    assert got.topk_weights.isfinite().all()
    assert got.topk_weights.ge(0).all()
    rounding = (K + 2) * torch.finfo(torch.float32).eps  # of the sum of K that divides, and of each quotient
    assert got.topk_weights.double().sum(-1).le(1 + rounding).all()
    assert all(len(set(row)) == K and min(row) >= 0 and max(row) < E for row in got.topk_ids.tolist())
    assert int(got.tokens_per_expert.sum()) == T * K


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**20))
def test_ids_are_those_of_a_stable_sort(T, groups, size, seed):
    """Few distinct values: ties everywhere, with and without groups."""
    E, g = groups * size, torch.Generator().manual_seed(seed)
    M = int(torch.randint(1, groups + 1, (), generator=g))
    K = int(torch.randint(1, M * size + 1, (), generator=g))
    logits = torch.randint(0, 3, (T, E), generator=g).float()
    bias = torch.randint(0, 3, (E,), generator=g).float() if seed % 2 else None
    options = {"scoring_func": "sigmoid", "num_expert_group": groups, "topk_group": M, "e_score_correction_bias": bias}
    assert torch.equal(mk.route(logits, K, **options).topk_ids, reference.route(logits, K, **options).topk_ids)

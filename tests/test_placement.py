# SPDX-License-Identifier: Apache-2.0
"""Placement of experts: the published example, invariants on random loads, and weights that move between processes."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import placement
from moe_kernels.placement import Placement, apply_placement, balance, routes

# the example of github.com/deepseek-ai/EPLB's README: two layers of 12 experts, 4 copies each, 2 nodes of 4 ranks
LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@pytest.mark.parametrize(("load", "want"), list(zip(LOADS, PUBLISHED)))
def test_the_published_example(load: list[int], want: list[int]) -> None:
    found = balance(load, num_slots=16, world_size=8, num_nodes=2, num_groups=4)
    assert found.experts.tolist() == want
    assert balance(load[::-1], num_slots=16, world_size=8, num_nodes=2, num_groups=4).experts.tolist() != want


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    nodes, per_node, groups_a_node, group = (draw(st.integers(1, 4)) for _ in range(4))
    W, groups = nodes * per_node, nodes * groups_a_node
    E = groups * group
    slots = -(-E // W) * W + W * draw(st.integers(0, 3))
    load = draw(st.lists(st.one_of(st.integers(0, 50), st.floats(0, 1e6)), min_size=E, max_size=E))
    return {"load": load, "num_slots": slots, "world_size": W, "num_nodes": nodes, "num_groups": groups}


@settings(max_examples=300, deadline=None)
@given(cases())
def test_invariants(case: dict) -> None:  # type: ignore[type-arg]
    found = balance(**case)
    E, R, W, N = len(case["load"]), case["num_slots"], case["world_size"], case["num_nodes"]
    assert found.num_experts == E and len(found.experts) == R and found.slots_a_rank * W == R
    assert int(found.copies.min()) >= 1
    load = torch.tensor(case["load"], dtype=torch.float64)
    assert torch.allclose(found.rank_load(load).sum(), load.sum())
    node_of_slot = torch.arange(R) // (R // N)
    group_of_slot = found.experts // (E // case["num_groups"])
    for group in range(case["num_groups"]):  # a group and its copies live on one node
        assert len(node_of_slot[group_of_slot == group].unique()) == 1
    room = -(-E // W)
    plain = balance(case["load"], num_slots=room * W, world_size=W, num_nodes=N, num_groups=case["num_groups"])
    if room * W == E:  # without a single copy, on the same ranks and nodes
        assert float(found.rank_load(load).max()) <= float(plain.rank_load(load).max()) * (1 + 1e-12)


def test_no_fuller_than_without_copies_where_the_greedy_way_would_be() -> None:
    """Copies take room: packed greedily, 3 experts in 4 slots of 2 ranks leave a fuller rank than 1 expert alone."""
    for load in ([10.0, 10.0, 9.0, 1.0], [7, 7, 7, 6, 6, 6], [3, 3, 2, 2, 2]):
        for slots in range(len(load) + len(load) % 2, 3 * len(load), 2):
            found = balance(load, num_slots=slots, world_size=2).rank_load(load)
            single = placement._pack(load, 2, -(-len(load) // 2))
            assert float(found.max()) <= max(sum(load[i] for i in pack) for pack in single) + 1e-12


def test_copies_relieve_a_hot_expert() -> None:
    load = [100, 1, 1, 1, 1, 1, 1, 1]
    none, some = (balance(load, num_slots=R, world_size=4) for R in (8, 12))
    assert float(none.rank_load(load).max()) >= 100
    assert float(some.rank_load(load).max()) < 45  # 2 of 5 copies on one rank
    assert int(some.copies[0]) == 5


def test_any_number_of_groups_that_the_nodes_do_not_divide_is_global() -> None:
    load = LOADS[0]
    anywhere = balance(load, num_slots=16, world_size=8, num_nodes=2, num_groups=3)
    assert torch.equal(anywhere.experts, balance(load, num_slots=16, world_size=8).experts)
    bound = balance(load, num_slots=16, world_size=8, num_nodes=2, num_groups=4)
    assert float(anywhere.rank_load(load).max()) <= float(bound.rank_load(load).max())


def test_slots_of_spreads_tokens_over_the_copies() -> None:
    found = Placement(torch.tensor([0, 1, 0, 2, 0, 1]), 3)
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [-1, 9], [0, 1]], dtype=torch.int32)
    slots = found.slots_of(ids, source=1)
    assert slots.dtype == torch.int32
    assert slots[3].tolist() == [-1, -1]
    here = (ids >= 0) & (ids < 3)
    assert torch.equal(found.experts[slots[here].long()], ids[here].long())
    many = found.slots_of(torch.zeros(30, 1, dtype=torch.int64))
    assert torch.bincount(many.flatten(), minlength=6).tolist() == [10, 0, 10, 0, 10, 0]
    assert not torch.equal(many, found.slots_of(torch.zeros(30, 1, dtype=torch.int64), source=1))


def test_routes_stay_where_they_can() -> None:
    old = Placement(torch.tensor([0, 1, 2, 3, 0, 1]), 3)
    new = Placement(torch.tensor([1, 0, 2, 0, 3, 1]), 3)
    assert routes(old, new) == [1, 0, 2, 0, 3, 5]
    assert routes(old, old) == [0, 1, 2, 3, 4, 5]
    assert routes(old, new, 2) == [3, 5]
    copies = Placement(torch.tensor([0, 1, 2, 3, 0, 0]), 3)
    away = routes(Placement(torch.tensor([0, 1, 0, 2, 3, 3]), 3), copies)
    assert away[4:] == [0, 2]  # two new copies, fetched from two holders


@pytest.mark.parametrize("world", [2, 4])
def test_a_layer_and_its_optimizer_move(world: int, tmp_path: Path) -> None:
    found = processes.run("plan_workers:moved", tmp_path, world=world)
    for rank in found:
        assert rank["outputs"] == [True] * 4
        assert len(rank["equal"]) > 4 * 7 and all(rank["equal"])
    assert sum(rank["sent"] for rank in found) > 0


def test_every_dtype_and_stride_moves(tmp_path: Path) -> None:
    assert processes.run("plan_workers:kinds", tmp_path, world=2) == [[True] * 7] * 2


def test_ranks_that_disagree_all_raise_and_nothing_moves(tmp_path: Path) -> None:
    said = processes.run("plan_workers:disagree", tmp_path, world=4)
    for rank, lines in enumerate(said):
        other = "RuntimeError: apply_placement: rank 3 of the group has other placements, shapes or dtypes"
        refused = "RuntimeError: apply_placement: rank 3 of the group refused its arguments"
        assert lines[0] == lines[1] == other
        if rank < 3:
            assert lines[2] == lines[3] == lines[4] == refused
        else:
            assert lines[2] == "ValueError: apply_placement: tensors[0] must be a tensor [R/W=2, ...], got float32 [3]"
            assert lines[3] == "TypeError: apply_placement: old must be a Placement, got str 'old'"
            assert lines[4].startswith("ValueError: apply_placement: new must be of old's E=8 experts in R=8 slots")
        assert lines[5] == f"sent {2 * 2 * 4}"


def test_one_process_needs_no_group() -> None:
    old, new = Placement(torch.arange(4), 1), Placement(torch.tensor([2, 0, 3, 1]), 1)
    w = torch.arange(8.0).view(4, 2)
    assert apply_placement([w], old, new) == 0
    assert torch.equal(w, torch.arange(8.0).view(4, 2)[new.experts])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Placement(torch.tensor([0, 2, 0]), 1), ValueError, "every expert of 0..E-1, got none of [1]"),
        (lambda: Placement(torch.tensor([0, 1, 2]), 2), ValueError, "a multiple of world_size=2 slots, got 3"),
        (lambda: Placement(torch.tensor([0.0]), 1), TypeError, "Placement: experts must be int32 or int64 [R]"),
        (lambda: Placement(torch.tensor([-1, 0]), 1), ValueError, "in 0..1 (an expert)"),
        (lambda: balance([1, 2], num_slots=1, world_size=1), ValueError, "balance: num_slots must be 2 or more"),
        (lambda: balance([1, 2], num_slots=3, world_size=2), ValueError, "num_slots must be a multiple of world_size"),
        (lambda: balance([1, 2, 3], num_slots=4, world_size=2, num_groups=2), ValueError, "a divisor of E=3, got 2"),
        (lambda: balance([1, -2], num_slots=2, world_size=1), ValueError, "balance: load must be [E] finite counts"),
        (lambda: balance([float("nan")], num_slots=2, world_size=1), ValueError, "load must be [E] finite counts"),
        (lambda: balance([], num_slots=2, world_size=1), ValueError, "load must be [E] finite counts"),
        (lambda: balance([1], num_slots=2, world_size=0), ValueError, "world_size must be 1 or more"),
        (lambda: Placement(torch.tensor([0]), 1).slots_of(torch.zeros(2)), TypeError, "slots_of: topk_ids must be"),
    ],
)  # fmt: skip
def test_refusals(make, error: type[Exception], text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)

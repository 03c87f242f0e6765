# SPDX-License-Identifier: Apache-2.0
"""The planner: counted rows against a token-by-token count, expectations against counts of many draws, times against
the published table of the model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import moe_kernels as mk
from moe_kernels.planning import Links, chances, exact_traffic, flows, metadata_bytes, owners, plan, planner, row_bytes

F8, BF16 = torch.float8_e4m3fn, torch.bfloat16
BARE = dict.fromkeys(("flat", "rank_dedup", "two_level", "allgather"), 0)


def draw(T: int, E: int, K: int, seed: int = 0) -> torch.Tensor:
    """K distinct experts a token."""
    return torch.rand(T, E, generator=torch.Generator().manual_seed(seed)).topk(K).indices


# ---- rows: counted


def walk(ids: list[list[list[int]]], owner: list[int], W: int, g: int) -> dict[str, dict[tuple[int, int], int]]:
    """Every message of every token, one by one."""
    seen: dict[str, dict[tuple[int, int], int]] = {p: {} for p in ("flat", "rank_dedup", "rail", "node", "allgather")}

    def send(phase: str, source: int, to: int) -> None:
        seen[phase][source, to] = seen[phase].get((source, to), 0) + 1

    for source, tokens in enumerate(ids):
        for token in tokens:
            ranks = [owner[e] for e in token if 0 <= e < len(owner)]
            for r in ranks:
                send("flat", source, r)
            for r in set(ranks):
                send("rank_dedup", source, r)
            for n in {r // g for r in ranks}:
                forwarder = n * g + source % g
                send("rail", source, forwarder)
                for r in {r for r in ranks if r // g == n}:
                    send("node", forwarder, r)
    for pair in itertools.product(range(W), repeat=2):
        seen["allgather"][pair] = max(len(tokens) for tokens in ids)
    return seen


@pytest.mark.parametrize(("W", "g", "E", "K"), [(4, 2, 8, 3), (8, 4, 13, 5), (6, 2, 6, 6), (4, 1, 8, 2), (3, 8, 7, 1)])
def test_counted_rows_are_those_of_a_walk_over_all_tokens(W: int, g: int, E: int, K: int) -> None:
    ids = [draw(5 + 3 * r, E, K, seed=r) for r in range(W)]
    ids[0][0, 0], ids[1][1, 0], ids[-1][0] = -1, E, 2**31 - 1  # absent
    owner = torch.randperm(E, generator=torch.Generator().manual_seed(7)) % W
    found = exact_traffic(ids, E, ranks_per_node=g, hidden=16, placement=owner)
    g = min(g, W)
    want = walk([t.tolist() for t in ids], owner.tolist(), W, g)
    for traffic in found.values():
        for phase, rows in traffic.rows.items():
            have = {(i, j): int(rows[i, j]) for i in range(W) for j in range(W) if rows[i, j]}
            assert have == want[phase], phase
    for name, phases in (("flat", ("flat",)), ("two_level", ("rail", "node"))):
        traffic = found[name]
        for rank in range(W):
            out, back = (
                sum(c for p in phases for pair, c in want[p].items() if pair[side] == rank and pair[0] != pair[1])
                for side in (0, 1)
            )
            assert traffic.sent(rank) == out * (16 * 2 + metadata_bytes(name, K))
            assert traffic.returned(rank) == back * 16 * 2
            both = traffic.bytes_sent(rank)
            assert sum(both.values()) == traffic.sent(rank) + traffic.returned(rank)
            away = {
                side: sum(
                    c for p in phases for (i, j), c in want[p].items() if (i, j)[side] == rank and i // g != j // g
                )
                for side in (0, 1)
            }
            assert both["nic"] == away[0] * traffic.row_bytes + away[1] * 16 * 2
        between = sum(c for p in phases for (i, j), c in want[p].items() if i // g != j // g)
        assert traffic.link_bytes()["nic"] == between * traffic.row_bytes
    if g > 1 and g < W:  # the twin: another count is seen
        ids[0][1, 0] = (int(ids[0][1, 0]) + 1) % E
        other = exact_traffic(ids, E, ranks_per_node=g, hidden=16, placement=owner)
        assert not torch.equal(other["flat"].rows["flat"], found["flat"].rows["flat"])


def test_a_last_node_that_is_smaller_has_no_two_level() -> None:
    found = exact_traffic([draw(4, 6, 2, r) for r in range(6)], 6, ranks_per_node=4, hidden=8)
    assert set(found) == {"flat", "rank_dedup", "allgather"}
    assert "two_level" not in plan(16, 8, 8, 6, 2, 6, gpus_per_node=4).us


def test_row_and_metadata_bytes() -> None:
    assert row_bytes(7168, F8) == 7168 + 56 * 4 == 7392
    assert row_bytes(7168, BF16) == 14336
    assert row_bytes(129, F8, 64) == 129 + 8 + 64
    assert [metadata_bytes(n, 8) for n in ("flat", "two_level", "allgather")] == [8, 64, 64]
    assert metadata_bytes("two_level", 8, torch.float64) == 96 and metadata_bytes("flat", 8, torch.float64) == 12
    assert row_bytes(2**40, torch.float64) == 2**43


def test_owners_are_contiguous_and_even() -> None:
    assert owners(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert owners(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert owners(2, 4).tolist() == [0, 1]


# ---- rows: expected


def every_choice(E: int, K: int) -> torch.Tensor:
    return torch.tensor(list(itertools.combinations(range(E), K)))


@pytest.mark.parametrize(("W", "g", "E", "K"), [(4, 2, 8, 3), (6, 3, 9, 2), (4, 4, 6, 5), (6, 4, 7, 3)])
def test_expectations_are_the_mean_over_every_choice(W: int, g: int, E: int, K: int) -> None:
    """Exactly: each rank sends one token of each of the C(E, K) choices."""
    choices = every_choice(E, K)
    T = len(choices)
    expected, counted = (plan(T, 8, 8, E, K, W, gpus_per_node=g, topk_ids=ids) for ids in (None, [choices] * W))
    for name, rows in counted.rows.items():
        assert expected.rows[name] == pytest.approx(rows, rel=1e-12, abs=1e-9), name
        assert expected.bytes[name] == counted.bytes[name]
    assert expected.imbalance == pytest.approx(counted.imbalance)


def test_confined_to_nodes_the_expectation_is_the_mean_over_every_choice() -> None:
    W, g, L, K, M = 6, 2, 2, 3, 2  # 3 nodes of 4 experts
    nodes = itertools.combinations(range(3), M)
    choices = torch.tensor(
        [[n[c // 4] * 4 + c % 4 for c in pick] for n in nodes for pick in itertools.combinations(range(4 * M), K)]
    )
    T = len(choices)
    counted = plan(T, 8, 8, W * L, K, W, gpus_per_node=g, topk_ids=[choices] * W)
    expected = plan(T, 8, 8, W * L, K, W, gpus_per_node=g, nodes_per_token=M)
    for name, rows in counted.rows.items():
        assert expected.rows[name] == pytest.approx(rows, rel=1e-12), name
    assert expected.rows["two_level"]["nic"] < plan(T, 8, 8, W * L, K, W, gpus_per_node=g).rows["two_level"]["nic"]


def test_a_load_is_met_by_the_choice_of_maximum_entropy() -> None:
    """A set of K is as likely as the product of its odds: sum over all sets."""
    E, K, W, g = 7, 3, 4, 2
    load = torch.tensor([5.0, 1.0, 0.5, 2.0, 3.0, 0.0, 4.0])
    share = load * K / load.sum()
    some = share > 0
    w = torch.zeros(E, dtype=torch.float64)
    w[some] = chances.odds(share[some].double(), K)
    choices = every_choice(E, K)
    weight = w[choices].prod(1)
    weight /= weight.sum()
    taken = torch.zeros(E, dtype=torch.float64).index_add_(0, choices.flatten(), weight.repeat_interleave(K))
    assert torch.allclose(taken, share.double(), atol=1e-8)
    owner = owners(E, W)
    hit = torch.stack([((owner[choices] == r).any(1) * weight).sum() for r in range(W)])
    assert torch.allclose(chances.hits_of_load(share.double(), K, [(owner, W)])[0], hit, atol=1e-8)
    node = torch.stack([((owner[choices] // g == n).any(1) * weight).sum() for n in range(2)])
    found = plan(1000, 8, 8, E, K, W, gpus_per_node=g, load=load)
    assert found.rows["two_level"]["nic"] == pytest.approx(1000 * float(node.sum()) / 2, rel=1e-6)
    assert found.imbalance == pytest.approx(float(chances_of(owner, share, W).max()) * W / K, rel=1e-6)


def chances_of(owner: torch.Tensor, share: torch.Tensor, W: int) -> torch.Tensor:
    return torch.zeros(W).scatter_add_(0, owner, share)


@pytest.mark.parametrize(("E", "K"), [(2, 1), (3, 2), (9, 4), (40, 8), (300, 6), (5, 4)])
def test_odds_reach_the_chances_that_are_wanted(E: int, K: int) -> None:
    """Skewed and nearly certain shares too; the chance that an expert is taken adds up over all bins."""
    for power in (0.0, 1.0, 4.0, 12.0):
        share = torch.rand(E, dtype=torch.float64, generator=torch.Generator().manual_seed(E)) ** power + 1e-4
        for _ in range(200):  # shares at most 0.999 that sum to K
            share = (share * (K / share.sum())).clamp(max=0.999)
        share = share * (K / share.sum())
        if float(share.max()) >= 1:
            continue
        (each,) = chances.hits_of_load(share, K, [(torch.arange(E), E)])
        assert float((each - share).abs().max()) < 1e-9, power
        (two,) = chances.hits_of_load(share, K, [(torch.arange(E) * 2 // E, 2)])
        assert bool((two <= 1 + 1e-12).all()) and bool((two >= each.view(-1).max() - 1).all())


def test_an_even_load_is_no_load() -> None:
    same, none = (plan(512, 64, 64, 24, 4, 8, gpus_per_node=4, load=load) for load in ([3.0] * 24, None))
    for name, rows in none.rows.items():
        assert same.rows[name] == pytest.approx(rows, rel=1e-6)


def test_experts_that_every_token_takes() -> None:
    """Shares of 1/K and of 0 leave nothing to draw."""
    found = plan(10, 8, 8, 8, 2, 4, gpus_per_node=2, load=[1, 0, 0, 0, 0, 0, 1, 0])
    exact = plan(10, 8, 8, 8, 2, 4, gpus_per_node=2, topk_ids=[torch.tensor([[0, 6]] * 10)] * 4)
    assert found.rows == exact.rows
    (partly,) = chances.hits_of_load(
        torch.tensor([1, 0.5, 0.5], dtype=torch.float64), 2, [(torch.tensor([0, 1, 2]), 3)]
    )
    assert torch.allclose(partly, torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64))


# ---- times: the published tables of the model. H 7168, K 8, E 256 (E = W above 256 ranks), T 4096, 8 GPUs a node

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
DISPATCH_FP8 = {
    (None, "flat"): (631, 2770, 4158, 4868, 5257, 5519, 5784, 6185, 6924),
    (None, "rank_dedup"): (419, 2262, 3779, 4673, 5186, 5519, 5784, 6185, 6924),
    (None, "two_level"): (419, 763, 1951, 3281, 4309, 4957, 5300, 5513, 5688),
    (4, "flat"): (631, 2770, 4158, 4868, 5257, 5519, 5784, 6185, 6924),
    (4, "two_level"): (419, 763, 1951, 2275, 2457, 2593, 2655, 2720, 2819),
}
COMBINE_BF16 = {
    (None, "flat"): (1221, 5356, 8036, 9393, 10105, 10528, 10874, 11316, 12075),
    (None, "two_level"): (809, 1467, 3770, 6346, 8335, 9581, 10226, 10596, 10851),
    (4, "flat"): (1221, 5356, 8036, 9393, 10105, 10528, 10874, 11316, 12075),
    (4, "two_level"): (809, 1467, 3770, 4395, 4745, 4996, 5096, 5180, 5289),
}
NODES = {
    None: (1.00, 1.99, 3.61, 5.29, 6.52, 7.27, 7.63, 7.81, 7.90),
    4: (1.00, 1.99, 3.61, 3.63, 3.66, 3.72, 3.72, 3.72, 3.72),
}


def published(W: int, M: int | None, T: int = 4096, **more: Any) -> planner.Plan:
    return plan(T, 7168, 2048, max(256, W), 8, W, dispatch_dtype=F8, nodes_per_token=M, metadata=BARE, **more)


@pytest.mark.parametrize("M", [None, 4])
@pytest.mark.parametrize("W", RANKS)
def test_times_of_the_published_table(W: int, M: int | None) -> None:
    found, column = published(W, M), RANKS.index(W)
    for phase, table in ((0, DISPATCH_FP8), (1, COMBINE_BF16)):
        for (m, name), row in table.items():
            if m == M:
                assert round(found.phases[name][phase].total_us(8)) == row[column], (name, phase)
    if W > 8:  # E[nodes] shows in the rows that leave the node
        N = W // 8
        assert round(found.rows["two_level"]["nic"] / 4096 * N / (N - 1), 2) == NODES[M][column]


def test_decode_times_of_the_published_table() -> None:
    rows = {8: (23, 16), 16: (104, 36), 32: (158, 75), 64: (202, 119), 128: (257, 156), 256: (352, 186)}
    for W, want in rows.items():
        found = published(W, None, T=128).phases
        flat, two_level = (found[n][0].total_us(8) for n in ("flat", "two_level"))
        assert round(flat) == want[0]
        assert abs(two_level - want[1]) < 2  # the published column is cut more coarsely


def test_a_row_in_one_piece_loses_where_the_published_text_says() -> None:
    found = published(512, None).phases
    assert round(found["two_level"][0].total_us(1)) == 5852 > found["flat"][0].total_us(1)


# ---- the choice


def test_choice_follows_the_network() -> None:
    slow = Links(nic_gbs=5.0)
    assert plan(4096, 7168, 2048, 256, 8, 32, links=slow).transport == "two_level"
    assert plan(4096, 7168, 2048, 256, 8, 32, links=slow).dominant == "nic"
    assert plan(8, 64, 64, 8, 2, 8, gpus_per_node=1, links=Links(peer_us=50.0)).dominant == "launch"
    assert plan(4096, 1024, 65536, 8, 2, 8, links=Links(tflops=10)).dominant == "compute"
    # K = E: every token goes everywhere, and a collective forwards while it still receives
    assert plan(64, 1024, 64, 16, 16, 16).transport == "allgather"


def test_chunks_shrink_with_the_rows_of_an_expert() -> None:
    assert plan(64, 7168, 2048, 256, 8, 32).chunks == 1
    many = plan(65536, 7168, 2048, 64, 8, 32)
    assert many.chunks > 1
    assert many.step_us[many.transport] < many.us[many.transport] + many.compute_us


def test_a_single_rank_moves_nothing() -> None:
    alone = plan(128, 64, 64, 8, 2, 1)
    assert all(v == 0 for links in alone.bytes.values() for v in links.values())
    assert all(us == 0 for us in alone.us.values())
    none = plan(0, 64, 64, 8, 2, 16)
    assert all(v == 0 for links in none.bytes.values() for v in links.values())


def test_skew_costs_time_but_no_rows() -> None:
    load = torch.ones(64)
    load[:8] = 6.0  # of rank 0
    hot, even = (plan(4096, 7168, 2048, 64, 8, 8, load=v) for v in (load, None))
    assert hot.imbalance == pytest.approx(48 / (104 / 8))
    assert hot.phases["flat"][0].us["nvlink"] > 3 * even.phases["flat"][0].us["nvlink"]
    assert hot.rows["flat"]["nvlink"] == pytest.approx(even.rows["flat"]["nvlink"])


# ---- buffers and drops


def test_buffers_hold_what_a_simulation_receives() -> None:
    W, T, E, K, steps = 4, 64, 16, 4, 4000
    got = draw(steps * W * T, E, K).view(steps, W * T, K) // (E // W)
    slots = (got == 0).sum((1, 2)).double()
    hits = (got == 0).any(2).sum(1).double()
    found = flows.flows(flows.Shape(T, E, K, W, W)).received
    for name, rows in (("flat", slots), ("rank_dedup", hits)):
        error = 4 * float(rows.std()) / math.sqrt(steps)
        assert abs(found[name].mean - float(rows.mean())) < error
        beyond = float((rows > found[name].p99).double().mean())
        assert 0.004 < beyond < 0.018, name
        assert float(rows.max()) <= found[name].worst
    assert found["flat"].worst == W * T * min(K, E // W)
    assert found["two_level"].worst == W * T == found["rank_dedup"].worst


def test_recv_bytes_are_rows_of_the_chosen_transport() -> None:
    found = plan(128, 64, 32, 16, 4, 8, gpus_per_node=4, dispatch_dtype=torch.float32)
    received = flows.flows(flows.Shape(128, 16, 4, 8, 4)).received[found.transport]
    width = row_bytes(64, torch.float32, metadata_bytes(found.transport, 4))
    assert found.recv_worst == received.worst * width
    assert found.recv_mean == round(received.mean * width) <= found.recv_p99 <= found.recv_worst
    ids = [draw(128, 16, 4, r) for r in range(8)]
    counted = plan(128, 64, 32, 16, 4, 8, gpus_per_node=4, dispatch_dtype=torch.float32, topk_ids=ids)
    rows = counted.traffic[counted.transport].rows.values()
    width = row_bytes(64, torch.float32, metadata_bytes(counted.transport, 4))
    assert counted.recv_mean == int(sum(m.sum(0) for m in rows).max()) * width


def test_static_places_are_those_of_the_capacity() -> None:
    """Rows and bytes that depend on nothing; the twin: a factor more, and they differ."""
    for T, K, E, W, factor in ((128, 4, 16, 8, 1.25), (7, 2, 8, 4, 0.1), (0, 1, 4, 2, 1.0), (5, 8, 8, 2, 9.0)):
        slots = mk.Capacity(factor).slots(T, K, E)
        found = plan(T, 64, 32, E, K, W, gpus_per_node=2, capacity_factor=factor, dispatch_dtype=F8)
        width, back = row_bytes(64, F8, metadata_bytes("static", K, BF16)), row_bytes(64, BF16)
        rows = E // W * slots + 1
        assert found.static_bytes == {"nic": (W - 2) * rows * (width + back), "nvlink": rows * (width + back)}
        assert found.static_recv == W * rows * width
        counted = exact_traffic([draw(T, E, K, r) for r in range(W)], E, ranks_per_node=2, hidden=64,
                                dispatch_dtype=F8, capacity_factor=factor)["static"]  # fmt: skip
        assert all(counted.bytes_sent(rank) == found.static_bytes for rank in range(W))
        more = plan(T, 64, 32, E, K, W, gpus_per_node=2, capacity_factor=factor + 2, dispatch_dtype=F8)
        assert (more.static_recv == found.static_recv) == (slots == max(T, 1) or T == 0)
    assert plan(8, 64, 32, 9, 2, 4, capacity_factor=1.0).static_bytes is None
    ids = [draw(4, 8, 2, 0), draw(5, 8, 2, 1)]
    with pytest.raises(ValueError, match="exact_traffic: topk_ids must be of one T with a capacity_factor"):
        exact_traffic(ids, 8, ranks_per_node=2, hidden=8, capacity_factor=1.0)
    with pytest.raises(ValueError, match="as many experts on every rank"):
        exact_traffic([ids[0]] * 2, 8, ranks_per_node=2, hidden=8, capacity_factor=1.0,
                      placement=torch.tensor([0] * 3 + [1] * 5))  # fmt: skip
    with pytest.raises(ValueError, match="static_rows: capacity_factor"):
        exact_traffic([ids[0]] * 2, 8, ranks_per_node=2, hidden=8, capacity_factor=0.0)


def test_drops_are_the_binomial_tail() -> None:
    n, p, cap = 40, 0.25, 12
    pmf = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    over, beyond = chances.overflow(n, torch.tensor([p, 0.0, 1.0]), cap)
    assert over.tolist() == pytest.approx([sum(pmf[cap + 1 :]), 0.0, 1.0], rel=1e-12)
    assert beyond.tolist() == pytest.approx([sum((k - cap) * pmf[k] for k in range(cap + 1, n + 1)), 0, n - cap])
    found = plan(n, 8, 8, 8, 2, 4, capacity_factor=1.2)
    assert found.overflow_prob == pytest.approx(sum(pmf[cap + 1 :]))
    assert found.drop_prob == pytest.approx(float(beyond[0]) / (n * p))
    assert plan(n, 8, 8, 8, 2, 4).drop_prob == 0.0
    assert plan(n, 8, 8, 8, 2, 4, capacity_factor=8.0).drop_prob == 0.0
    assert plan(n, 8, 8, 8, 2, 4, capacity_factor=1.2, load=[9, 1, 1, 1, 1, 1, 1, 3]).drop_prob > found.drop_prob


# ---- refusals

GOOD: dict[str, Any] = {"T": 16, "H": 8, "I": 8, "E": 8, "K": 2, "world_size": 4, "gpus_per_node": 2}


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"K": 9}, ValueError, "plan: K must be in 1..E=8, got 9"),
        ({"T": -1}, ValueError, "plan: T must be 0 or more"),
        ({"H": 2.0}, TypeError, "plan: H must be an int, got float 2.0"),
        ({"world_size": 0}, ValueError, "plan: world_size must be 1 or more"),
        ({"dispatch_dtype": torch.int8}, TypeError, "dtype must be a floating torch.dtype"),
        ({"links": 5}, TypeError, "plan: links must be a Links, got int 5"),
        ({"load": [1, 2]}, ValueError, "plan: load must be [E=8] counts or shares, got [2]"),
        ({"load": [1.0, float("nan")] * 4}, ValueError, "plan: load must be finite"),
        ({"load": [0] * 8}, ValueError, "plan: load must be finite, not negative, and not all 0"),
        ({"load": [1, 0, 0, 0, 0, 0, 0, 0]}, ValueError, "at most 1/K=0.5 of the slots"),
        ({"load": [1] * 8, "nodes_per_token": 1}, ValueError, "nodes_per_token must be None where load is given"),
        ({"nodes_per_token": 1, "E": 7}, ValueError, "None unless world_size divides E"),
        ({"nodes_per_token": 1, "K": 5}, ValueError, "enough for K=5 experts, got 1 nodes of 4 experts"),
        ({"capacity_factor": -1.0}, ValueError, "plan: capacity_factor must be a number above 0"),
        ({"capacity_factor": float("nan")}, ValueError, "plan: capacity_factor must be a number above 0"),
        ({"topk_ids": [torch.zeros(16, 2, dtype=torch.int32)] * 3}, ValueError, "of world_size=4 ranks, got 3"),
        ({"topk_ids": [torch.zeros(16, 2)] * 4}, TypeError, "topk_ids[0] must be int32 or int64"),
        ({"topk_ids": [torch.zeros(9, 2, dtype=torch.int32)] * 4}, ValueError, "of the fullest rank T=16"),
        ({"placement": torch.tensor([0, 1, 2, 3, 4, 0, 0, 0])}, ValueError, "placement must be in 0..3 (a rank)"),
        ({"metadata": {"carrier pigeon": 8}}, ValueError, "metadata must be"),
    ],
)  # fmt: skip
def test_refusals(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        plan(**{**GOOD, **bad})
    assert text in str(caught.value)


def test_links_refuse_what_is_no_speed() -> None:
    for bad in ({"nic_gbs": 0.0}, {"nic_us": -1.0}, {"tflops": float("nan")}, {"nvlink_gbs": "fast"}):
        with pytest.raises(ValueError, match=f"Links: {next(iter(bad))} must be a number"):
            Links(**bad)  # type: ignore[arg-type]


def test_it_is_public() -> None:
    assert mk.plan is plan
    assert "two_level" in str(plan(**GOOD))

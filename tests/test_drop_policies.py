# SPDX-License-Identifier: Apache-2.0
"""Who is dropped beyond a capacity: every policy against a walk over the slots, one by one."""

import math

import pytest
import torch

import moe_kernels as mk
from moe_kernels import draws

E, K = 5, 3


def routed(T, seed=0, absent=False):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]).int()
    ids = torch.where(torch.rand(T, K, generator=g) < 0.6, ids, ids % 2)  # some experts are crowded
    for row in ids:  # distinct in a row, but for absent ones
        seen = set()
        for k in range(K):
            if int(row[k]) in seen:
                row[k] = -1
            seen.add(int(row[k]))
    weights = torch.rand(T, K, generator=g).sort(1, descending=True).values
    weights = (weights * 8).round() / 8 if absent else weights  # ties
    weights = torch.where(ids >= 0, weights, 0.0)
    counts = torch.bincount(ids[ids >= 0], minlength=E).int()
    return mk.Routing(weights, ids, counts, None, None)


def walk(routing, order, capacity):
    """dropped [T, K], for slots in this order."""
    taken, dropped = [0] * E, torch.zeros_like(routing.topk_ids, dtype=torch.bool)
    for t, k in order:
        e = int(routing.topk_ids[t, k])
        if e >= 0:
            dropped[t, k] = taken[e] >= capacity
            taken[e] += 1
    return dropped


def expected(policy, routing, tokens, capacity, order=None):
    w = routing.topk_weights
    if policy == "position":
        return walk(routing, [(t, k) for k in range(K) for t in tokens], capacity)
    if policy == "bpr":
        by_weight = sorted(tokens, key=lambda t: -float(w[t, 0]))
        return walk(routing, [(t, k) for k in range(K) for t in by_weight], capacity)
    if policy == "random":
        return walk(routing, [(t, k) for k in range(K) for t in order if t in tokens], capacity)
    if policy == "probs":
        slots = sorted(((t, k) for t in tokens for k in range(K)), key=lambda s: (-float(w[s]), s))
        return walk(routing, slots, capacity)
    taken, kept, mine = (
        [0] * E,
        torch.zeros_like(routing.topk_ids, dtype=torch.bool),
        torch.zeros(len(w), 1, dtype=torch.bool),
    )
    mine[list(tokens)] = True
    for k in range(K):
        for t in tokens:
            e = int(routing.topk_ids[t, k])
            if e >= 0 and not kept[t].any() and taken[e] < capacity:
                kept[t, k] = True
                taken[e] += 1
    return mine & ~kept & (routing.topk_ids >= 0)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("group", ["batch", 7, "sequence"])
@pytest.mark.parametrize("policy", ["position", "bpr", "probs", "random", "ntlb"])
def test_against_a_walk(policy, group, absent):
    T = 20
    routing = routed(T, absent=absent)
    counters = draws.Draws()
    counters.step = torch.tensor(2)
    order = draws.uniform(counters.key(draws.DROP_ORDER), T).argsort().tolist()
    size = {"batch": T, "sequence": 10}.get(group, group)
    rule = mk.Capacity(fixed=2, drop_policy=policy, group=group)
    found = rule.limit(routing, sequence_length=10, counters=counters)
    wanted = torch.zeros(T, K, dtype=torch.bool)
    for start in range(0, T, size):
        wanted |= expected(policy, routing, range(start, min(start + size, T)), 2, order)
    assert torch.equal(found.dropped, wanted) and wanted.any() and not wanted.all()
    assert torch.equal(found.topk_ids, torch.where(wanted, -1, routing.topk_ids))
    assert torch.equal(found.topk_weights, torch.where(wanted, 0.0, routing.topk_weights))  # not renormalised
    kept = found.topk_ids[found.topk_ids >= 0]
    assert torch.equal(found.tokens_per_expert, torch.bincount(kept, minlength=E).int())


def test_no_token_is_left_behind_while_there_is_room():
    routing = routed(20)
    found = mk.Capacity(fixed=20, drop_policy="ntlb").limit(routing)
    assert ((found.topk_ids >= 0).sum(1) == 1).all() and torch.equal(found.topk_ids[:, 0], routing.topk_ids[:, 0])


def test_device_budgets_spare_protected_tokens():
    """DeepSeek-V2: the lowest scores of a device go until its budget holds; protected ones stay even above it."""
    g = torch.Generator().manual_seed(0)
    T, D, experts = 24, 3, 6
    ids = torch.stack([torch.randperm(experts, generator=g)[:2] for _ in range(T)]).int()
    scores = torch.rand(T, 2, generator=g)
    routing = mk.Routing(
        torch.rand(T, 2, generator=g), ids, torch.bincount(ids.flatten(), minlength=6).int(), None, None
    )
    rule = mk.Capacity(0.5, drop_policy="device", devices=D)
    protected = torch.zeros(T, dtype=torch.bool)
    for spared in (0, 3, T):
        protected[:spared] = True
        found = rule.limit(routing, scores=scores, protected=protected)
        budget = math.ceil(0.5 * T * 2 / D)
        for d in range(D):
            here = [(float(scores[t, k]), t, k) for t in range(T) for k in range(2) if ids[t, k] // 2 == d]
            free = sorted((s for s in here if not protected[s[1]]), reverse=True)
            room = max(budget - (len(here) - len(free)), 0)
            assert all(not found.dropped[t, k] for _, t, k in free[:room])
            assert all(found.dropped[t, k] for _, t, k in free[room:])
        assert not found.dropped[protected].any()
    assert rule.limit(routing, training=False) is routing
    moe = mk.MoELayer(4, 3, 6, 2, capacity=rule)
    flags = torch.zeros(2, 8, dtype=torch.bool)
    flags[0] = True
    moe(torch.randn(2, 8, 4), protected=flags)
    assert not moe.last_routing.dropped[:8].any() and moe.last_routing.dropped[8:].any()


def test_a_drop_gives_no_output_and_no_gradient():
    torch.manual_seed(0)
    for policy in ("bpr", "probs", "random", "ntlb"):
        moe = mk.MoELayer(4, 3, E, 2, dtype=torch.float64, capacity=mk.Capacity(0.5, drop_policy=policy))
        draws.set_step(moe, 0)
        torch.nn.init.normal_(moe.router.weight)
        x = torch.randn(16, 4, dtype=torch.float64, requires_grad=True)
        y = moe(x)
        gone = moe.last_routing.dropped.all(1)
        assert gone.any() and not y[gone].any()
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert not grad[gone].any() and grad[~gone].any()
        assert torch.autograd.gradcheck(moe, x)


def test_refusals():
    for options, text in (
        ({"factor": 1.0, "drop_policy": "late"}, "drop_policy must be one of position, bpr"),
        ({"factor": math.inf, "drop_policy": "bpr"}, "factor must be finite for bpr: without a limit nothing drops"),
        ({"factor": 1.0, "devices": 2}, 'devices must be given with drop_policy="device", and only then, got 2'),
        ({"factor": 1.0, "drop_policy": "device"}, 'devices must be given with drop_policy="device"'),
        ({"factor": 1.0, "group": "layer"}, 'group must be "batch", "sequence" or a number of tokens'),
    ):
        with pytest.raises(ValueError, match=text):
            mk.Capacity(**options)
    with pytest.raises(ValueError, match="devices must be a divisor of E=5, got 2"):
        mk.Capacity(1.0, drop_policy="device", devices=2).limit(routed(4))

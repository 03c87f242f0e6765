# SPDX-License-Identifier: Apache-2.0
"""Single routers against what defines them: balanced assignment, two levels, hashes, identity experts."""

import itertools
import math

import pytest
import torch
from test_router_kinds import TABLE, E, H, V, inputs, layer
from torch import nn

import moe_kernels as mk
from moe_kernels import reference, routers
from moe_kernels.routers import assignment

# ---- BASE and Sinkhorn


def best_of_all(scores):
    """The balanced assignment of highest score, by trying every one."""
    T, E = scores.shape
    seats = [e for e in range(E) for _ in range(T // E + (e < T % E))]
    return max(sum(float(scores[t, e]) for t, e in enumerate(p)) for p in set(itertools.permutations(seats)))


@pytest.mark.parametrize(("T", "E"), [(1, 1), (1, 3), (6, 3), (7, 3), (5, 4), (8, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_assignment_is_the_best_there_is(T, E, ties):
    for seed in range(4):
        torch.manual_seed(seed)
        scores = torch.randint(-1, 2, (T, E)).double() if ties else torch.randn(T, E, dtype=torch.float64)
        found = assignment.balanced_assignment(scores)
        assert torch.bincount(found, minlength=E).tolist() == [T // E + (e < T % E) for e in range(E)]
        assert float(scores.gather(1, found[:, None]).sum()) == pytest.approx(best_of_all(scores), abs=1e-9)


def test_a_large_assignment_is_optimal_by_its_prices():
    """Duality: prices a chain of experts leaves prove that no exchange helps."""
    torch.manual_seed(0)
    T, E = 512, 16
    scores = torch.randn(T, E) + 2 * torch.randn(E)
    found = assignment.balanced_assignment(scores)
    assert torch.bincount(found, minlength=E).tolist() == [T // E] * E
    gain = torch.full((E, E), -math.inf)  # of the best single move from e to f
    for e in range(E):
        mine = scores[found == e]
        gain[e] = (mine - mine[:, e, None]).max(0).values
    reach = gain.clone().fill_diagonal_(0)
    for _ in range(4):  # longest chains of moves, up to 16 long
        reach = (reach[:, :, None] + reach[None]).max(1).values
    assert reach.diagonal().max() <= 1e-5  # no circle of moves gains
    with pytest.raises(ValueError, match="scores must be finite, got NaN or infinity"):
        assignment.balanced_assignment(torch.tensor([[math.nan, 0.0]]))


def test_base_is_greedy_in_evaluation_and_takes_one_expert():
    moe, (x, _) = layer("base").eval(), inputs()
    moe(x)
    logits = x.flatten(0, 1) @ moe.router.weight.T
    assert torch.equal(moe.last_routing.topk_ids[:, 0].long(), logits.argmax(1))
    with pytest.raises(ValueError, match="Base: top_k must be 1"):
        mk.MoELayer(H, 4, E, 2, router=routers.Base())
    with pytest.raises(ValueError, match=r"dropout.expert must be 0: Base"):
        mk.MoELayer(H, 4, E, 1, router=routers.Base(), dropout=mk.Dropout(expert=0.1))


def test_sinkhorn_balances_and_half_precision_does_not_overflow():
    torch.manual_seed(0)
    logits = 3 * torch.randn(200, E, dtype=torch.float64) + torch.arange(E)
    plan, iterations = assignment.sinkhorn(logits, 1e-9)
    assert torch.allclose(plan.sum(0), torch.full((E,), 1 / E, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(plan.sum(1), torch.full((200,), 1 / 200, dtype=torch.float64), atol=1e-6)
    assert 1 < iterations <= 1000
    assert assignment.sinkhorn(logits, 1e-9, 3)[1] == 3
    wide = (100 * torch.randn(20, E)).bfloat16()
    assert assignment.sinkhorn(wide)[0].isfinite().all()


# ---- two levels


def test_two_levels_weigh_by_products_and_their_logits_by_the_joint_probability():
    moe, (x, _) = layer("two_level"), inputs()
    gate, rows = moe.router, x.flatten(0, 1)
    logits, routing = gate(rows)
    outer, inner = rows @ gate.group_weight.T, (rows @ gate.weight.T).reshape(-1, 4, 2)
    assert torch.allclose(logits.softmax(1), (outer.softmax(1)[..., None] * inner.softmax(2)).flatten(1))
    g, best = outer.topk(2).values.softmax(1), outer.topk(2).indices
    assert torch.equal(routing.topk_ids.long() // 2, best.repeat_interleave(2, 1))
    wanted = (
        g[:, :, None] * inner.gather(1, best[..., None].expand(-1, -1, 2)).softmax(2).sort(2, descending=True).values
    )
    assert torch.allclose(routing.topk_weights, wanted.flatten(1))
    for options, text in (
        ({"groups": 3, "top_groups": 1}, "groups must be a divisor of E=8, got 3"),
        ({"groups": 4, "top_groups": 3}, "top_k must be a multiple of top_groups=3, at most 2"),
    ):
        with pytest.raises(ValueError, match=text):
            routers.TwoLevel(**options).gate(H, E, 4)


# ---- hashes


def test_hashes_refuse_what_they_cannot_hash():
    moe = layer("hash")
    x, more = inputs()
    with pytest.raises(TypeError, match="Hash: token_ids must be given"):
        moe(x)
    with pytest.raises(ValueError, match=r"token_ids must be in 0..31 \(a token id of the table\)"):
        moe(x, token_ids=more["token_ids"] + V)
    with pytest.raises(ValueError, match="Hash: top_k must be 1: one expert a token, got 2"):
        mk.MoELayer(H, 4, E, 2, router=routers.Hash(V))
    with pytest.raises(ValueError, match="losses must be without Switch: Hash has no gate to train"):
        mk.MoELayer(H, 4, E, 1, router=routers.Hash(V), losses="switch")
    with pytest.raises(ValueError, match=r"experts must be in 0..7"):
        mk.MoELayer(H, 4, E, 1, router=routers.TableHash(torch.full((V,), E)))
    with pytest.raises(ValueError, match="num_experts must be a multiple of top_k=3"):
        mk.MoELayer(H, 4, E, 3, router=routers.MultiHash(torch.zeros(V, 3, dtype=torch.int64)))


def test_positions_can_be_given():
    moe, (x, _) = layer("modular"), inputs()
    moe(x)
    counted = moe.last_routing.topk_ids
    moe(x[:, 4:], position_ids=torch.arange(4, 9).expand(2, 5))
    assert torch.equal(moe.last_routing.topk_ids.reshape(2, 5), counted.reshape(2, 9)[:, 4:])


def test_multi_hash_is_one_expert_of_concatenated_parts():
    """E experts of width N * I cut into N parts, the nth part by the nth hash, as Roller et al. write it."""
    N, whole, I = 2, E // 2, 5
    moe, (x, more) = layer("multi_hash"), inputs()
    y = moe(x, **more)
    w13 = moe.experts.w13.reshape(N, whole, 2, I, H).permute(1, 2, 0, 3, 4).reshape(whole, 2 * N * I, H)
    w2 = moe.experts.w2.reshape(N, whole, H, I).permute(1, 2, 0, 3).reshape(whole, H, N * I)
    tables = TABLE // 2
    for b, s in itertools.product(range(2), range(9)):
        hidden = []
        for n in range(N):
            e = tables[more["token_ids"][b, s], n]
            h = reference.activate(x[b, s] @ w13[e].T)
            hidden.append((h[n * I : (n + 1) * I], w2[e][:, n * I : (n + 1) * I]))
        assert torch.allclose(y[b, s], sum(h @ w.T for h, w in hidden), atol=1e-12)


def test_another_seed_is_another_hash():
    tables = [routers.Hash(1000, seed=seed).gate(H, E, 1).table for seed in (0, 1)]
    assert not torch.equal(*tables)
    counts = torch.bincount(tables[0].flatten(), minlength=E)
    assert counts.sum() == 1000 and counts.min() > 80  # 125 in the mean, deviation 10.5


# ---- identity experts


def test_identity_experts_return_their_input():
    torch.manual_seed(0)
    moe = mk.MoELayer(H, 5, E, 3, num_identity_experts=4, dtype=torch.float64)
    nn.init.normal_(moe.router.weight)
    x = torch.randn(20, H, dtype=torch.float64, requires_grad=True)
    y, r = moe(x), moe.last_routing
    assert moe.router.weight.shape == (12, H) and moe.experts.w13.shape[0] == E
    assert (r.topk_ids >= E).any() and r.tokens_per_expert.shape == (12,)
    routed = reference.fused_experts(x, moe.experts.w13, moe.experts.w2, r.topk_weights,
                                     torch.where(r.topk_ids < E, r.topk_ids, -1))  # fmt: skip
    assert torch.allclose(y, routed + torch.where(r.topk_ids >= E, r.topk_weights, 0.0).sum(1, keepdim=True) * x)
    assert torch.autograd.gradcheck(moe, x)
    mk.MoELayer(H, 5, 2, 4, num_identity_experts=2)(torch.zeros(3, H))
    with pytest.raises(ValueError, match=r"top_k must be in 1..choices=4, got 5"):
        mk.MoELayer(H, 5, 2, 5, num_identity_experts=2)

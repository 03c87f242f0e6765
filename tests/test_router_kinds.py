# SPDX-License-Identifier: Apache-2.0
"""Every router beside the forms of `route`: against a definition written out, with gradients, padding and refusals."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels import draws, reference, routers
from moe_kernels.routers import expert_choice

V, E, H = 32, 8, 6
TABLE = torch.arange(2 * V).reshape(V, 2) * 5 % E
KINDS = {  # name -> (settings, top_k)
    "token_choice": (routers.Router(), 2),
    "switch": (routers.Router(renormalize=False, input_jitter=0.1), 1),
    "normal_noise": (routers.Router(logit_noise_std=0.5), 2),
    "gumbel": (routers.Router(gumbel_noise=1.0), 2),
    "gshard": (routers.Router(renormalize_eps=1e-9, second_threshold=0.5), 2),
    "node_limited": (routers.Router(scoring_func="sigmoid", num_expert_group=4, topk_group=2, correction_bias=True), 3),
    "device_limited": (routers.Router(renormalize=False, num_expert_group=4, topk_group=2), 3),
    "sqrtsoftplus": (routers.Router(scoring_func="sqrtsoftplus", correction_bias=True, routed_scaling_factor=1.5), 2),
    "softcap": (routers.Router(bias=True, logit_softcap=3.0), 2),
    "weight_on_input": (routers.Router(scoring_func="sigmoid", renormalize=False, weight_on_input=True), 1),
    "learned_table": (routers.Router(scoring_func="sqrtsoftplus", token_table=TABLE), 2),
    "noisy": (routers.NoisyTopK(), 2),
    "expert_choice": (routers.ExpertChoice(), 2),
    "expert_choice_capped": (routers.ExpertChoice(max_experts=3, entropy=0.05), 2),
    "expert_choice_sequence": (routers.ExpertChoice(group="sequence"), 2),
    "base": (routers.Base(), 1),
    "sinkhorn_1": (routers.Sinkhorn(), 1),
    "sinkhorn_2": (routers.Sinkhorn(), 2),
    "two_level": (routers.TwoLevel(groups=4, top_groups=2), 4),
    "hash": (routers.Hash(V, seed=7), 1),
    "modular": (routers.Modular(), 1),
    "random": (routers.RandomHash(), 1),
    "balanced": (routers.BalancedHash(torch.arange(V)), 1),
    "table": (routers.TableHash(TABLE), 2),
    "multi_hash": (routers.MultiHash(TABLE // 2), 2),
}


def layer(name, dtype=torch.float64, **options):
    router, top_k = KINDS[name]
    torch.manual_seed(1)
    made = mk.MoELayer(H, 5, E, top_k, router=router, dtype=dtype, **options)
    with torch.no_grad():
        for p in made.parameters():
            nn.init.normal_(p, std=0.7)
    draws.set_step(made, 3, seed=11)
    return made


def inputs(B=2, S=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, S, H, generator=g, dtype=torch.float64).to(dtype)
    return x, {"token_ids": torch.randint(0, V, (B, S), generator=g)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_layer_is_the_sum_over_its_routing(name, training):
    """y is made of last_routing and the experts alone; counts, order and precision are those of every Routing."""
    moe = layer(name).train(training)
    x, more = inputs()
    y, r = moe(x, **more), moe.last_routing
    wanted = reference.fused_experts(
        x.flatten(0, 1), moe.experts.w13, moe.experts.w2, r.topk_weights, r.topk_ids,
        apply_router_weight_on_input=name == "weight_on_input",
    )  # fmt: skip
    assert torch.allclose(y.flatten(0, 1), wanted, atol=1e-12)
    assert r.topk_weights.dtype == torch.float64 and r.topk_ids.dtype == r.tokens_per_expert.dtype == torch.int32
    assert torch.equal(r.tokens_per_expert, torch.bincount(r.topk_ids[r.topk_ids >= 0], minlength=E).int())
    rows = [row[row >= 0].tolist() for row in r.topk_ids]
    assert all(len(set(row)) == len(row) for row in rows) or name == "table"


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_finite_differences(name):
    """gradcheck through x, router and experts, where there is a router to train; the draws are fixed by the step."""
    moe = layer(name)
    x, more = inputs(S=5)
    leaves = [x.requires_grad_(), *(p for p in moe.parameters())]
    names = [n for n, _ in moe.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(moe, dict(zip(names, values)), (x,), more)

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-6, fast_mode=True)
    few = {"token_ids": more["token_ids"][:1, :2]}
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):  # the twin: a wrong gradient is noticed
        torch.autograd.gradcheck(lambda x: moe(x + 0.1 * x.detach(), **few), x[:1, :2].detach().requires_grad_())


@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing_for_the_others(name):
    """Masked tokens are not routed; where tokens do not compete, the others get what they get alone."""
    moe = layer(name).eval()
    x, more = inputs()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    y = moe(x, padding_mask=mask, **more)
    assert not y[:, 6:].any() and (moe.last_routing.topk_ids.reshape(2, 9, -1)[:, 6:] == -1).all()
    moved = torch.where(mask[..., None], x, 1e3)
    assert torch.equal(moe(moved, padding_mask=mask, **more), y)
    if not name.startswith(("expert_choice", "random", "modular")):
        alone = moe(x[:, :6], token_ids=more["token_ids"][:, :6])
        assert torch.allclose(alone, y[:, :6], atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_no_tokens(name):
    moe = layer(name)
    x = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    options = {"token_ids": torch.zeros(0, dtype=torch.int64)}
    if name == "expert_choice_sequence":
        x = torch.zeros(0, 4, H, dtype=torch.float64, requires_grad=True)
        options = {"token_ids": torch.zeros(0, 4, dtype=torch.int64)}
    y = moe(x, **options)
    y.sum().backward()
    assert y.shape == x.shape and not moe.last_routing.tokens_per_expert.any()


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_saved_layers_route_alike(name):
    moe, (x, more) = layer(name, torch.float32), inputs(dtype=torch.float32)
    y = moe(x, **more)
    assert torch.equal(copy.deepcopy(moe)(x, **more), y)
    assert torch.equal(pickle.loads(pickle.dumps(moe))(x, **more), y)
    other = layer(name, torch.float32)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x, **more), y)
    assert repr(KINDS[name][0]) in repr(moe)


@pytest.mark.parametrize("name", ["switch", "normal_noise", "gumbel", "gshard", "noisy", "random"])
def test_draws_follow_the_step_alone(name):
    """The same for any number of threads, float32 or 64; another in every step; none in evaluation."""
    moe, (x, more) = layer(name), inputs()
    first = moe(x, **more)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(moe(x, **more), first)
    finally:
        torch.set_num_threads(threads)
    draws.set_step(moe, 4, seed=11)
    assert not torch.equal(moe(x, **more), first)
    draws.set_step(moe, 3, seed=12)
    assert torch.equal(moe(x, **more), first) == (name == "random")  # its seed is its own
    if name != "random":
        moe.eval()
        quiet = moe(x, **more)
        draws.set_step(moe, 5)
        assert torch.equal(moe(x, **more), quiet)


def test_without_a_step_torch_seeds_the_draws_and_checkpointing_repeats_them():
    moe, (x, _) = layer("normal_noise"), inputs()
    moe.router.draws.step = None
    torch.manual_seed(5)
    first = moe(x)
    assert not torch.equal(moe(x), first)
    torch.manual_seed(5)
    assert torch.equal(moe(x), first)
    torch.manual_seed(5)
    again = torch.utils.checkpoint.checkpoint(moe, x.requires_grad_(), use_reentrant=False)
    again.sum().backward()
    kept = x.grad.clone()
    x.grad = None
    torch.manual_seed(5)
    moe(x).sum().backward()
    assert torch.allclose(kept, x.grad, atol=1e-12)


def test_layers_draw_apart_and_gumbel_follows_the_probability():
    two = nn.ModuleList([layer("gumbel"), layer("gumbel")])
    assert draws.set_step(two, 1) == 2
    x, _ = inputs()
    assert not torch.equal(two[0](x), two[1](x))
    gate = routers.Router(gumbel_noise=1.0).gate(3, 3, 1)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(3))
    p = torch.tensor([0.6, 0.3, 0.1])
    found = gate(p.log().expand(20000, 3))[1].tokens_per_expert / 20000
    assert (found - p).abs().max() < 4 * math.sqrt(0.25 / 20000)  # four standard deviations


def test_normal_draws_are_normal():
    z = draws.normal(torch.tensor(123), 100, 1000, dtype=torch.float64).flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n) and abs(z.var() - 1) < 4 * math.sqrt(2 / n) and z.abs().max() < 5.5


# ---- GShard's second expert


def test_the_second_expert_is_taken_by_its_weight():
    w = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    routing = mk.Routing(
        w, torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.tensor([3, 3], dtype=torch.int32), None, None
    )
    found = routers.sample_second(routing, torch.tensor([0.1, 0.9, 0.99]))
    assert found.topk_ids.tolist() == [[0, 1], [0, -1], [0, 1]] and found.tokens_per_expert.tolist() == [3, 2]
    assert found.topk_weights[1].tolist() == pytest.approx([0.6, 0.0])  # not renormalised
    with pytest.raises(ValueError, match="top_k must be 2 with a second_threshold, got 1"):
        routers.Router(second_threshold=0.5).gate(H, E, 1)


# ---- expert choice


def test_experts_take_their_best_tokens_ties_to_the_lowest():
    s = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]])
    assert expert_choice.take(s, 2)[0].T.tolist() == [[True, True, False, False], [True, False, True, False]]


@pytest.mark.parametrize(("T", "factor", "C"), [(30, 2.0, 7), (5, 0.1, 1), (6, 100.0, 6)])
def test_the_tokens_of_an_expert(T, factor, C):
    gate = routers.ExpertChoice(capacity_factor=factor).gate(H, E, 2)
    assert gate(torch.randn(T, H))[1].tokens_per_expert.tolist() == [C] * E


def test_a_sequence_competes_alone():
    moe, (x, more) = layer("expert_choice_sequence"), inputs()
    both = moe(x, **more)
    assert torch.allclose(both[0], moe(x[:1], **{k: v[:1] for k, v in more.items()})[0], atol=1e-12)


def test_the_capped_plan_keeps_its_sums_and_beats_others():
    """KKT of the entropy-regularised plan: columns and rows as asked, and no feasible neighbour is better."""
    torch.manual_seed(0)
    n, count, cap, lam = 12, 4, 3, 0.05
    s = torch.randn(n, E, dtype=torch.float64).softmax(1)
    plan = expert_choice.capped_plan(s[None], count, cap, lam, 3000)[0]
    assert torch.allclose(plan.sum(0), torch.full((E,), 4.0, dtype=torch.float64), atol=1e-6)
    assert plan.sum(1).max() <= cap + 1e-6 and plan.min() >= 0 and plan.max() <= 1 + 1e-6

    def value(a):
        return float((s * a).sum() - lam * torch.special.xlogy(a, a).sum())

    best = value(plan)
    for _ in range(200):  # move mass around a square of two tokens and two experts: all sums stay
        (t, u), (e, f) = torch.randperm(n)[:2].tolist(), torch.randperm(E)[:2].tolist()
        step = torch.zeros_like(plan)
        step[t, e], step[u, f], step[t, f], step[u, e] = 1e-3, 1e-3, -1e-3, -1e-3
        moved = plan + step
        if moved.min() >= 0 and moved.max() <= 1:
            assert value(moved) <= best + 1e-9
    gate = layer("expert_choice_capped").router
    assert gate(torch.randn(40, H, dtype=torch.float64))[1].topk_ids.shape == (40, 3)


def test_expert_choice_refuses():
    moe = layer("expert_choice").eval()
    with pytest.raises(ValueError, match="ExpertChoice: the sequence must be longer than 1 .* allow_noncausal=True"):
        moe(torch.zeros(4, 1, H, dtype=torch.float64))
    mk.MoELayer(H, 4, E, 2, router=routers.ExpertChoice(allow_noncausal=True)).eval()(torch.zeros(4, 1, H))
    with pytest.raises(ValueError, match=r"capacity_factor must be at most max_experts.*, got 2"):
        mk.MoELayer(H, 4, E, 2, router=routers.ExpertChoice(max_experts=1))
    with pytest.raises(ValueError, match="capacity must be None: ExpertChoice itself fixes"):
        mk.MoELayer(H, 4, E, 2, router=routers.ExpertChoice(), capacity=1.0)
    with pytest.raises(ValueError, match="losses must be without Switch: ExpertChoice balances its experts itself"):
        mk.MoELayer(H, 4, E, 2, router=routers.ExpertChoice(), losses="switch")
    mk.MoELayer(H, 4, E, 2, router=routers.ExpertChoice(), losses="z_loss")
    with pytest.raises(ValueError, match="T must be a multiple of group=4, got 6"):
        mk.MoELayer(H, 4, E, 2, router=routers.ExpertChoice(group=4))(torch.zeros(6, H))
    with pytest.raises(ValueError, match='at least 3-D with group="sequence", got 2-D'):
        layer("expert_choice_sequence")(torch.zeros(6, H, dtype=torch.float64))


# ---- under torch.compile


@pytest.mark.parametrize(
    "name", ["gumbel", "gshard", "noisy", "expert_choice", "two_level", "hash", "random", "modular"]
)
def test_compiled_in_one_graph(name):
    """Values and gradients are those without it; the step is an input of the graph, not a constant in it."""
    torch._dynamo.reset()  # the limit of recompilations counts those of other tests
    moe = layer(name)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x, more = inputs()
    for step in (3, 4):
        draws.set_step(moe, step, seed=11)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = compiled(a, **more), moe(b, **more)
        assert torch.allclose(y, wanted, atol=1e-12)
        y.sum().backward()
        wanted.sum().backward()
        assert torch.allclose(a.grad, b.grad, atol=1e-12)

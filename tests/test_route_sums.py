# SPDX-License-Identifier: Apache-2.0
"""route_with_sums: the routing of `route`, the sums of `sum_scores`, and one gradient of all that is exact for each."""

import pytest
import torch
from test_route import logits_of, magnitudes
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
from moe_kernels import losses, reference
from moe_kernels.schemas import SCORING, SCORING_CODE, acc_dtype
from moe_kernels.testing import SAFETY, UNIT, check, rounding

SHAPES = [(0, 8, 2, 1), (1, 1, 1, 1), (6, 3, 3, 3), (34, 8, 2, 2), (20, 60, 30, 20), (150, 37, 5, 2), (9, 512, 4, 1)]
RULES = {
    "plain": {},
    "unnormalised": {"renormalize": False, "routed_scaling_factor": 2.5},
    "softcap": {"logit_softcap": 3.0},
    "groups_bias": {"num_expert_group": 4, "topk_group": 2, "bias": True},
    "masked": {"mask": True},
}
CASES = [(torch.float64, "plain"), (torch.float64, "softcap"), (torch.bfloat16, "plain"), (torch.float16, "masked")]
CASES += [(torch.float32, rule) for rule in RULES]


def call_of(rule, scoring, T, E, K):
    options = dict(RULES[rule], scoring_func=scoring)
    G, M = options.get("num_expert_group", 1), options.get("topk_group", 1)
    if E % G or M * E // G < K:
        return None
    bias = torch.linspace(0.2, -0.2, E)[torch.randperm(E)] if options.pop("bias", False) else None
    mask = torch.arange(T) % 3 != 1 if options.pop("mask", False) else None
    return options | {"e_score_correction_bias": bias, "padding_mask": mask}


def sums_magnitude(logits, call, normalize, grad_sums):
    """The sum of the terms of d logits that come from d score_sums, without sign, in float64."""
    l, s = reference.scores(logits.double(), call["scoring_func"], call.get("logit_softcap", 0.0))
    softmax = call["scoring_func"] == "softmax"
    total = s.sum(-1, keepdim=True) if normalize and not softmax else torch.ones_like(s[:, :1])
    grad = grad_sums.double().abs().repeat_interleave(len(s) // len(grad_sums), 0)
    shared = (grad * s).sum(-1, keepdim=True) / total if normalize or softmax else 0.0
    slope = {"softmax": s, "sigmoid": s, "sqrtsoftplus": l.sigmoid() / (2 * s)}[call["scoring_func"]]
    return slope * (grad + shared) / total


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize(("dtype", "rule"), CASES, ids=str)
def test_route_with_sums(backend, dtype, rule, scoring, normalize):
    for T, E, K, B in SHAPES:
        call = call_of(rule, scoring, T, E, K)
        if call is None:
            continue
        logits = logits_of(T, E, dtype).requires_grad_()
        got, sums = backend.route_with_sums(logits, K, B, normalize=normalize, **call)
        alone = backend.route(logits, K, **call)
        for mine, its in zip(got[:3], alone[:3]):
            assert torch.equal(mine, its)
        assert (got.lse is None and alone.lse is None) or torch.equal(got.lse, alone.lse)
        mask = call["padding_mask"]
        rule_of_sums = (SCORING_CODE[scoring], normalize, call.get("logit_softcap", 0.0), B, mask)
        assert sums.dtype == acc_dtype(dtype)
        assert torch.equal(sums, backend.sum_scores(logits, *rule_of_sums))

        truth_in = logits.detach().double().requires_grad_()
        truth, true_sums = reference.route_with_sums(truth_in, K, B, normalize=normalize, **call)
        if not torch.equal(got.topk_ids, truth.topk_ids):  # with a bias two scores may come arbitrarily close
            assert call["e_score_correction_bias"] is not None and dtype != torch.float64
            continue
        grad_w, grad_lse = torch.randn(T, K, dtype=torch.float64), torch.randn(T, dtype=torch.float64)
        grad_sums = torch.randn(B, E, dtype=torch.float64)
        relative, size = magnitudes(logits.detach(), call, scoring, truth.topk_ids, grad_w, grad_lse)
        size = size + sums_magnitude(logits.detach(), call, normalize, grad_sums)
        acc = acc_dtype(dtype)
        outputs, cotangents = [got.topk_weights, sums], [grad_w.to(acc), grad_sums.to(acc)]
        truths = [truth.topk_weights, true_sums]
        if got.lse is not None:
            outputs, cotangents = [*outputs, got.lse], [*cotangents, grad_lse.to(acc)]
            truths = [*truths, truth.lse]
        (grad,) = torch.autograd.grad(outputs, logits, cotangents)
        (wanted,) = torch.autograd.grad(truths, truth_in, [c.double() for c in cotangents])
        bound = relative * size + 2 * rounding(wanted, dtype)
        if backend.name == "reference":  # its two parts are rounded each before they are added
            bound = bound + 2 * rounding(size, dtype)
        check(grad, wanted, bound, "grad_logits")
        if mask is not None:
            assert not grad[~mask].any()


@pytest.mark.parametrize("scoring", SCORING)
def test_each_output_has_its_own_gradient(backend, scoring):
    """d logits of the sums alone is that of sum_scores, that of the weights alone that of route."""
    logits = torch.randn(24, 37, dtype=torch.float64).requires_grad_()
    got, sums = backend.route_with_sums(logits, 4, 2, scoring_func=scoring)
    pull, pull_sums = torch.randn_like(got.topk_weights), torch.randn_like(sums)
    alone = backend.route(logits, 4, scoring_func=scoring)
    (of_weights,) = torch.autograd.grad(alone.topk_weights, logits, pull)
    (mine,) = torch.autograd.grad(got.topk_weights, logits, pull, retain_graph=True)
    assert torch.equal(mine, of_weights)
    summed = backend.sum_scores(logits, SCORING_CODE[scoring], True, 0.0, 2, None)
    (of_sums,) = torch.autograd.grad(summed, logits, pull_sums)
    (mine,) = torch.autograd.grad(sums, logits, pull_sums, retain_graph=True)
    call = {"scoring_func": scoring}
    relative, size = magnitudes(logits.detach(), call, scoring, got.topk_ids, pull, torch.zeros(24))
    of_sums_size = sums_magnitude(logits.detach(), call, True, pull_sums)
    check(mine, of_sums, 2 * relative * of_sums_size, "the sums alone")  # either side is off by one of these
    (both,) = torch.autograd.grad((got.topk_weights, sums), logits, (pull, pull_sums))
    check(both, of_weights + of_sums, 2 * relative * (size + of_sums_size), "both")


@pytest.mark.parametrize("scoring", SCORING)
def test_rows_without_a_finite_logit(backend, scoring):
    logits = torch.tensor([[-torch.inf, -torch.inf], [torch.nan, 1.0], [torch.inf, 0.0]], requires_grad=True)
    _, sums = backend.route_with_sums(logits, 1, 3, scoring_func=scoring)
    want = reference.sum_scores(logits.detach().double(), scoring_func=scoring, groups=3)
    check(sums, want, 8 * UNIT[torch.float32] * want, "sums")  # an exp or two, a sum of two, a root, a division
    (grad,) = torch.autograd.grad(sums.sum() + sums[:, 0].sum(), logits)
    assert grad.isfinite().all() and not grad[0].any()
    assert grad[1, 0] == 0 and grad[2, 0] == 0


def test_the_same_for_any_number_of_threads():
    logits, pull = torch.randn(1000, 64, requires_grad=True), torch.randn(4, 64)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            routing, sums = mk.route_with_sums(logits, 4, 4)
            (grad,) = torch.autograd.grad((sums, routing.topk_weights.square().sum()), logits, (pull, torch.ones(())))
            found.append((*routing[:4], sums, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_errors():
    for groups, text in ((0, "groups must be 1 or more, got 0"), (4, "groups must be a divisor of T=6, got 4")):
        with pytest.raises(ValueError, match="route_with_sums: " + text):
            mk.route_with_sums(torch.randn(6, 3), 2, groups)
    with pytest.raises(TypeError, match="groups must be an int, got float 1.5"):
        mk.route_with_sums(torch.randn(6, 3), 2, 1.5)
    with pytest.raises(ValueError, match=r"route: top_k must be in 1..E=3, got 4"):
        mk.route_with_sums(torch.randn(6, 3), 4)
    with pytest.raises(RuntimeError, match="route: T=5 must be a multiple of groups=2"):
        torch.ops.moe_kernels.route(torch.randn(5, 3), 2, 0, True, 0.0, 1.0, 0.0, 1, 1, 1, None, None, 2, True)


# ---- what a layer with losses costs


T, H, E, K = 256, 16, 64, 4
ALL = ("switch", "z_loss", "gshard", "deepseek_v2_expert", losses.DeepSeekV3(count="selected"))


class Ops(TorchDispatchMode):
    """The names of the ops, and of those that return [T, E] numbers in memory of their own."""

    def __init__(self):
        super().__init__()
        self.names, self.wide = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func).removesuffix(".default"))
        if (
            isinstance(out, torch.Tensor)
            and out.shape == (T, E)
            and out.is_floating_point()
            and "view" not in str(func)
        ):
            self.wide.append(self.names[-1])
        return out


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_layer_with_losses_reads_the_logits_once_and_writes_their_gradient_once(scoring):
    names = [name for name in ALL if scoring == "softmax" or name in ("switch", "gshard", ALL[-1])]
    layer = mk.MoELayer(H, 8, E, K, router=mk.Router(scoring_func=scoring), losses=names)
    x = torch.randn(2, T // 2, H)
    with Ops() as forward:
        y = layer(x)
    ours = [name for name in forward.names if name.startswith("moe_kernels.")]
    assert ours == ["moe_kernels.route", "moe_kernels.fused_experts"]
    assert [name for name in forward.wide if not name.startswith("aten.detach")] == ["aten.mm"]  # the logits
    with Ops() as backward:
        (y.square().sum() + layer.aux_loss).backward()
    assert backward.names.count("moe_kernels.route_backward") == 1
    assert backward.wide == ["moe_kernels.route_backward"]  # no sum of gradients of the logits


@pytest.mark.parametrize("router", [mk.Router(), mk.Router(scoring_func="sigmoid", correction_bias=True)], ids=repr)
def test_the_losses_are_those_of_sum_scores(router):
    """The sums of route, asked for sequences, serve every scope; without them the losses read the logits themselves."""
    several = [losses.Switch(), losses.Switch(scope="sequence"), losses.GShard(), losses.DeepSeekV2Expert(),
               losses.DeepSeekV3(count="selected")]  # fmt: skip
    logits = torch.randn(24, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.linspace(-0.3, 0.3, 8) if router.correction_bias else None
    call = router.options() | {"e_score_correction_bias": bias}
    assert losses.sums_wanted(several) == ("sequence", True)
    routing, sums = mk.route_with_sums(logits, 3, 4, normalize=True, **call)
    for loss in several:
        fused = loss(losses.LossInputs(logits, routing, router, 6, score_sums=sums))
        apart = loss(losses.LossInputs(logits, mk.route(logits, 3, **call), router, 6))
        relative = SAFETY * UNIT[torch.float64] * (8 + 24 + 8 + 2 * float(logits.detach().abs().max()))
        check(fused, apart, 2 * relative * apart.detach(), "loss")  # sums over 24 tokens and 8 experts, all positive
        mine, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (fused, apart))
        (pull,) = torch.autograd.grad(fused, sums, retain_graph=True, allow_unused=True)
        if pull is None:  # the loss wants other sums and reads the logits again: the same arithmetic
            assert torch.equal(mine, wanted)
        else:
            size = sums_magnitude(logits.detach(), call | {"scoring_func": router.scoring_func}, True, pull)
            check(mine, wanted, 2 * relative * size, "grad_logits")


def test_which_sums_the_losses_want():
    wanted = losses.sums_wanted
    assert wanted([losses.ZLoss(), losses.Importance(), lambda inputs: inputs.logits.sum()]) is None
    assert wanted([losses.Switch(scope="global_batch"), losses.ZLoss()]) == ("micro_batch", True)
    assert wanted([losses.Switch(), losses.DeepSeekV2Device()]) == ("sequence", True)
    assert wanted([losses.DeepSeekV2Comm()]) == ("sequence", False)


def test_losses_keep_no_more_than_the_choice():
    """Beside the logits, which the router has anyway, forward keeps O(T*K) and O(E) numbers for the backward."""
    logits = torch.randn(T, E, requires_grad=True)
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        routing, sums = mk.route_with_sums(logits, K)
        inputs = losses.LossInputs(logits, routing, score_sums=sums)
        whole = routing.topk_weights.square().sum() + losses.Switch()(inputs) + losses.ZLoss()(inputs)
    assert whole.requires_grad
    assert 0 < sum(kept.values()) <= 4 * (2 * T * K + 4 * T + 8 * E)  # weights and ids; of lse its squares; f and P
    assert 2 * sum(kept.values()) < 4 * T * E  # one more [T, E] would not pass

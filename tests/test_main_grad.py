# SPDX-License-Identifier: Apache-2.0
"""Main gradients: a backward that adds the gradients of weights, in float32, to a buffer of the caller's.

Against float64, over two steps whose sums bfloat16 could not hold, on the reference, the kernels here and the emulator.
"""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import simt_ops
import torch

import moe_kernels as mk
from moe_kernels import autograd, fallback, ops, reference
from moe_kernels.schemas import SCHEMAS, acc_dtype
from moe_kernels.testing import SAFETY, UNIT, check, expert_layer, make_case

NAMES = ("grouped_gemm", "grouped_gemm_backward", "fused_experts", "fused_experts_backward")
OPTIONS = {
    "plain": {}, "transposed": {"transposed": True, "bias": True},
    "interleaved": {"interleaved": True, "bias": True, "absent": True, "skew": "empty"},
    "ungated": {"gated": False, "weight_on_input": True},
}  # fmt: skip
LIBRARY = torch.library.Library("moe_kernels_plain", "DEF")  # the ops as they are where no kernel is compiled
for name in NAMES:
    LIBRARY.define(name + SCHEMAS[name])
    LIBRARY.impl(name, getattr(fallback, name), "CompositeExplicitAutograd")
autograd.install("moe_kernels_plain", ("grouped_gemm", "fused_experts"))


@contextmanager
def without_kernels():
    plain = torch.ops.moe_kernels_plain
    with (
        mock.patch.object(ops, "_GROUPED_GEMM", plain.grouped_gemm.default),
        mock.patch.object(ops, "_FUSED_EXPERTS", plain.fused_experts.default),
    ):
        yield


@contextmanager
def spec():
    with (
        mock.patch.object(mk, "grouped_gemm", reference.grouped_gemm),
        mock.patch.object(mk, "fused_experts", reference.fused_experts),
    ):
        yield


@pytest.fixture(params=["reference", "fallback", "cpu", "simt"])
def on(request):
    """A context in which the public ops are this backend's, and what its bounds are."""
    if request.param == "simt" and (reason := simt_ops.missing()):
        pytest.skip(reason)
    simt_ops.restart()
    contexts = {"reference": spec, "fallback": without_kernels, "cpu": nullcontext, "simt": simt_ops.patched}
    with contexts[request.param]():
        yield SimpleNamespace(name=request.param, slots_stored=request.param == "simt")


def run(case, **main_grads):
    """The leaves after a forward and a backward."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.leaves().items()}
    options = case.options() | {name: leaves[name] for name in ("w13_bias", "w2_bias") if name in leaves}
    arguments = (leaves[name] for name in ("x", "w13", "w2", "topk_weights"))
    y = mk.fused_experts(*arguments, case.topk_ids, **options, **main_grads)
    y.backward(case.grad_y)
    return leaves


def steps(dtype, option):
    """Two micro-batches on the same weights."""
    first = make_case(9, 24, 16, 4, 2, dtype=dtype, seed=1, **OPTIONS[option])
    second = make_case(11, 24, 16, 4, 2, dtype=dtype, seed=2, **OPTIONS[option])
    weights = {name: getattr(first, name) for name in ("w13", "w2", "w13_bias", "w2_bias")}
    return first, replace(second, **weights)


def truth_of(cases, name, before, slots_stored):
    """before + the gradients of `cases`, and what the sum in the dtype of the sums may be off by."""
    acc, total, bound = before.dtype, before.double(), torch.zeros_like(before, dtype=torch.float64)
    for case in cases:
        stored = replace(case, w13=case.w13.to(acc), w2=case.w2.to(acc))  # the same weights; gradients of that dtype
        truth, off = expert_layer(stored, slots_stored=slots_stored)[f"grad_{name}"]
        total, bound = total + truth, bound + off + SAFETY * UNIT[acc] * (total.abs() + truth.abs())
    return total, bound


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_two_steps(on, dtype, option):
    cases, acc = steps(dtype, option), acc_dtype(dtype)
    before = {name: 4 * torch.randn(getattr(cases[0], name).shape, dtype=acc) for name in ("w13", "w2")}
    main = {name: t.clone() for name, t in before.items()}
    for case in cases:
        leaves = run(case, w13_main_grad=main["w13"], w2_main_grad=main["w2"])
        assert leaves["w13"].grad is None and leaves["w2"].grad is None
        plain = run(case)
        for name in leaves.keys() - {"w13", "w2"}:
            assert torch.equal(leaves[name].grad, plain[name].grad), name
    for name, grad in main.items():
        check(grad, *truth_of(cases, name, before[name], on.slots_stored), name)


def test_a_gradient_added_to_zeros_is_the_gradient(on):
    case = make_case(9, 24, 16, 4, 2, skew="empty", seed=3)
    for one in ("w13", "w2"):  # one of the two alone, too
        main = torch.zeros(getattr(case, one).shape)
        leaves, plain = run(case, **{f"{one}_main_grad": main}), run(case)
        other = {"w13": "w2", "w2": "w13"}[one]
        assert torch.equal(main, plain[one].grad)
        assert torch.equal(leaves[other].grad, plain[other].grad)


def test_both_forwards_before_both_backwards(on):
    """Pipelines run so: a main gradient is no saved tensor, whose change autograd would refuse."""
    case = make_case(5, 16, 8, 3, 2, seed=4)
    main = torch.zeros(case.w13.shape)
    w13 = case.w13.clone().requires_grad_()
    outs = [mk.fused_experts(case.x, w13, case.w2, case.topk_weights, case.topk_ids, w13_main_grad=main)
            for _ in range(2)]  # fmt: skip
    for y in outs:
        y.backward(case.grad_y)
    once = torch.zeros(case.w13.shape)
    run(case, w13_main_grad=once)
    assert torch.equal(main, once + once) and w13.grad is None


def test_an_expert_without_rows_keeps_what_it_had(on):
    case = make_case(9, 24, 16, 6, 2, dtype=torch.bfloat16, skew="empty")
    unused = [e for e in range(6) if not bool((case.topk_ids == e).any())]
    main = {f"{name}_main_grad": torch.randn(getattr(case, name).shape) for name in ("w13", "w2")}
    before = {name: t.clone() for name, t in main.items()}
    run(case, **main)
    assert unused and all(torch.equal(main[name][unused], before[name][unused]) for name in main)


def test_weights_that_need_no_gradient_add_nothing(on):
    case = make_case(5, 16, 8, 3, 2)
    main = {f"{name}_main_grad": torch.full(getattr(case, name).shape, 3.0) for name in ("w13", "w2")}
    x = case.x.clone().requires_grad_()
    mk.fused_experts(x, case.w13, case.w2, case.topk_weights, case.topk_ids, **main).sum().backward()
    with torch.no_grad():
        mk.fused_experts(x, case.w13.requires_grad_(), case.w2, case.topk_weights, case.topk_ids, **main)
    assert x.grad is not None and all(t.eq(3).all() for t in main.values())


# ---- grouped_gemm


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_grouped_gemm(on, dtype, transposed):
    """Two steps; main_grad or its mT is contiguous, an empty group, and rows of nobody behind the last."""
    E, k, N, acc = 3, 24, 40, acc_dtype(dtype)
    b = torch.randn(E, N, k, dtype=torch.float64).to(dtype).mT if transposed else torch.randn(E, k, N).to(dtype)
    before = torch.randn(E, N, k, dtype=acc).mT if transposed else torch.randn(E, k, N, dtype=acc)
    main, truth, bound = before.clone(), before.double(), torch.zeros(E, k, N, dtype=torch.float64)
    assert main.mT.is_contiguous() == transposed
    for seed, ends in enumerate(([5, 5, 12], [0, 9, 14])):
        torch.manual_seed(seed)
        a, grad = (torch.randn(ends[-1] + 2, n, dtype=torch.float64).to(dtype) for n in (k, N))
        leaves, offs = (a.requires_grad_(), b.detach().requires_grad_()), torch.tensor(ends, dtype=torch.int32)
        mk.grouped_gemm(*leaves, offs, main_grad=main).backward(grad)
        plain = mk.grouped_gemm(a, b.detach(), offs)
        assert leaves[1].grad is None
        assert torch.equal(leaves[0].grad, torch.autograd.grad(plain, a, grad)[0])
        for e, (lo, hi) in enumerate(zip([0, *ends], ends)):
            left, right = a.detach()[lo:hi].double().mT, grad[lo:hi].double()
            truth[e] += left @ right
            bound[e] += SAFETY * UNIT[acc] * (math.sqrt(max(hi - lo, 1)) * (left.abs() @ right.abs()) + truth[e].abs())
    check(main, truth, bound, "main_grad")


# ---- the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer(dtype):
    """gradient_accumulation_fusion over two steps equals float32 sums of what a layer without it gives."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2, "dtype": dtype}
    fused = mk.MoELayer(**sizes, gradient_accumulation_fusion=True)
    plain = mk.MoELayer(**sizes)
    plain.load_state_dict(fused.state_dict())
    x = [torch.randn(7, 16, dtype=dtype) for _ in range(2)]
    with pytest.raises(ValueError, match=r"Experts: w13.main_grad must be float32 \[4, 16, 16\] for gradient_acc"):
        fused(x[0])
    for name in ("w13", "w2"):
        weight = getattr(fused.experts, name)
        weight.main_grad = torch.zeros(weight.shape)
    sums = {name: torch.zeros(getattr(plain.experts, name).shape) for name in ("w13", "w2")}
    for rows in x:
        plain.zero_grad()
        for layer in (fused, plain):
            layer(rows).sum().backward()
        for name in sums:
            sums[name] += getattr(plain.experts, name).grad.float()
    for name in sums:
        weight = getattr(fused.experts, name)
        assert weight.grad is None
        rounded = 2 * SAFETY * UNIT[dtype] * sums[name].abs().double() + SAFETY * UNIT[dtype]
        check(weight.main_grad, sums[name].double(), rounded, name)
    assert fused.router.weight.grad is not None


def test_layer_refuses_experts_of_your_own():
    with pytest.raises(ValueError, match="gradient_accumulation_fusion must be False with experts of your own"):
        mk.MoELayer(8, 8, 2, 1, experts=torch.nn.Identity(), gradient_accumulation_fusion=True)


# ---- bits, compile, errors


def test_the_same_bits_for_any_number_of_threads():
    case = make_case(40, 24, 70, 3, 2, dtype=torch.bfloat16)
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        main = torch.ones(case.w13.shape)
        run(case, w13_main_grad=main)
        torch.set_num_threads(before)
        found.append(main)
    assert all(torch.equal(found[0], other) for other in found)


def test_compile():
    case = make_case(5, 16, 8, 3, 2)
    main = {f"{name}_main_grad": torch.zeros(getattr(case, name).shape) for name in ("w13", "w2")}

    def layer(x, w13, w2, w13_main_grad, w2_main_grad):
        return mk.fused_experts(x, w13, w2, case.topk_weights, case.topk_ids, w13_main_grad=w13_main_grad,
                                w2_main_grad=w2_main_grad)  # fmt: skip

    w13, w2 = case.w13.clone().requires_grad_(), case.w2.clone().requires_grad_()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(case.x, w13, w2, *main.values())
    y.backward(case.grad_y)
    wanted = {name: torch.zeros_like(t) for name, t in main.items()}
    run(case, **wanted)
    assert w13.grad is None and all(torch.equal(main[name], wanted[name]) for name in main)


def test_errors():
    case = make_case(5, 16, 8, 3, 2, dtype=torch.bfloat16)
    wrong = [
        (torch.zeros(case.w13.shape, dtype=torch.bfloat16), TypeError, r"float32 \[3, 16, 16\] like w13, got bfloat16"),
        (3, TypeError, r"float32 \[3, 16, 16\] like w13, got int 3"),
        (torch.zeros(3, 16, 15), ValueError, r"float32 \[3, 16, 16\] like w13, got \[3, 16, 15\]"),
        (torch.zeros(3, 16, 16).mT, ValueError, r"contiguous, got strides"),
        (torch.zeros(case.w13.shape, device="meta"), ValueError, r"on cpu like w13, got meta"),
        (torch.zeros(case.w13.shape, requires_grad=True), ValueError, r"without a gradient of its own"),
    ]
    for main, error, text in wrong:
        with pytest.raises(error, match=f"fused_experts: w13_main_grad must be {text}"):
            mk.fused_experts(case.x, case.w13, case.w2, case.topk_weights, case.topk_ids, w13_main_grad=main)
    with pytest.raises(
        TypeError, match=r"fused_experts: w2_main_grad must be float32 \[3, 16, 8\] like w2, got str 'x'"
    ):
        mk.fused_experts(case.x, case.w13, case.w2, case.topk_weights, case.topk_ids, w2_main_grad="x")
    packed = mk.pack_experts(case.w13, case.w2)
    with pytest.raises(ValueError, match="w13_main_grad must be None with PackedExperts"):
        mk.fused_experts(case.x, packed, None, case.topk_weights, case.topk_ids, w13_main_grad=torch.zeros(3, 16, 16))
    a, b, offs = torch.randn(4, 5), torch.randn(2, 5, 3), torch.tensor([1, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"grouped_gemm: main_grad must be None unless a is 2-D and b 3-D"):
        mk.grouped_gemm(a, b[0], offs, main_grad=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"grouped_gemm: main_grad must be contiguous, itself or its mT, got strides"):
        mk.grouped_gemm(a, b, offs, main_grad=torch.zeros(2, 5, 6)[..., ::2])

# SPDX-License-Identifier: Apache-2.0
"""float32 products on a GPU round their factors to tf32 where torch has been told so, and nowhere else."""

import math
from contextlib import contextmanager

import pytest
import simt_ops
import torch
from test_fused_experts import run

import moe_kernels as mk
from moe_kernels.schemas import allow_tf32
from moe_kernels.testing import SAFETY, UNIT, check, expert_layer, make_case

TF32 = 2.0**-11  # half a unit of ten bits of mantissa
on_emulator = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())


@contextmanager
def told(how):
    """torch with tf32 allowed by one of its three names."""
    matmul = torch.backends.cuda.matmul
    if how == "allow_tf32":
        matmul.allow_tf32 = True
    elif how == "precision":
        torch.set_float32_matmul_precision("high")
    else:
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        if how == "fp32_precision":
            matmul.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("how", ["allow_tf32", "precision", "fp32_precision"])
def test_what_torch_was_told(how):
    assert not allow_tf32(torch.float32)
    with told(how):
        assert allow_tf32(torch.float32)
        assert not any(allow_tf32(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16))
    assert not allow_tf32(torch.float32)


def products():
    """A grouped product with its gradients."""
    torch.manual_seed(0)
    a, b = torch.randn(9, 24, requires_grad=True), torch.randn(3, 24, 40, requires_grad=True)
    offs, grad = torch.tensor([4, 4, 9], dtype=torch.int32), torch.randn(9, 40)
    out = mk.grouped_gemm(a, b, offs)
    return {"out": out.detach(), **dict(zip(("a", "b"), torch.autograd.grad(out, (a, b), grad)))}


@on_emulator
def test_grouped_gemm():
    """Within the bound of rounded factors, and outside that of float32, forward and backward."""
    with simt_ops.patched():
        exact = products()
        with told("allow_tf32"):
            rounded = products()
    sizes = {"out": 24, "a": 40, "b": 9}
    for name, terms in sizes.items():
        spread = SAFETY * math.sqrt(2 * terms) * TF32 * 9  # factors below three
        check(rounded[name], exact[name].double(), spread, name)
        error = (rounded[name] - exact[name]).abs().max()
        assert error > 64 * SAFETY * UNIT[torch.float32] * math.sqrt(terms), f"{name} was not rounded"


@on_emulator
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_experts(recompute):
    """Every product of forward and backward, against float64 with factors that may be rounded to ten bits."""
    case = make_case(70, 40, 24, 3, 2, seed=2)  # more tokens than are decoded
    with simt_ops.patched():
        exact = run(mk, case, recompute)
        with told("precision"):
            rounded = run(mk, case, recompute)
    # sigma of expert_layer is made of UNIT[float32]; a factor rounded to tf32 moves each product as one such unit
    # moves its partial sums: TF32 / UNIT of them is an upper bound of what the rounding of both factors does
    for name, (truth, bound) in expert_layer(case, slots_stored=True).items():
        check(rounded[name], truth, bound * (2 * TF32 / UNIT[torch.float32]), name)
        assert not torch.equal(rounded[name], exact[name]), f"{name} was not rounded"
        check(exact[name], truth, bound, name)


def test_a_cpu_and_the_reference_ignore_it():
    exact = products()
    with told("allow_tf32"):
        again = products()
    assert all(torch.equal(exact[name], again[name]) for name in exact)


def test_a_compiled_graph_notices():
    seen = []

    def product(a, b, offs):
        return mk.grouped_gemm(a, b, offs)

    def backend(graph, _inputs):
        seen.append(next(node.args[5] for node in graph.graph.nodes if "grouped_gemm" in str(node.target)))
        return graph.forward

    compiled = torch.compile(product, fullgraph=True, backend=backend)
    arguments = (torch.randn(3, 4), torch.randn(1, 4, 2), torch.tensor([3], dtype=torch.int32))
    compiled(*arguments)
    with told("allow_tf32"):
        compiled(*arguments)
    assert seen == [False, True]


def test_explain(monkeypatch):
    import importlib

    module = importlib.import_module("moe_kernels.explain")
    monkeypatch.setattr(module, "backend_of", lambda op, device: (f"{device} kernel", ""))
    sizes = {"T": 8192, "H": 2048, "I": 768, "E": 8, "K": 2, "device": "sm_90"}
    asked = [("fused_experts", torch.float32), ("fused_experts_backward", torch.float32)]
    for op, dtype in asked:
        found = mk.explain(op, dtype=dtype, **sizes)
        assert ": fma" in found.config and any("unless tf32 is allowed" in why for _, why in found.refused)
        with told("allow_tf32"):
            found = mk.explain(op, dtype=dtype, **sizes)
            assert " in tf32" in found.config and ": fma" not in found.config
            assert "tf32" not in mk.explain(op, dtype=torch.bfloat16, **sizes).config

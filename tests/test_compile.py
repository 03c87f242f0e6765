# SPDX-License-Identifier: Apache-2.0
"""torch.compile without graph breaks, with dynamic shapes, torch.export, and the meta device."""

import torch

import moe_kernels as mk
from moe_kernels.demo.tolerance import distance
from moe_kernels.testing import make_case


def layer(x, router, w13, w2):
    routing = mk.route(x @ router.T, 2, num_expert_group=4, topk_group=2)
    fused = mk.fused_experts(x, w13, w2, routing.topk_weights, routing.topk_ids)
    rows = mk.permute(x, routing.topk_ids, 8, align=4)
    ends = rows.expert_offsets[1:]
    h = mk.reference.activate(mk.grouped_gemm(rows.x_rows, w13.mT, ends))
    staged = mk.unpermute(mk.grouped_gemm(h, w2.mT, ends), rows.slot_to_row, routing.topk_weights)
    return fused + staged + routing.lse.mean()


def leaves(T, seed=0):
    case = make_case(T, seed=seed)
    router = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
    return [t.detach().requires_grad_() for t in (case.x, router, case.w13, case.w2)]


def results(function, args):
    """y and the gradient of every argument."""
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y.sum(), args)]


def assert_as_near(compiled, eager, args):
    """A compiled graph may fuse what stands between our ops: it must be as near to float64 as the eager one is."""
    truth = results(eager, [t.detach().double().requires_grad_() for t in args])
    for got, plain, exact in zip(results(compiled, args), results(eager, args), truth):
        rounding = torch.finfo(plain.dtype).eps * float(exact.norm())
        assert distance(plain, exact) <= 64 * rounding  # eager found the same experts as float64
        assert distance(got, exact) <= 2 * distance(plain, exact) + rounding


def test_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (9, 21):
        assert_as_near(compiled, layer, leaves(T))


def test_inductor():
    torch._dynamo.reset()

    def small(x, router, w13, w2):
        routing = mk.route(x @ router.T, 2)
        return mk.fused_experts(x, w13, w2, routing.topk_weights, routing.topk_ids)

    assert_as_near(torch.compile(small, fullgraph=True), small, leaves(9))


def test_packed_compiles():
    torch._dynamo.reset()
    case = make_case(5)
    packed = mk.pack_experts(case.w13, case.w2)

    def decode(x):
        return mk.fused_experts(x, packed, None, case.topk_weights, case.topk_ids)

    with torch.no_grad():
        assert torch.equal(torch.compile(decode, fullgraph=True, backend="aot_eager")(case.x), decode(case.x))


def test_export():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            case = make_case()
            self.w13, self.w2 = torch.nn.Parameter(case.w13), torch.nn.Parameter(case.w2)
            self.router = torch.nn.Linear(24, 8)

        def forward(self, x):
            routing = mk.route(self.router(x), 2)
            return mk.fused_experts(x, self.w13, self.w2, routing.topk_weights, routing.topk_ids)

    module = Layer().eval()
    program = torch.export.export(
        module, (torch.randn(9, 24),), dynamic_shapes=({0: torch.export.Dim("T", min=2, max=4096)},)
    )
    assert "moe_kernels.fused_experts" in str(program.graph)
    x = torch.randn(31, 24)
    assert torch.equal(program.module()(x), module(x))


def test_meta():
    args = [t.detach().to("meta").requires_grad_() for t in leaves(7)]
    y = layer(*args)
    assert (y.device.type, y.shape) == ("meta", (7, 24))
    assert [g.shape for g in torch.autograd.grad(y.sum(), args)] == [t.shape for t in args]


def test_checkpoint_and_functional_call():
    x, router, w13, w2 = leaves(7)
    y = torch.utils.checkpoint.checkpoint(layer, x, router, w13, w2, use_reentrant=False)
    assert torch.equal(y, layer(x, router, w13, w2))
    again = torch.autograd.grad(y.sum(), (x, w13))
    assert all(torch.equal(a, b) for a, b in zip(again, torch.autograd.grad(layer(x, router, w13, w2).sum(), (x, w13))))

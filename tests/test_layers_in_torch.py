# SPDX-License-Identifier: Apache-2.0
"""MoELayer under what torch does to modules: meta device, copies, compile, export, checkpointing, functional calls."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from test_layers import EVERYTHING, V3, E, H, I, K, grads_of, layer_of, x_of
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk


def test_meta_device():
    layer = mk.MoELayer(H, I, E, K, device="meta", dtype=torch.bfloat16, **EVERYTHING)
    assert all(t.is_meta for t in layer.state_dict().values())
    assert layer(torch.empty(2, 3, H, device="meta", dtype=torch.bfloat16)).shape == (2, 3, H)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(x_of(2, 3, dtype=torch.bfloat16)).isfinite().all()
    assert layer.router.e_score_correction_bias.dtype == torch.float32
    with torch.device("meta"):
        assert mk.MoELayer(H, I, E, K).experts.w13.is_meta


def test_copies():
    """After a training step, with its graph behind it: deepcopy, pickle, torch.save."""
    layer, x = layer_of(**EVERYTHING), x_of(2, 5)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert other.last_routing is None and other.aux_loss.item() == 0
        assert torch.equal(other(x), y) and torch.equal(other.aux_loss, layer.aux_loss)
    assert layer.last_routing is not None and layer.aux_loss.requires_grad


@pytest.mark.parametrize(
    "options", [{}, EVERYTHING, EVERYTHING | {"attach_losses": True}], ids=["plain", "all", "attached"]
)
def test_compile(options):
    """One graph, training and inference, losses and routing left behind as without it."""
    torch._dynamo.reset()
    layer, mask = layer_of(**options), torch.arange(14).reshape(2, 7) % 5 > 0
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = x_of(2, 7)
    for call in (lambda f: f(x), lambda f: f(x, padding_mask=mask)):
        y = call(compiled)
        aux, routing = layer.aux_loss, layer.last_routing
        grads = grads_of(layer, y) if "attach_losses" in options else grads_of(layer, y + aux)
        plain = call(layer)
        assert torch.equal(y, plain) and torch.equal(aux, layer.aux_loss)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(routing, layer.last_routing))
        again = grads_of(layer, plain) if "attach_losses" in options else grads_of(layer, plain + layer.aux_loss)
        for a, b in zip(grads, again):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_export():
    layer = layer_of(**EVERYTHING).eval()
    shapes = ({1: torch.export.Dim("S", min=2, max=500)},)
    program = torch.export.export(layer, (x_of(2, 9),), dynamic_shapes=shapes)
    graph = str(program.graph)
    assert all(f"moe_kernels.{op}" in graph for op in ("route", "limit_capacity", "fused_experts"))
    x = x_of(2, 37)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    """Recomputed in the backward: the same gradients, the same jitter; attached losses survive both kinds."""
    options = EVERYTHING | {"router": mk.Router(**V3, input_jitter=0.1), "attach_losses": True}
    layer, x = layer_of(**options), x_of(2, 7).requires_grad_()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        layer.zero_grad()
        run(x).sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_aux_loss_under_checkpointing():
    layer, x = layer_of(**EVERYTHING), x_of(2, 7).requires_grad_()
    (layer(x).sum() + layer.aux_loss).backward()
    want = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    (checkpoint(layer, x, use_reentrant=False).sum() + layer.aux_loss).backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(layer.parameters(), want))


def test_functional_call():
    layer, other, x = layer_of(), mk.MoELayer(H, I, E, K), x_of(5)
    assert torch.equal(torch.func.functional_call(layer, other.state_dict(), (x,)), other(x))


def test_no_leak_between_steps():
    """What a forward leaves behind is let go by the next one."""
    layer = layer_of(**EVERYTHING)
    layer(x_of(5))
    old = [weakref.ref(layer.aux_loss), weakref.ref(layer.last_routing.topk_ids)]
    layer(x_of(5))
    gc.collect()
    assert all(ref() is None for ref in old)

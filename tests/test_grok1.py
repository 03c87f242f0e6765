# SPDX-License-Identifier: Apache-2.0
"""Grok-1: the block, its converter from and to the released checkpoint, and blocks of remote code taken in place."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import moe_kernels as mk
from moe_kernels.hf import Grok1MoE
from moe_kernels.hf.blocks import grok1, weights

GOLDEN = Path(__file__).with_name("golden")


def golden_grok() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The vector, and its weights by the names and in the layout of the released checkpoint."""
    data = load_file(GOLDEN / "ref_grok1.safetensors")
    layer = "transformer/decoder_layer_0/"
    checkpoint = {
        layer + "moe/linear/w": data["w_gate"].mT,
        layer + "moe/linear_v/w": data["w_up"].mT,
        layer + "moe/linear_1/w": data["w_down"].mT,
        layer + "router/w": data["router_weight"].T,
        layer + "multi_head_attention/linear/w": torch.zeros(3, 3),
    }
    return data, checkpoint


def check_grok(block: Any, data: dict[str, torch.Tensor]) -> None:
    x = data["x"].clone().requires_grad_()
    block.zero_grad()
    y, logits = block(x)
    torch.testing.assert_close(logits, data["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, data["y"], rtol=1e-4, atol=1e-5)
    y.backward(data["gy"])
    torch.testing.assert_close(x.grad, data["grad_x"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.gate.weight.grad, data["grad_router_weight"], rtol=1e-4, atol=1e-5)
    for name, golden in (("linear", "grad_w_gate"), ("linear_v", "grad_w_up"), ("linear_1", "grad_w_down")):
        grads = torch.stack([getattr(expert, name).weight.grad for expert in block.experts])
        torch.testing.assert_close(grads, data[golden], rtol=1e-4, atol=1e-5)


def test_grok1_golden_and_converter() -> None:
    data, checkpoint = golden_grok()
    block = Grok1MoE.from_checkpoint(checkpoint)
    check_grok(block, data)
    back = block.to_checkpoint()
    assert len(back) == 4
    for name, value in back.items():
        assert torch.equal(value, checkpoint["transformer/decoder_layer_0/" + name]), name
    names = [n for n, _ in block.named_parameters()]
    assert names[:4] == ["gate.weight", *(f"experts.0.{n}.weight" for n in ("linear", "linear_v", "linear_1"))]
    again = Grok1MoE(24, 16)
    again.load_state_dict(block.state_dict())
    check_grok(again, data)
    assert mk.replace(block).taken[0].how == "already a layer of moe_kernels"


def test_grok1_quantised_checkpoint() -> None:
    """8-bit weights with a scale a column, and a scale a block of rows as the eight shards of the release have."""
    _, checkpoint = golden_grok()
    layer = "transformer/decoder_layer_0/"
    plain = Grok1MoE.from_checkpoint(checkpoint).to_checkpoint()
    for name, blocks in (("moe/linear/w", 1), ("moe/linear_v/w", 1), ("moe/linear_1/w", 8)):
        w = checkpoint[layer + name].contiguous()
        parts = w.unflatten(1, (blocks, -1))
        scales = parts.abs().amax(2) / 127
        weight = (parts / scales[:, :, None]).round().to(torch.int8).flatten(1, 2)
        quantised = types.SimpleNamespace(weight=weight, scales=scales) if blocks == 1 else (weight, scales)
        found = Grok1MoE.from_checkpoint(checkpoint | {layer + name: quantised}).to_checkpoint()[name]
        step = scales.repeat_interleave(w.shape[1] // blocks, 1)
        assert bool(((found - plain[name]).abs() <= 0.5001 * step).all())
    bad = (torch.zeros(8, 24, 16, dtype=torch.int8), torch.ones(8, 7, 16))
    with pytest.raises(ValueError, match=r"the scales of moe/linear/w must be .* of \[8, 24, 16\], got \[8, 7, 16\]"):
        Grok1MoE.from_checkpoint(checkpoint | {layer + "moe/linear/w": bad})


def test_grok1_bad_checkpoints() -> None:
    _, checkpoint = golden_grok()
    with pytest.raises(KeyError, match="no router/w among"):
        Grok1MoE.from_checkpoint({k: v for k, v in checkpoint.items() if "router" not in k})
    with pytest.raises(ValueError, match=r"moe/linear_1/w must be \[8, 16, 24\], got \[8, 24, 16\]"):
        Grok1MoE.from_checkpoint(checkpoint | {"transformer/decoder_layer_0/moe/linear_1/w": torch.zeros(8, 24, 16)})
    with pytest.raises(ValueError, match="top_k must be in 1..num_experts=8, got 9"):
        Grok1MoE.from_checkpoint(checkpoint, top_k=9)


class MoeMLP(nn.Module):
    """An expert as the remote code of the converted checkpoint has it."""

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.linear, self.linear_v = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
        self.linear_1, self.act_fn = nn.Linear(16, 24, bias=False), act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_1(self.act_fn(self.linear(x)) * self.linear_v(x))


class MoeBlock(nn.Module):
    """A block as remote code has it; ports differ in `renormalize`, in the activation and in what they return."""

    def __init__(self, act_fn: nn.Module, renormalize: bool = False, bare: bool = False, sharpen: float = 1.0) -> None:
        super().__init__()
        self.top_k, self.renormalize, self.bare, self.sharpen = 2, renormalize, bare, sharpen
        self.gate = nn.Linear(24, 8, bias=False)
        self.experts = nn.ModuleList(MoeMLP(act_fn) for _ in range(8))

    def forward(self, hidden_states: torch.Tensor) -> Any:
        x = hidden_states.reshape(-1, 24)
        logits = self.gate(x)
        weights, ids = (logits.float() * self.sharpen).softmax(-1).topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True) if self.renormalize else weights
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            y = y.index_add(0, t, expert(x[t]) * weights[t, k, None].to(x.dtype))
        y = y.view(hidden_states.shape)
        return y if self.bare else (y, logits)


def remote(**options: Any) -> Any:
    _, checkpoint = golden_grok()
    block = MoeBlock(options.pop("act_fn", nn.GELU(approximate="tanh")), **options)
    block.load_state_dict(Grok1MoE.from_checkpoint(checkpoint).state_dict())
    return block


def test_grok1_remote_block_is_taken_in_place() -> None:
    data, _ = golden_grok()
    block = remote()
    check_grok(block, data)
    report = mk.replace(block, strict=True)
    assert report.taken[0].kind == "MoeBlock" and "gelu_tanh" in report.taken[0].how
    check_grok(block, data)
    converted = grok1.to_checkpoint(block)
    assert torch.equal(converted["moe/linear/w"], data["w_gate"].mT)
    assert mk.restore(block) == 1 and "forward" not in vars(block)
    check_grok(block, data)


@pytest.mark.parametrize(
    "options", [{"renormalize": True}, {"bare": True}, {"act_fn": nn.GELU()}, {"act_fn": nn.Tanh()}]
)
def test_grok1_ports_are_told_apart(options: dict[str, Any]) -> None:
    block, x = remote(**options), torch.randn(3, 5, 24)
    before = block(x)
    mk.replace(block, strict=True)
    after = block(x)
    assert type(before) is type(after)
    y_before, y_after = (t if isinstance(t, torch.Tensor) else t[0] for t in (before, after))
    torch.testing.assert_close(y_after, y_before, rtol=1e-4, atol=1e-5)


def test_grok1_port_that_routes_otherwise_is_refused() -> None:
    report = mk.replace(remote(sharpen=3.0))
    assert not report.taken and "something else than Grok-1" in report.skipped[0].reason


@pytest.mark.parametrize("how", ["cast", "meta"])
def test_grok1_weights_stay_together(how: str) -> None:
    """Cast, or built on the meta device and filled later: no copy of the weights a call."""
    data, checkpoint = golden_grok()
    block = Grok1MoE.from_checkpoint(checkpoint)
    if how == "cast":
        block = block.bfloat16().float()
    else:
        with torch.device("meta"):
            empty = Grok1MoE(24, 16)
        block = empty.to_empty(device="cpu")
        block.load_state_dict(Grok1MoE.from_checkpoint(checkpoint).state_dict())
        check_grok(block, data)
    for column in grok1.columns(block):
        assert weights.stack(column).data_ptr() == column[0].data_ptr()


def test_grok1_router_precision() -> None:
    """The router is float32 beside bfloat16 experts, under autocast too, and float64 follows a float64 input."""
    _, checkpoint = golden_grok()
    block = Grok1MoE.from_checkpoint(checkpoint, dtype=torch.bfloat16)
    x = torch.randn(3, 24).bfloat16()
    want = x.float() @ block.gate.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        y, logits = block(x)
    assert block.gate.weight.dtype == torch.float32 and y.dtype == torch.bfloat16
    torch.testing.assert_close(logits, want, rtol=1e-6, atol=1e-6)
    assert block.double()(x.double())[1].dtype == torch.float64

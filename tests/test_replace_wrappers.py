# SPDX-License-Identifier: Apache-2.0
"""Replaced blocks among the things people do to a model: restore, copy, wrap, shard, compile, checkpoint."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from block_models import build, fingerprint, mixtral, run, same, tokens

import moe_kernels as mk

EPS = 2.0**-52


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe", "dbrx", "jetmoe", "llama4", "longcat_flash"])
def test_blocks_are_restored_as_they_were(family: str) -> None:
    """The very same modules, parameters and attributes; twice in a row is once."""
    model = build(family)
    result, before = run(model), fingerprint(model)  # in this order: their routers note things in the first forward
    report = mk.replace(model, strict=True)
    state = fingerprint(model)
    again = mk.replace(model, strict=True)
    assert fingerprint(model) == state and [e.name for e in again.taken] == [e.name for e in report.taken]
    assert all(e.how.startswith("already on a forward of our own") for e in again.taken)
    assert mk.restore(model) == len(report.taken)
    assert fingerprint(model) == before and mk.restore(model) == 0
    after = run(model)
    assert all(torch.equal(after[name], result[name]) for name in result)


def test_hooks_and_training_mode_stay() -> None:
    """A hook on the replaced module itself still runs; train() and eval() reach what is inside."""
    model = build("switch_transformers", dropout_rate=0.3)
    experts = model.encoder.block[1].layer[1].mlp.experts
    seen: list[int] = []
    experts.register_forward_hook(lambda module, args, y: seen.append(y.shape[0]))
    mk.replace(model)
    with torch.no_grad():
        first, second = (model.eval()(input_ids=tokens(), labels=tokens()).loss for _ in range(2))
        assert float(first) == float(second)
        first, second = (model.train()(input_ids=tokens(), labels=tokens()).loss for _ in range(2))
    assert float(first) != float(second) and seen == [22] * 4


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_replaced_model(how: str) -> None:
    """A copy is replaced as well, works on its own weights, and can be restored on its own."""
    for model in (build("switch_transformers"), mixtral()):
        count = len(mk.replace(model).taken)
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        before, after = run(model), run(other)
        same(before, after, EPS)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        assert all(torch.equal(after[name], value) for name, value in run(other).items())
        assert mk.restore(other) == count and mk.restore(model) == count
        if "Mixtral" in type(other).__name__:
            assert other.config._experts_implementation == "eager"


@pytest.mark.parametrize("family", ["switch_transformers", "mixtral"])
def test_inside_ddp(family: str, process_group: None) -> None:
    """Before or after wrapping; names without prefix; gradients as without."""
    model = mixtral() if family == "mixtral" else build(family)
    before = run(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    report = mk.replace(wrapped, strict=True)
    assert len(report.taken) == 2 and not any(e.name.startswith("module.") for e in report.taken)

    def call() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        result = wrapped(input_ids=tokens(), labels=tokens(), use_cache=False)
        result.loss.backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        grads = {"grad " + n: g for n, g in grads.items()}  # none: an expert without tokens, in their own code
        return {"logits": result.logits.detach(), "loss": result.loss.detach(), **grads}

    after = call()
    same({name: before[name] for name in after}, after, 2.0**-23 if family == "mixtral" else EPS)
    assert mk.replace(torch.compile(wrapped)).taken[0].name == report.taken[0].name
    assert mk.replace(nn.ModuleDict({"module": model})).taken[0].name == f"module.{report.taken[0].name}"
    first = next(model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = call()
    assert float(moved["loss"]) < float(after["loss"]) and next(model.parameters()) is first
    assert mk.restore(wrapped) == 2
    same(moved, call(), 2.0**-23 if family == "mixtral" else EPS)


def test_sharded_by_fsdp2(process_group: None) -> None:
    """Replaced first, sharded afterwards; the other way round the report says what to do."""
    from torch.distributed.fsdp import fully_shard

    model = build("switch_transformers", torch.float32)  # their router makes itself float32, and FSDP wants one dtype
    before = run(model)
    mk.replace(model, strict=True)
    for block in (*model.encoder.block, *model.decoder.block):
        fully_shard(block)
    fully_shard(model)
    result = model(input_ids=tokens(), labels=tokens(), use_cache=False)
    result.loss.backward()
    found = {"grad " + n: p.grad.full_tensor() for n, p in model.named_parameters()}
    found["loss"] = result.loss.detach()
    same({name: before[name] for name in found}, found, 4 * 2.0**-23)

    late = build("switch_transformers", torch.float32)
    fully_shard(late)
    assert all("call replace before the model is sharded" in e.reason for e in mk.replace(late).skipped)


BLOCKS = {
    "switch_transformers": lambda model: model.encoder.block[1].layer[1].mlp,
    "dbrx": lambda model: model.transformer.blocks[0].ffn,
    "mixtral": lambda model: model.model.layers[0].mlp,
}


@pytest.mark.parametrize("family", list(BLOCKS))
def test_compiled_first_replaced_later(family: str) -> None:
    """What was compiled and has run is traced anew: after replace, and after restore."""
    block = BLOCKS[family](mixtral() if family == "mixtral" else build(family))
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(block, backend=backend)
    x = torch.randn(1, 3, 64 if family == "mixtral" else 32, dtype=torch.float64)

    def call() -> torch.Tensor:
        seen.clear()
        with torch.no_grad():
            return compiled(x)

    before = call()
    assert not any("moe_kernels" in target for target in seen)
    report = mk.replace(compiled, strict=True)
    assert [e.name for e in report.taken] == ["experts"]
    torch.testing.assert_close(call(), before, rtol=1e-6, atol=1e-7)
    assert any("moe_kernels" in target for target in seen)
    mk.restore(compiled)
    assert torch.equal(call(), before)
    assert not any("moe_kernels" in target for target in seen)


def test_gradient_checkpointing_of_a_block() -> None:
    model = build("llama4").train()
    mk.replace(model)
    kept = run(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    again = run(model)
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_autocast() -> None:
    """Under bfloat16 autocast a replaced block differs from its own code by roundings to bfloat16 only."""
    model = build("dbrx", torch.float32)
    experts = model.transformer.blocks[0].ffn.experts
    x = torch.randn(2, 9, 32)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(18)])
    share = torch.rand(18, 2)
    with torch.autocast("cpu", torch.bfloat16):
        before = experts(x, ids, share)
        mk.replace(experts, strict=True)
        after = experts(x, ids, share)
    close = 8 * 2.0**-8 * float(before.detach().abs().max())  # three products and an activation, each rounded
    torch.testing.assert_close(after.float(), before.float(), rtol=0, atol=close)

# SPDX-License-Identifier: Apache-2.0
"""Weights of experts held one by one: read without a copy where they lie side by side, right wherever they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import block_models
from block_models import build, run, same, tokens

import moe_kernels as mk
from moe_kernels.hf.blocks import switch_transformers, weights

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}


def experts_of(model: Any) -> Any:
    return model.encoder.block[1].layer[1].mlp.experts


def columns_of(model: Any) -> list[list[torch.Tensor]]:
    return switch_transformers.columns(experts_of(model))


def test_weights_are_read_without_a_copy() -> None:
    """Side by side in one block of memory: the stack is that block; gradients go to the parameters."""
    model = build("switch_transformers")
    parameters = {id(p) for p in model.parameters()}
    mk.replace(model)
    assert {id(p) for p in model.parameters()} == parameters
    for column in columns_of(model):
        stacked = weights.stack(column)
        assert stacked.data_ptr() == column[0].data_ptr() and torch.equal(stacked, torch.stack(column))
        (stacked * torch.arange(4, dtype=torch.float64)[:, None, None]).sum().backward()
        assert [float(w.grad.mean()) for w in column] == [0, 1, 2, 3]


@pytest.mark.parametrize("what", ["deepcopy", "cast", "assign"])
def test_weights_that_were_moved_apart(what: str) -> None:
    """A copy is made then, and the results stay right; replacing again puts the weights together."""
    model = build("switch_transformers")
    mk.replace(model)
    if what == "deepcopy":
        model = block_models.clone(model)
    elif what == "cast":
        model = model.float().double()
    else:
        experts = experts_of(model)
        experts.load_state_dict({name: t.clone() for name, t in experts.state_dict().items()}, assign=True)
    column = columns_of(model)[0]
    assert weights.stack(column).data_ptr() != column[0].data_ptr()
    same(run(build("switch_transformers").to(torch.float64)), run(model), EPS[torch.float32])
    with torch.no_grad():
        few = model.generate(tokens(1, 2), max_new_tokens=2, do_sample=False)  # copies the experts in use only
        assert torch.equal(few, build("switch_transformers").generate(tokens(1, 2), max_new_tokens=2, do_sample=False))
    mk.replace(model)
    column = columns_of(model)[0]
    assert weights.stack(column).data_ptr() == column[0].data_ptr()


def test_only_the_experts_in_use_are_copied() -> None:
    columns = [[torch.randn(3, 2) for _ in range(10)], [torch.randn(2, 3) for _ in range(5)]]  # two and one an expert
    ids = torch.tensor([[4, -1], [1, 4]])
    (w13, w2), new_ids = weights.stacks(columns, ids)
    assert new_ids.tolist() == [[1, -1], [0, 1]]
    assert torch.equal(w13, torch.stack([torch.cat(columns[0][2 * e : 2 * e + 2]) for e in (1, 4)]))
    assert torch.equal(w2, torch.stack([columns[1][1], columns[1][4]]))
    (w13, _), new_ids = weights.stacks(columns, torch.full((1, 2), -1))
    assert len(w13) == 1 and new_ids.tolist() == [[-1, -1]]
    columns[0][0].requires_grad_()
    (w13, _), new_ids = weights.stacks(columns, ids)
    assert len(w13) == 5 and torch.equal(new_ids, ids)


def test_tied_experts_keep_their_tie() -> None:
    model = build("switch_transformers")
    experts = experts_of(model)
    experts["expert_1"].wi.weight = experts["expert_0"].wi.weight
    before = run(model)
    mk.replace(model, strict=True)
    assert experts["expert_1"].wi.weight is experts["expert_0"].wi.weight
    same(before, run(model), EPS[torch.float64])

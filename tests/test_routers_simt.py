# SPDX-License-Identifier: Apache-2.0
"""Every router chooses the same experts on the CPU and with the CUDA kernels on the emulator, to the last id."""

import os

import pytest
import simt_ops
import torch
from test_cuda_kernels import close_calls
from test_router_kinds import KINDS, E, V
from torch import nn

import moe_kernels as mk
from moe_kernels import draws
from moe_kernels.routers import assignment, expert_choice

pytestmark = [
    pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing()),
    pytest.mark.skipif(
        os.environ.get("MOE_KERNELS_ISA") == "portable", reason="without fused multiply-add exp rounds twice"
    ),
]


@pytest.fixture(autouse=True)
def _first_seed():
    simt_ops.restart()


def layer_of_logits(name):
    """The layer of a router whose logits are its input, where it has a matrix [E, E]."""
    router, top_k = KINDS[name]
    torch.manual_seed(1)
    moe = mk.MoELayer(E, 4, E, top_k, router=router)
    weight = getattr(moe.router, "weight", None)
    if weight is not None and weight.shape == (E, E):
        nn.init.eye_(weight)
    draws.set_step(moe, 3, seed=11)
    return moe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", KINDS)
def test_ids_are_equal_where_scores_nearly_tie(name, training, dtype):
    moe = layer_of_logits(name).to(dtype).train(training)
    x = close_calls(72, E).reshape(4, 18, E).to(dtype)
    mask = torch.arange(72).reshape(4, 18) % 7 > 0
    more = {"token_ids": torch.randint(0, V, (4, 18))}
    for options in ({}, {"padding_mask": mask}):
        moe(x, **more, **options)
        wanted = moe.last_routing
        with simt_ops.patched():
            moe(x, **more, **options)
        got = moe.last_routing
        assert torch.equal(got.topk_ids, wanted.topk_ids)
        assert torch.equal(got.tokens_per_expert, wanted.tokens_per_expert)
        torch.testing.assert_close(got.topk_weights, wanted.topk_weights, rtol=1e-5, atol=1e-7)


def test_the_emulator_is_what_ran(monkeypatch):
    """The twin: with another CPU kernel in its place the comparison above would notice."""
    x = torch.randn(20, E)
    with simt_ops.patched():
        assert mk.ops._ROUTE.namespace == expert_choice._CUTS.namespace == assignment._SINKHORN.namespace
        assert mk.ops._ROUTE.namespace == simt_ops.NAMESPACE
    wanted = assignment.balance(x, 1).topk_ids
    assert not torch.equal(assignment.balance(x.flip(1), 1).topk_ids, wanted)


# ---- the two that look at all tokens: many tiles and blocks, every expert and none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "E", "n", "C"), [(300, 5, 300, 61), (66, 200, 33, 2), (512, 16, 64, 9), (9, 700, 9, 4)])
def test_expert_choice_takes_the_same_tokens(T, E, n, C, dtype):
    logits = close_calls(E, T).T.to(dtype)  # the tokens of an expert nearly tie
    wanted = expert_choice.choose(logits, C, n)
    with simt_ops.patched():
        got = expert_choice.choose(logits, C, n)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], wanted[:3]))  # the weights too, to the last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "E", "K"), [(64, 8, 1), (65, 33, 3), (700, 16, 2), (130, 200, 8)])
def test_sinkhorn_finds_the_same_plan(T, E, K, dtype):
    logits = close_calls(T, E).to(dtype) / 4
    wanted = assignment.balance(logits, K, 1e-4, 12)
    with simt_ops.patched():
        got = assignment.balance(logits, K, 1e-4, 12)
    assert torch.equal(got.plan, wanted.plan) and torch.equal(got.iterations, wanted.iterations)
    assert torch.equal(got.topk_ids, wanted.topk_ids) and torch.equal(got.tokens_per_expert, wanted.tokens_per_expert)


@pytest.mark.parametrize("seed", range(9))  # three schedules of the threads times three of the asynchronous copies
def test_every_schedule_gives_the_same_bits(seed):
    torch.manual_seed(seed)
    logits, mask = torch.randn(150, 12), torch.arange(150) % 5 > 0
    found = []
    for first in (seed, 9 + seed):
        simt_ops.restart(first)
        with simt_ops.patched():
            chosen = expert_choice.choose(logits, 20, 75, padding_mask=mask)
            balanced = assignment.balance(logits, 2, 1e-4, 4, padding_mask=mask)
        found.append((*chosen[:3], *balanced))
    assert all(torch.equal(a, b) for a, b in zip(*found))

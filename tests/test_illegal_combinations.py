# SPDX-License-Identifier: Apache-2.0
"""Combinations that have no meaning are refused where the layer is built, or where it first can be known; each refusal
states its rule."""

import math

import pytest
import torch

import moe_kernels as mk
from moe_kernels import losses, routers

H, E, V = 6, 8, 32
X = torch.zeros(6, H)


def layer(top_k, router=None, **options):
    return mk.MoELayer(H, 4, E, top_k, router=router, **options)


def grouped(groups, limit):
    return mk.Router(num_expert_group=groups, topk_group=limit)


ILLEGAL = {
    # K > M * E / G, and groups that do not divide
    "more experts than the groups hold": (
        lambda: layer(5, grouped(4, 2)), r"top_k must be at most the experts in reach \(2 groups of 2\), got 5"),
    "groups that do not divide the experts": (
        lambda: layer(2, grouped(3, 1)), "num_expert_group must be a divisor of E=8, got 3"),
    "more groups than there are": (
        lambda: layer(2, grouped(4, 5)), "topk_group must be in 1..num_expert_group=4, got 5"),
    "more experts than there are": (lambda: layer(9), "top_k must be in 1..num_experts=8, got 9"),
    "two levels that do not divide": (
        lambda: layer(4, routers.TwoLevel(groups=3, top_groups=1)), "groups must be a divisor of E=8, got 3"),
    "two levels with an odd share": (
        lambda: layer(3, routers.TwoLevel(groups=4, top_groups=2)), "top_k must be a multiple of top_groups=2"),
    "devices that do not divide, in a loss": (
        lambda: layer(2, losses=losses.DeepSeekV2Device(devices=3))(X), "devices must be a divisor of E=8, got 3"),
    "devices that do not divide, in a capacity": (
        lambda: layer(2, capacity=mk.Capacity(1.0, drop_policy="device", devices=3))(X),
        "devices must be a divisor of E=8, got 3"),
    "parts of MultiHash that do not divide": (
        lambda: layer(3, routers.MultiHash(torch.zeros(V, 3, dtype=torch.int64))),
        "num_experts must be a multiple of top_k=3"),
    # decoding
    "expert choice in decoding": (
        lambda: layer(2, routers.ExpertChoice()).eval()(torch.zeros(3, 1, H)),
        "the sequence must be longer than 1 in evaluation: .* needs allow_noncausal=True"),
    # capacity with a router or a rule that drops nothing
    "capacity with expert choice": (
        lambda: layer(2, routers.ExpertChoice(), capacity=1.0),
        "capacity must be None: ExpertChoice itself fixes how many tokens an expert takes"),
    "capacity with BASE": (lambda: layer(1, routers.Base(), capacity=1.0), "capacity must be None: Base itself fixes"),
    "capacity with Sinkhorn": (
        lambda: layer(1, routers.Sinkhorn(), capacity=1.0), "capacity must be None: Sinkhorn itself fixes"),
    "a drop policy without a limit": (
        lambda: mk.Capacity(math.inf, drop_policy="probs"), "factor must be finite for probs: without a limit nothing"),
    "renormalised after no drop": (
        lambda: mk.Capacity(math.inf, renormalize_after_drop=True),
        "renormalize_after_drop must be False for factor=inf: without a limit nothing drops, got True"),
    # a loss for what balances itself, or has no gate
    "a balance loss with Sinkhorn": (
        lambda: layer(1, routers.Sinkhorn(), losses="switch"), "losses must be without Switch: Sinkhorn balances"),
    "a balance loss with a hash": (
        lambda: layer(1, routers.Hash(V), losses="switch"), "losses must be without Switch: Hash has no gate to train"),
    # token ids
    "a token id beyond the hash": (
        lambda: layer(1, routers.Hash(V))(X, token_ids=torch.full((6,), V)),
        r"token_ids must be in 0..31 \(a token id of the table\), got .* 32"),
    "a negative token id": (
        lambda: layer(1, routers.BalancedHash(torch.arange(V)))(X, token_ids=torch.full((6,), -1)),
        r"token_ids must be in 0..31 \(a token id of the table\), got .* -1"),
    "a token id beyond a learned table": (
        lambda: layer(2, mk.Router(scoring_func="sigmoid", token_table=V))(X, token_ids=torch.full((6,), V)),
        r"token_ids must be in 0..31 \(a row of token_table\), got .* 32"),
    # tokens that do not divide
    "tokens that do not fill the groups of expert choice": (
        lambda: layer(2, routers.ExpertChoice(group=4))(X), "T must be a multiple of group=4, got 6"),
    "sequences without a sequence, expert choice": (
        lambda: layer(2, routers.ExpertChoice(group="sequence"))(X), 'x must be at least 3-D with group="sequence"'),
    "sequences without a sequence, capacity": (
        lambda: layer(2, capacity=mk.Capacity(1.0, group="sequence"))(X), "at least 3-D"),
    # experts a token
    "two experts with BASE": (lambda: layer(2, routers.Base()), "top_k must be 1: an assignment gives every token one"),
    "GShard's threshold for one expert": (
        lambda: layer(1, mk.Router(second_threshold=0.5)), "top_k must be 2 with a second_threshold, got 1"),
    "a plan with less room than demand": (
        lambda: layer(2, routers.ExpertChoice(max_experts=1)), "capacity_factor must be at most max_experts"),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_it_is_refused_with_its_rule(name):
    call, text = ILLEGAL[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_what_is_allowed_beside_it_is_not_refused():
    layer(4, grouped(4, 2))(X)
    layer(2, mk.Router(), capacity=math.inf)(X)
    layer(2, routers.ExpertChoice(group=3))(X)
    layer(2, routers.ExpertChoice(allow_noncausal=True)).eval()(torch.zeros(3, 1, H))
    layer(1, routers.Hash(V))(X, token_ids=torch.full((6,), V - 1))
    layer(1, routers.Base())(torch.zeros(7, H))  # the first T % E experts take one more

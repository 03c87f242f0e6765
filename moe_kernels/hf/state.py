# SPDX-License-Identifier: Apache-2.0
"""The weights of a Hugging Face MoE block under the names of MoELayer, and back.

    layer = MoELayer.from_config(config, layer_idx=3, dtype=torch.bfloat16)
    layer.load_state_dict(state_dict_from(model.model.layers[3].mlp, layer))
    model.model.layers[3].mlp.load_state_dict(state_dict_to(layer, model.model.layers[3].mlp))

A block is the MoE module of a decoder layer, or the decoder layer itself where parts of the MoE lie beside that module
(Granite's shared experts, Gemma 4's norms). Each rule pairs a name of a block with a view of one of the layer's tensors
that has the shape of the block's; copying between the two views is the whole conversion, in either direction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

View = Callable[[Tensor, Tensor, "re.Match[str]"], tuple[Tensor, Tensor]]
"""(the layer's tensor, the block's tensor, match) -> a view of each, of one shape"""

_HOLDERS = re.compile(r"^(block_sparse_moe|text_moe|mlp|feed_forward|mixer)\.")
_TRANSPOSED = {"Llama4TextExperts"}  # besides those that say so in is_transposed


def state_dict_from(block: nn.Module, layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a transformers block as a state_dict for the MoELayer that its config makes; new tensors.

    Errors: ValueError where the layer has a tensor that the block has nothing for, or not of its size.
    """
    theirs = block.state_dict()
    some = next(t for t in theirs.values() if t.is_floating_point())
    ours = {
        name: torch.empty(t.shape, dtype=some.dtype if t.is_floating_point() else t.dtype, device=some.device)
        for name, t in layer.state_dict().items()
    }
    filled = set()
    for name, _, mine, there in _pairs(theirs, _is_transposed(block), ours):
        mine.copy_(there)
        filled.add(name)
    _complete(filled, ours, block)
    return ours


def state_dict_to(layer: nn.Module, block: nn.Module) -> dict[str, Tensor]:
    """A state_dict of the block with the layer's weights in it; new tensors. The inverse of `state_dict_from`.

    Errors: ValueError as there.
    """
    ours, theirs = layer.state_dict(), {name: t.clone() for name, t in block.state_dict().items()}
    filled = set()
    for name, _, mine, there in _pairs(theirs, _is_transposed(block), ours):
        there.copy_(mine)
        filled.add(name)
    _complete(filled, ours, block)
    return theirs


def _complete(filled: set[str], ours: dict[str, Tensor], block: nn.Module) -> None:
    missing = [name for name in ours if name not in filled]
    if missing:
        raise ValueError(f"state_dict: {type(block).__name__} has nothing for the layer's {', '.join(missing)}")


def _pairs(
    theirs: dict[str, Tensor], transposed: bool, ours: dict[str, Tensor]
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(the layer's name, the block's, views of one shape of both tensors) of everything that the two share."""
    for name, tensor in theirs.items():
        bare = _HOLDERS.sub("", name)
        for pattern, target, view in _RULES:
            match = pattern.fullmatch(bare)
            if match is None:
                continue
            own = match.expand(target)
            own = own if own in ours else own.replace("experts.", "experts.inner.", 1)
            if own not in ours:
                continue
            if transposed and tensor.dim() == 3 and bare.startswith("experts."):
                tensor = tensor.transpose(1, 2)
            mine, there = view(ours[own], tensor, match)
            if mine.shape != there.shape:
                raise ValueError(f"state_dict: {name} is {list(there.shape)}, but {own} wants {list(mine.shape)}")
            yield own, name, mine, there
            break


def _is_transposed(block: nn.Module) -> bool:
    """Whether the block's experts hold [E, in, out]."""
    experts = next((m for name, m in block.named_modules() if name.rpartition(".")[2] == "experts"), None)
    return bool(getattr(experts, "is_transposed", type(experts).__name__ in _TRANSPOSED))


# ---- views


def _same(ours: Tensor, theirs: Tensor, match: re.Match[str]) -> tuple[Tensor, Tensor]:
    return ours, theirs.reshape(ours.shape) if ours.numel() == theirs.numel() else theirs


def _experts(ours: Tensor, theirs: Tensor, match: re.Match[str]) -> tuple[Tensor, Tensor]:
    """The experts that both have: Inkling's layer has the shared ones behind, LongCat's block rows for zero experts."""
    n = min(len(ours), len(theirs))
    return ours[:n], theirs[:n]


def _one_expert(ours: Tensor, theirs: Tensor, match: re.Match[str]) -> tuple[Tensor, Tensor]:
    return ours[int(match["expert"])], theirs


def _half(ours: Tensor, theirs: Tensor, match: re.Match[str]) -> tuple[Tensor, Tensor]:
    """Gate or up rows of w13; all of them without a gate."""
    half = theirs.shape[0]
    if len(ours) == half:
        return ours, theirs
    return ours[:half] if match["half"] == "gate" else ours[half:], theirs


def _last_half(ours: Tensor, theirs: Tensor, match: re.Match[str]) -> tuple[Tensor, Tensor]:
    """Gate or up rows of the last experts of w13."""
    half = theirs.shape[1]
    rows = ours[-len(theirs) :]
    return rows[:, :half] if match["half"] == "gate" else rows[:, half:], theirs


def _last(ours: Tensor, theirs: Tensor, match: re.Match[str]) -> tuple[Tensor, Tensor]:
    return ours[-len(theirs) :], theirs


def _stacked(ours: Tensor, theirs: Tensor, match: re.Match[str]) -> tuple[Tensor, Tensor]:
    """DBRX: [E * I, H] of gate (w1), up (v1) and, transposed, down (w2)."""
    each = theirs.view(len(ours), -1, theirs.shape[1])
    if match["part"] == "w2":
        return ours.transpose(1, 2), each
    I = each.shape[1]
    return ours[:, :I] if match["part"] == "w1" else ours[:, I:], each


# ---- names of blocks, names of the layer

_SHARED = r"(?:shared_experts?|shared_mlp)\."
_RULES: list[tuple[re.Pattern[str], str, View]] = [
    (re.compile(pattern), target, view)
    for pattern, target, view in (
        (r"(?:gate|router)\.(?:(?:gate|wg|proj|layer|classifier)\.)?weight", "router.weight", _same),
        (r"router\.(?:classifier\.)?bias", "router.bias", _same),
        (
            r"(?:(?:gate|router)\.(?:moe_statics\.)?)?(?:e_score_correction_bias|expert_bias|balancing_biases)",
            "router.e_score_correction_bias",
            _same,
        ),
        (r"gate\.tid2eid", "router.token_table", _same),
        (r"experts\.(?:gate_up|up)_proj", "experts.w13", _experts),
        (r"experts\.down_proj", "experts.w2", _experts),
        (r"experts\.gate_up_proj_bias", "experts.w13_bias", _same),
        (r"experts\.down_proj_bias", "experts.w2_bias", _same),
        (r"experts\.expert_(?P<expert>\d+)\.wi\.weight", "experts.w13", _one_expert),
        (r"experts\.expert_(?P<expert>\d+)\.wo\.weight", "experts.w2", _one_expert),
        (r"experts\.mlp\.(?P<part>w1|v1)", "experts.w13", _stacked),
        (r"experts\.mlp\.(?P<part>w2)", "experts.w2", _stacked),
        (r"input_linear\.weight", "experts.w13", _same),
        (r"output_linear\.weight", "experts.w2", _same),
        (r"bias", "experts.after.bias", _same),
        (_SHARED + r"(?P<half>gate|up)_proj\.weight", "shared_experts.w13", _half),
        (_SHARED + r"(?P<half>gate|up)_proj\.bias", "shared_experts.w13_bias", _half),
        (_SHARED + r"(?:gate_up_proj|input_linear)\.weight", "shared_experts.w13", _same),
        (_SHARED + r"(?:down_proj|output_linear)\.weight", "shared_experts.w2", _same),
        (_SHARED + r"down_proj\.bias", "shared_experts.w2_bias", _same),
        (r"shared_expert_gate\.weight", "shared_expert_gate.weight", _same),
        # Inkling's shared experts are the last of the list
        (_SHARED + r"(?P<half>gate|up)_proj", "experts.w13", _last_half),
        (_SHARED + r"down_proj", "experts.w2", _last),
        (r"gate\.(global_scale)", r"router.\1", _same),
        # Gemma 4
        (r"router\.(scale|per_expert_scale)", r"router.\1", _same),
        (r"pre_feedforward_layernorm_2\.weight", "experts.before.weight", _same),
        (r"post_feedforward_layernorm_2\.weight", "experts.after.weight", _same),
        # Nemotron's latent projections, Muse Spark's with a norm
        (r"fc1_latent_proj\.(weight|bias)", r"experts.before.\1", _same),
        (r"fc2_latent_proj\.(weight|bias)", r"experts.after.\1", _same),
        (r"pre_expert_proj\.weight", "experts.before.0.weight", _same),
        (r"pre_expert_norm\.weight", "experts.before.1.weight", _same),
        (r"experts\.post_expert_norm\.weight", "experts.norm.weight", _same),
        (r"post_expert_proj\.weight", "experts.after.weight", _same),
        # Zaya's router network
        (r"gate\.(down_proj\.(?:weight|bias))", r"router.\1", _same),
        (r"gate\.router_mlp\.((?:norm|fc1|fc2)\.(?:weight|bias))", r"router.\1", _same),
        (r"gate\.router_mlp\.out_proj\.weight", "router.weight", _same),
    )
]

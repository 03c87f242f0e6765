# SPDX-License-Identifier: Apache-2.0
"""Tiny models of each family, real architecture, random weights: outputs, gradients, generation before and after."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import hf
from .progress import progress
from .text import batch, standard_library
from .tolerance import bound, distance, experts_modules, layer_delta, nudged


@dataclass(frozen=True)
class Family:
    """Where a family lives in transformers and what its configuration calls our letters."""

    name: str
    config: str
    model: str
    width: str = "moe_intermediate_size"
    experts: str = "num_experts"
    extra: dict[str, Any] = field(default_factory=dict)


_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_GROUPS = {"n_group": 4, "topk_group": 2}
_DENSE_FIRST = {"first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4}

FAMILIES = {
    f.name: f
    for f in (
        Family(
            "mixtral", "MixtralConfig", "MixtralForCausalLM", width="intermediate_size", experts="num_local_experts"
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            extra={"intermediate_size": 48, "shared_expert_intermediate_size": 24},
        ),
        Family("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", extra={"head_dim": 16, "norm_topk_prob": True}),
        Family("olmoe", "OlmoeConfig", "OlmoeForCausalLM", width="intermediate_size"),
        Family(
            "deepseek_v2",
            "DeepseekV2Config",
            "DeepseekV2ForCausalLM",
            experts="n_routed_experts",
            extra={
                **_MLA,
                **_GROUPS,
                **_DENSE_FIRST,
                "topk_method": "group_limited_greedy",
                "routed_scaling_factor": 4.0,
            },
        ),
        Family(
            "deepseek_v3",
            "DeepseekV3Config",
            "DeepseekV3ForCausalLM",
            experts="n_routed_experts",
            extra={**_MLA, **_GROUPS, **_DENSE_FIRST, "routed_scaling_factor": 2.5},
        ),
        Family(
            "gpt_oss",
            "GptOssConfig",
            "GptOssForCausalLM",
            width="intermediate_size",
            experts="num_local_experts",
            extra={"head_dim": 16},
        ),
    )
}


def tiny_config(
    name: str, *, hidden: int = 64, width: int = 37, experts: int = 8, top_k: int = 2, layers: int = 2, **more: Any
) -> Any:
    """The family's own configuration class with a few small numbers in it."""
    family = FAMILIES[name]
    words: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "num_experts_per_tok": top_k,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        family.width: width,
        family.experts: experts,
    }
    words.update(family.extra)
    words.update(more)
    config = getattr(importlib.import_module("transformers"), family.config)(**words)
    config._experts_implementation = "eager"  # their default, grouped_mm, refuses odd widths on the CPU
    return config


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **words: Any) -> Any:
    """A tiny model of the family with random weights, routers and biases too, in evaluation mode."""
    config = tiny_config(name, **words)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(importlib.import_module("transformers"), FAMILIES[name].model)(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, 0.08)
                elif float(parameter.abs().max()) == 0.0:
                    parameter.normal_(0.0, 0.02)
    return model


@contextlib.contextmanager
def count_calls() -> Iterator[list[int]]:
    """The number of calls of our experts function while open, in a list of one, so that nothing is claimed unseen."""
    hf.register()
    registry = sys.modules[hf.MOE_MODULE].ALL_EXPERTS_FUNCTIONS
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        return hf.experts_forward(*args, **kwargs)

    registry.register(hf.NAME, counted)
    try:
        yield calls
    finally:
        registry.register(hf.NAME, hf.experts_forward)


def outputs_and_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, loss and the gradient of every parameter, by name."""
    model.zero_grad(set_to_none=True)
    result = model(input_ids=ids, labels=ids, use_cache=False)
    result.loss.backward()
    found = {"logits": result.logits.detach().clone(), "loss": result.loss.detach().clone()}
    found.update({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})
    return found


def compare(name: str, ids: torch.Tensor, *, new_tokens: int = 16, **words: Any) -> dict[str, Any]:
    """One family before ("eager", its own code) and after; `worst...` is the largest error as a share of its bound."""
    model = tiny_model(name, **words)
    text_config = model.config
    width = getattr(text_config, FAMILIES[name].width)
    delta = layer_delta(text_config.hidden_size, width, text_config.num_experts_per_tok)

    model.set_experts_implementation("eager")
    before = outputs_and_gradients(model, ids)
    nudges = []
    for seed in (1, 2):
        with nudged(model, delta, seed):
            nudges.append(outputs_and_gradients(model, ids))
    prompt = ids[:, :16]
    tokens_before = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)

    model.set_experts_implementation(hf.NAME)
    with count_calls() as calls:
        after = outputs_and_gradients(model, ids)
        forward_calls = calls[0]
        tokens_after = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)

    layers = len(experts_modules(model))
    worst, where = 0.0, "logits"
    for key, reference in before.items():
        limit = bound(reference, [nudge[key] for nudge in nudges], delta)
        error = distance(reference, after[key]) if key in after else float("inf")
        share = error / limit if limit > 0 else (0.0 if error == 0 else float("inf"))
        if share > worst:
            worst, where = share, key
    same_tokens = bool(torch.equal(tokens_before, tokens_after))
    ok = worst <= 1.0 and before.keys() == after.keys() and same_tokens and forward_calls == layers
    return {
        "family": name,
        "ok": ok,
        "moe_layers": layers,
        "layers_on_our_kernels": forward_calls,
        "gradients": len(before) - 2,
        "logits_error": distance(before["logits"], after["logits"]) / float(before["logits"].double().norm()),
        "worst_share_of_bound": worst,
        "worst_where": where,
        "generation_equal": same_tokens,
        "new_tokens": new_tokens,
        "delta": delta,
    }


def compare_all(*, quick: bool) -> list[dict[str, Any]]:
    """Every family on the same bytes of text."""
    ids = batch(standard_library(), 0, rows=2, length=32 if quick else 64)
    return [compare(name, ids, new_tokens=8 if quick else 24) for name in progress(list(FAMILIES), "models")]

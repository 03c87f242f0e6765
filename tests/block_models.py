# SPDX-License-Identifier: Apache-2.0
"""Tiny whole models of the families that Hugging Face's experts interface does not reach, from their own configs."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import nn

from moe_kernels.demo import families

transformers = importlib.import_module("transformers")

LANGUAGE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def switch(**more: Any) -> Any:
    words = {
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 21, "num_heads": 4, "num_layers": 2,
        "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4,
        "expert_capacity": 4,
        "dropout_rate": 0.0, "router_jitter_noise": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip
    config = transformers.SwitchTransformersConfig(**(words | more))
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb(**more: Any) -> Any:
    words = {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 21, "decoder_ffn_dim": 21, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2, "num_experts": 4, "expert_capacity": 8, "dropout": 0.0, "attention_dropout": 0.0,
        "activation_dropout": 0.0, "moe_token_dropout": 0.2, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
        "max_position_embeddings": 64, "decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": None,
        "bos_token_id": 0, "router_bias": False, "second_expert_policy": "all",
    }  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(transformers.NllbMoeConfig(**(words | more)))


def dbrx(**more: Any) -> Any:
    words = {
        "vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": 0,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 21, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    }  # fmt: skip
    return transformers.DbrxForCausalLM(transformers.DbrxConfig(**(words | more)))


def jetmoe(**more: Any) -> Any:
    words = LANGUAGE | {
        "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 21, "num_local_experts": 4,
        "num_experts_per_tok": 2, "activation_function": "silu",
    }  # fmt: skip
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**(words | more)))


def llama4(**more: Any) -> Any:
    words = LANGUAGE | {
        "intermediate_size": 21, "intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1, "head_dim": 8, "attn_temperature_tuning": False,
    }  # fmt: skip
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**(words | more)))


def longcat(**more: Any) -> Any:
    words = LANGUAGE | {
        "ffn_hidden_size": 24, "expert_ffn_hidden_size": 21, "n_routed_experts": 4, "zero_expert_num": 2,
        "moe_topk": 3, "num_experts_per_tok": 3, "num_layers": 2, "num_hidden_layers": 4,
        "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    return transformers.LongcatFlashForCausalLM(transformers.LongcatFlashConfig(**(words | more)))


MODELS = {
    "switch_transformers": switch,
    "nllb_moe": nllb,
    "dbrx": dbrx,
    "jetmoe": jetmoe,
    "llama4": llama4,
    "longcat_flash": longcat,
}
LAYERS = {"switch_transformers": 2, "nllb_moe": 2, "dbrx": 2, "jetmoe": 6, "llama4": 2, "longcat_flash": 2}
SEQ2SEQ = ("switch_transformers", "nllb_moe")


def build(family: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A tiny model with random weights, biases and routers, in evaluation mode."""
    torch.manual_seed(0)
    model = MODELS[family](**more).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2 or float(p.abs().max()) == 0.0:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.2 if p.dim() > 1 else 0.05))
    return model


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(3))


def run(model: Any, **more: Any) -> dict[str, torch.Tensor]:
    """Logits, loss, router logits and aux loss where the model has them, and every gradient (none counts as 0)."""
    model.zero_grad(set_to_none=True)
    result = model(input_ids=tokens(), labels=tokens(), use_cache=False, **more)
    result.loss.backward()
    found = {"logits": result.logits, "loss": result.loss}
    for name in ("aux_loss", "encoder_aux_loss", "decoder_aux_loss", "encoder_z_loss", "decoder_z_loss"):
        if isinstance(result.get(name), torch.Tensor):
            found[name] = result[name]
    for name in ("router_logits", "encoder_router_logits", "decoder_router_logits"):
        for i, t in enumerate(result.get(name) or ()):
            for j, part in enumerate(t if isinstance(t, tuple) else (t,)):
                found[f"{name}.{i}.{j}"] = part
    found = {name: t.detach().clone() for name, t in found.items()}
    for name, p in model.named_parameters():
        found["grad " + name] = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
    return found


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], eps: float) -> None:
    """Within 64 eps of the largest element; a gradient also within 64 eps of a hundredth of the largest one.

    The second is for gradients that are zero but for rounding, as that of a bias in front of a softmax.
    """
    assert before.keys() == after.keys()
    largest = max((float(t.abs().max()) for name, t in before.items() if name.startswith("grad ")), default=0.0)
    for name, wanted in before.items():
        floor = 1e-2 * largest if name.startswith("grad ") else 1e-12
        bound = 64 * eps * max(float(wanted.abs().max()), floor)
        off = float((after[name] - wanted).abs().max())
        assert off <= bound, f"{name}: off by {off:.3g}, bound {bound:.3g}"


def clone(model: Any) -> Any:
    return copy.deepcopy(model)


def mixtral(dtype: torch.dtype = torch.float64, **words: Any) -> Any:
    return families.tiny_model("mixtral", dtype=dtype, **words)


def fingerprint(model: nn.Module) -> list[Any]:
    """Every module by identity with its class, own attributes and parameters, and every config's choice."""
    found: list[Any] = []
    for name, m in model.named_modules():
        plain = {k: id(v) for k, v in vars(m).items() if not k.startswith("_")}
        parameters = [(n, id(p)) for n, p in m.named_parameters(recurse=False)]
        choice = getattr(getattr(m, "config", None), "_experts_implementation", None)
        found.append((name, id(m), type(m), plain, parameters, sorted(vars(m)), choice))
    return found

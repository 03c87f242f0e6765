# SPDX-License-Identifier: Apache-2.0
"""The table of Hugging Face families: what the config of each model_type says, in the words of MoELayer.

A row holds names of the config's attributes, and functions of the config from `readers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..routers import SparseMixer
from . import readers
from .readers import Arguments, Config, after, first, sigmoid, softmax, stepped, typed


@dataclass(frozen=True)
class Shared:
    """Shared experts: the names of their width, of their number (None: one), of whether they have biases."""

    width: str = "moe_intermediate_size"
    count: str | None = None
    bias: str | None = None
    gate: bool = False
    """weighed by sigmoid(shared_expert_gate(x))"""


@dataclass(frozen=True)
class Family:
    """A row of the table."""

    router: Callable[[Config], Any]
    layers: Callable[[Config, int], bool] = lambda c, i: True
    """whether decoder layer i is MoE"""
    shared: Shared | None = None
    width: str = "moe_intermediate_size"
    """the name of the experts' width"""
    activation: str | None = "hidden_act"
    """its name; None: silu"""
    adapt: Callable[[Config, int, Arguments, Arguments], None] | None = None
    """(config, layer, arguments of MoELayer to change, {device, dtype} of new modules)"""
    gated: bool = True
    top_k: int | None = None
    """None: the config says it"""
    depth: str = "num_hidden_layers"
    noise: str | None = None
    """the name of a noise that training multiplies into the block's input"""
    note: str = ""
    """what the block does that is left to the caller"""


# ---- the table

COUNTED = Shared(count="n_shared_experts")
NUMBERED = Shared(count="num_shared_experts")
ONE = Shared("shared_expert_intermediate_size")
ONE_GATED = Shared("shared_expert_intermediate_size", gate=True)
GRANITE = Shared("shared_intermediate_size")
DENSE = "intermediate_size"
FIRST_DENSE = after("first_k_dense_replace")
V3 = sigmoid("norm_topk_prob", groups=True)
ERNIE = softmax(True, correction_bias=True, dtype="float32")
MINIMAX = sigmoid(True, renormalize_eps=0.0, dtype="input")
MISTRAL = readers.grouped_softmax

FAMILIES: dict[str, Family] = {
    "afmoe": Family(sigmoid(True, dtype="input"), after("num_dense_layers"), NUMBERED),
    "aria_text": Family(softmax(True), width=DENSE, activation=None, adapt=readers.aria),
    "axk1": Family(V3, typed, COUNTED, note="post_mlp_layernorm on the block's output"),
    "axk2": Family(V3, typed, COUNTED),
    "bailing_hybrid": Family(V3, typed, COUNTED),
    "beam": Family(V3, typed),
    "cohere2_moe": Family(
        readers.cohere, typed, Shared(DENSE, "num_shared_experts"), DENSE, adapt=readers.cohere_average
    ),
    "deepseek_ocr2_text": Family(readers.deepseek_v2, typed, Shared(count="n_shared_experts", bias="mlp_bias")),
    "deepseek_v2": Family(readers.deepseek_v2, FIRST_DENSE, Shared(count="n_shared_experts", bias="mlp_bias")),
    "deepseek_v3": Family(V3, FIRST_DENSE, COUNTED),
    "deepseek_v32": Family(V3, typed, COUNTED),
    "deepseek_v4": Family(readers.by_scoring_func, typed, Shared(bias="mlp_bias"), adapt=readers.deepseek_v4),
    "diffusion_gemma_text": Family(softmax(True), activation="hidden_activation", adapt=readers.gemma),
    "dots1": Family(V3, FIRST_DENSE, COUNTED),
    "dots3_note_text": Family(V3, typed, Shared("shared_experts_intermediate_size", "n_shared_experts")),
    "dots3_note_vision_encoder": Family(sigmoid(True), typed),
    "ernie4_5_moe": Family(ERNIE, readers.ernie, Shared(count="moe_num_shared_experts", bias="use_bias")),
    "ernie4_5_vl_moe_text": Family(
        ERNIE,
        typed,
        Shared(count="moe_num_shared_experts", bias="use_bias"),
        note="the routed experts of image tokens: a second layer, of width moe_intermediate_size[1]",
    ),
    "exaone_moe": Family(V3, typed, NUMBERED),
    "flex_olmo": Family(softmax("norm_topk_prob"), width=DENSE),
    "flint": Family(sigmoid("norm_topk_prob", renormalize_eps=0.0, correction_bias=False), stepped, ONE),
    "gemma4_text": Family(
        softmax(True),
        lambda c, i: bool(c.enable_moe_block),
        activation="hidden_activation",
        adapt=readers.gemma,
        note="the dense MLP beside it, and all norms but those around the experts",
    ),
    "glm4_moe": Family(V3, FIRST_DENSE, COUNTED),
    "glm4_moe_lite": Family(V3, typed, COUNTED),
    "glm4v_moe_text": Family(V3, FIRST_DENSE, COUNTED),
    "glm5_next_text": Family(V3, typed, COUNTED, adapt=readers.clamped),
    "glm_moe_dsa": Family(V3, typed, COUNTED),
    "gpt_oss": Family(softmax(True, bias=True), width=DENSE, activation=None, adapt=readers.gpt_oss),
    "granitemoe": Family(softmax(True), width=DENSE),
    "granitemoe_swa": Family(softmax(True), shared=GRANITE, width=DENSE),
    "granitemoehybrid": Family(softmax(True), shared=GRANITE, width=DENSE),
    "granitemoeshared": Family(softmax(True), shared=GRANITE, width=DENSE),
    "hunyuan_v1_moe": Family(softmax(True, dtype="float32"), shared=Shared(DENSE), width=DENSE),
    "hy_v3": Family(sigmoid(True), typed, Shared(count="num_shared_experts", bias="mlp_bias")),
    "hy_v4": Family(V3, typed, adapt=readers.clamped_experts),
    "inkling_text": Family(softmax(True), typed, adapt=readers.inkling),
    "inkling2_text": Family(readers.by_scoring_func, adapt=readers.inkling2),
    "jamba": Family(softmax(False), readers.jamba_step, width=DENSE),
    "kimi_linear": Family(V3, typed, COUNTED),
    "kolibri1": Family(sigmoid("norm_topk_prob", renormalize_eps=0.0), shared=ONE, adapt=readers.kolibri),
    "laguna": Family(readers.laguna, typed, ONE),
    "lfm2_moe": Family(readers.lfm2, after("num_dense_layers"), activation=None),
    "mellum": Family(softmax("norm_topk_prob"), typed),
    "mimo_v2_flash": Family(V3, typed),
    "minimax": Family(softmax(True), width=DENSE, noise="router_jitter_noise"),
    "minimax_m2": Family(MINIMAX, width=DENSE, noise="router_jitter_noise"),
    "minimax_m3_vl_text": Family(MINIMAX, typed, GRANITE, DENSE, activation=None, adapt=readers.swigluoai),
    "mistral4": Family(MISTRAL("norm_topk_prob", "input"), FIRST_DENSE, COUNTED),
    "mistral_large4_text": Family(MISTRAL(True, "float32"), typed, COUNTED),
    "mixtral": Family(softmax(True), width=DENSE, noise="router_jitter_noise"),
    "muse_spark_text": Family(sigmoid(True, renormalize_eps=1e-15), typed, adapt=readers.muse_spark),
    "nemotron_h": Family(
        V3,
        lambda c, i: first(c, "layers_block_type")[i] == "moe",
        Shared("moe_shared_expert_intermediate_size", bias="mlp_bias"),
        activation="mlp_hidden_act",
        gated=False,
        adapt=readers.nemotron,
    ),
    "olmoe": Family(softmax("norm_topk_prob"), width=DENSE),
    "openai_privacy_filter": Family(
        softmax(True, bias=True, dtype="float32"), width=DENSE, activation=None, adapt=readers.privacy_filter
    ),
    "phimoe": Family(lambda c: SparseMixer(first(c, "router_jitter_noise")), width=DENSE, noise="input_jitter_noise"),
    "qwen2_moe": Family(softmax("norm_topk_prob"), stepped, ONE_GATED),
    "qwen3_5_moe_text": Family(softmax(True), shared=ONE_GATED),
    "qwen3_moe": Family(softmax("norm_topk_prob"), stepped),
    "qwen3_next": Family(softmax("norm_topk_prob"), stepped, ONE_GATED),
    "qwen3_omni_moe_text": Family(softmax("norm_topk_prob"), stepped),
    "qwen3_omni_moe_talker_text": Family(softmax("norm_topk_prob"), shared=ONE_GATED),
    "qwen3_vl_moe_text": Family(softmax(True), stepped),
    "qwen4_exp_text": Family(softmax("norm_topk_prob"), shared=ONE_GATED),
    "solar_open": Family(V3, shared=COUNTED),
    "unlimited_ocr_text": Family(readers.deepseek_v2, typed, Shared(count="n_shared_experts", bias="mlp_bias")),
    "zaya": Family(softmax(False), adapt=readers.zaya),
    # not behind the experts interface
    "dbrx": Family(
        readers.dbrx, width="ffn_hidden_size", activation=None, adapt=readers.dbrx_activation, noise="moe_jitter_eps"
    ),
    "jetmoe": Family(
        softmax(True),
        width=DENSE,
        activation="activation_function",
        adapt=readers.jetmoe,
        note="the MoE of its attention",
    ),
    "llama4_text": Family(
        sigmoid(False, correction_bias=False, dtype="input", weight_on_input=True),
        lambda c, i: i in first(c, "moe_layers"),
        Shared(DENSE),
        DENSE,
    ),
    "longcat_flash": Family(
        softmax(False, correction_bias=True, dtype="float32"),
        width="expert_ffn_hidden_size",
        depth="num_layers",
        adapt=readers.longcat,
    ),
    "step3p5": Family(MINIMAX, typed, adapt=readers.step3p5),
    "switch_transformers": Family(
        readers.switch_router,
        readers.switch_step,
        width="d_ff",
        top_k=1,
        activation="dense_act_fn",
        gated=False,
        adapt=readers.switch,
    ),
}

REFUSED = {
    "doge": "its experts are single rows of two embeddings, found by product keys: no expert MLPs",
    "nllb_moe": "its module in transformers 5.23.0 takes a one-hot mask for expert ids, so that every token passes "
    "experts 0 and 1 and no other: there is nothing to follow. The layer of the paper is MoELayer(..., top_k=2, "
    "gated=False, bias=True, activation='relu', capacity=Capacity(..., renormalize_after_drop=True))",
    "vitpose_backbone": "the data set of an image chooses its expert, no router",
}
"""Why a family with experts has no row."""

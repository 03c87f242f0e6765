# SPDX-License-Identifier: Apache-2.0
"""Published Mixture-of-Experts models: their dimensions, router, losses and capacity, and their count of parameters.

presets.get("deepseek-v3").total_params()          MoELayer.from_preset("deepseek-v3", device="meta")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from . import losses as L
from .capacity import Capacity
from .routers import Router


class Attention(Protocol):
    """The attention of a model, as far as its parameters go."""

    def params(self, hidden_size: int) -> int:
        """Of one layer."""
        ...


@dataclass(frozen=True)
class GroupedQuery:
    """Attention with num_heads queries and num_kv_heads keys and values."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: int = 0
    """parameters of the norms of queries and keys"""
    bias: bool = False
    sinks: bool = False

    def params(self, hidden_size: int) -> int:
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        extra = (queries + 2 * keys + hidden_size if self.bias else 0) + (self.num_heads if self.sinks else 0)
        return 2 * hidden_size * (queries + keys) + self.qk_norm + extra


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek). q_rank None: queries are not compressed."""

    num_heads: int
    q_rank: int | None
    kv_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    v_dim: int = 128

    def params(self, hidden_size: int) -> int:
        H, heads, q, kv = hidden_size, self.num_heads, self.q_rank, self.kv_rank
        query = heads * (self.nope_dim + self.rope_dim)
        queries = H * query if q is None else H * q + q + q * query
        keys = H * (kv + self.rope_dim) + kv + kv * heads * (self.nope_dim + self.v_dim)
        return queries + keys + heads * self.v_dim * H


@dataclass(frozen=True)
class EncoderDecoder:
    """T5: self-attention in every layer, and attention to the encoder in the second half of them."""

    num_heads: int
    head_dim: int

    def params(self, hidden_size: int) -> int:
        return 6 * hidden_size * self.num_heads * self.head_dim  # 4 in an encoder layer, 8 in a decoder one


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published model: what one of its MoE layers is (`layer_kwargs`), and the sizes of the rest of it."""

    name: str
    source: str
    num_layers: int
    num_moe_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    attention: Attention
    vocab_size: int
    router: Router
    num_shared_experts: int = 0
    dense_intermediate_size: int = 0
    """of the layers without experts"""
    tied_embeddings: bool = False
    norms: float = 2
    """norms of a layer, H each (T5: 2 in the encoder, 3 in the decoder)"""
    final_norms: int = 1
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    capacity: Capacity | None = None
    losses: tuple[L.Loss, ...] = ()
    init: str = "normal"

    def layer_kwargs(self) -> dict[str, Any]:
        """The arguments of `MoELayer` for one of its MoE layers."""
        names = ("hidden_size", "intermediate_size", "num_experts", "top_k", "router", "activation", "gated", "bias",
                 "num_shared_experts", "capacity", "losses", "init")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def total_params(self) -> int:
        """Parameters of the whole model, without modules for multi-token prediction."""
        return self._params(self.num_experts)

    def active_params(self, *, embedding: bool = True) -> int:
        """Parameters that take part for one token: K experts of every layer, all routers and the head.

        embedding: False leaves out the embedding table, of which a token reads one row, as some publications do.
        """
        table = 0 if embedding or self.tied_embeddings else self.vocab_size * self.hidden_size
        return self._params(self.top_k) - table

    def _params(self, experts: int) -> int:
        H, per_unit = self.hidden_size, 3 if self.gated else 2
        expert = per_unit * H * self.intermediate_size
        expert += (per_unit - 1) * self.intermediate_size + H if self.bias else 0
        router = self.num_experts * (H + self.router.bias + self.router.correction_bias)
        shared = self.num_shared_experts * per_unit * H * self.intermediate_size
        moe = self.num_moe_layers * (router + shared + experts * expert)
        dense = (self.num_layers - self.num_moe_layers) * per_unit * H * self.dense_intermediate_size
        layers = self.num_layers * self.attention.params(H) + int(self.num_layers * self.norms) * H
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * H
        return layers + dense + moe + embeddings + self.final_norms * H


# ---- Switch Transformers: Fedus et al. 2021 (arXiv 2101.03961), table 9

_SWITCH: dict[str, Any] = {
    "source": "arXiv 2101.03961", "top_k": 1, "vocab_size": 32128, "norms": 2.5, "final_norms": 2,
    "activation": "relu", "gated": False, "router": Router(renormalize=False, input_jitter=0.01),
    "capacity": Capacity(1.25, eval_factor=2.0), "losses": (L.Switch(0.01),), "init": "fan_in",
}  # fmt: skip

# ---- those of one balance loss over all slots, not divided by K

_HF_LOSS = {coef: (L.Switch(coef, divide_by_k=False),) for coef in (0.02, 0.001)}

_PRESETS = (
    Preset(
        name="switch-base-128", num_layers=24, num_moe_layers=12, hidden_size=768, intermediate_size=3072,
        num_experts=128, attention=EncoderDecoder(12, 64), dense_intermediate_size=3072, tied_embeddings=True,
        **_SWITCH,
    ),
    Preset(
        name="switch-large-128", num_layers=48, num_moe_layers=24, hidden_size=1024, intermediate_size=4096,
        num_experts=128, attention=EncoderDecoder(16, 64), dense_intermediate_size=4096, tied_embeddings=True,
        **_SWITCH,
    ),
    Preset(
        name="switch-xxl", num_layers=48, num_moe_layers=24, hidden_size=4096, intermediate_size=10240,
        num_experts=128, attention=EncoderDecoder(64, 64), dense_intermediate_size=10240,
        **_SWITCH | {"activation": "gelu_tanh", "gated": True, "capacity": Capacity(1.25, eval_factor=4.0)},
    ),
    Preset(
        name="switch-c", num_layers=30, num_moe_layers=30, hidden_size=2080, intermediate_size=6144, num_experts=2048,
        attention=EncoderDecoder(32, 64), **_SWITCH,
    ),
    Preset(
        name="mixtral-8x7b", source="arXiv 2401.04088", num_layers=32, num_moe_layers=32, hidden_size=4096,
        intermediate_size=14336, num_experts=8, top_k=2, attention=GroupedQuery(32, 8, 128), vocab_size=32000,
        router=Router(), losses=_HF_LOSS[0.02],
    ),
    Preset(
        name="deepseek-v2", source="arXiv 2405.04434", num_layers=60, num_moe_layers=59, hidden_size=5120,
        intermediate_size=1536, num_experts=160, top_k=6, num_shared_experts=2, dense_intermediate_size=12288,
        attention=Latent(128, 1536), vocab_size=102400,
        router=Router(renormalize=False, num_expert_group=8, topk_group=3, routed_scaling_factor=16.0,
                      scale_when_renormalized=False),
        losses=(L.DeepSeekV2Expert(0.003), L.DeepSeekV2Device(0.05), L.DeepSeekV2Comm(0.02)),
    ),
    Preset(
        name="deepseek-v2-lite", source="arXiv 2405.04434", num_layers=27, num_moe_layers=26, hidden_size=2048,
        intermediate_size=1408, num_experts=64, top_k=6, num_shared_experts=2, dense_intermediate_size=10944,
        attention=Latent(16, None), vocab_size=102400,
        router=Router(renormalize=False, scale_when_renormalized=False), losses=(L.DeepSeekV2Expert(0.001),),
    ),
    Preset(
        name="deepseek-v3", source="arXiv 2412.19437", num_layers=61, num_moe_layers=58, hidden_size=7168,
        intermediate_size=2048, num_experts=256, top_k=8, num_shared_experts=1, dense_intermediate_size=18432,
        attention=Latent(128, 1536), vocab_size=129280,
        router=Router(scoring_func="sigmoid", correction_bias=True, num_expert_group=8, topk_group=4,
                      routed_scaling_factor=2.5),
        losses=(L.DeepSeekV3(1e-4),),
    ),
    Preset(
        name="grok-1", source="github.com/xai-org/grok-1", num_layers=64, num_moe_layers=64, hidden_size=6144,
        intermediate_size=32768, num_experts=8, top_k=2, attention=GroupedQuery(48, 8, 128), vocab_size=131072,
        tied_embeddings=True, norms=4, activation="gelu_tanh", router=Router(renormalize=False), init="zero_router",
    ),
    Preset(
        name="qwen3-30b-a3b", source="arXiv 2505.09388", num_layers=48, num_moe_layers=48, hidden_size=2048,
        intermediate_size=768, num_experts=128, top_k=8, attention=GroupedQuery(32, 4, 128, qk_norm=256),
        vocab_size=151936, router=Router(), losses=_HF_LOSS[0.001],
    ),
    Preset(
        name="olmoe-1b-7b", source="arXiv 2409.02060", num_layers=16, num_moe_layers=16, hidden_size=2048,
        intermediate_size=1024, num_experts=64, top_k=8, attention=GroupedQuery(16, 16, 128, qk_norm=4096),
        vocab_size=50304, router=Router(renormalize=False),
        losses=(L.Switch(0.01, divide_by_k=False), L.ZLoss(0.001)),
    ),
    Preset(
        name="gpt-oss-20b", source="arXiv 2508.10925", num_layers=24, num_moe_layers=24, hidden_size=2880,
        intermediate_size=2880, num_experts=32, top_k=4, attention=GroupedQuery(64, 8, 64, bias=True, sinks=True),
        vocab_size=201088, router=Router(bias=True), activation="swigluoai", bias=True,
    ),
)  # fmt: skip
_BY_NAME = {preset.name: preset for preset in _PRESETS}


def names() -> tuple[str, ...]:
    """Of all presets."""
    return tuple(_BY_NAME)


def get(name: str) -> Preset:
    """A preset by its name.

    Errors: ValueError that lists the names.
    """
    if name not in _BY_NAME:
        raise ValueError(f"presets.get: name must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]

# SPDX-License-Identifier: Apache-2.0
"""Named layer sizes. H hidden, I expert width, E experts, K experts a token; from the published config.json."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    name: str
    H: int
    I: int
    E: int
    K: int
    source: str
    act: str = "silu"
    groups: tuple[int, int] | None = None  # num_expert_group, topk_group

    @property
    def gated(self) -> bool:
        return self.act == "silu"

    @property
    def matrices(self) -> int:
        """H x I matrices of an expert: gate, up and down, or up and down."""
        return 3 if self.gated else 2

    def weight_bytes(self, dtype: torch.dtype) -> int:
        return self.matrices * self.E * self.H * self.I * dtype.itemsize


SHAPES = {
    s.name: s
    for s in (
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, "Qwen/Qwen3-30B-A3B config.json"),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2, "mistralai/Mixtral-8x7B-v0.1 config.json"),
        Shape("olmoe-1b-7b", 2048, 1024, 64, 8, "allenai/OLMoE-1B-7B-0924 config.json"),
        Shape("deepseek-v2-lite", 2048, 1408, 64, 6, "deepseek-ai/DeepSeek-V2-Lite config.json"),
        Shape("deepseek-v3", 7168, 2048, 256, 8, "deepseek-ai/DeepSeek-V3 config.json", groups=(8, 4)),
        Shape("switch-base-64", 768, 3072, 64, 1, "google/switch-base-64 config.json", act="relu"),
        Shape("switch-base-128", 768, 3072, 128, 1, "google/switch-base-128 config.json", act="relu"),
    )
}
QWEN3, MIXTRAL = SHAPES["qwen3-30b-a3b"], SHAPES["mixtral-8x7b"]


def routed(shape: Shape, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_ids int64 [T, K], distinct in a row, and normalised topk_weights float32 [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    values, ids = torch.rand(tokens, shape.E, generator=generator).topk(shape.K)
    return ids, values / values.sum(-1, keepdim=True)

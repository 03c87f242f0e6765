# SPDX-License-Identifier: Apache-2.0
"""What the way into the op costs on one token of a tiny layer: Hugging Face's switch against fused_experts itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_kernels import hf
from moe_kernels.demo import families, tolerance


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_hook(against: Callable[..., float], monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """The difference of the two columns is the overhead; the aim is below 0.020 ms."""
    pytest.importorskip("transformers")
    module = tolerance.experts_modules(families.tiny_model(family, hidden=32, width=32))[0]
    inputs = torch.randn(1, 32), torch.tensor([[0, 1]]), torch.rand(1, 2)
    said: list[Any] = []
    op = hf.experts.ops.fused_experts
    monkeypatch.setattr(hf.experts.ops, "fused_experts", lambda *a, **o: said.append((a, o)) or op(*a, **o))
    hf.experts_forward(module, *inputs)
    monkeypatch.undo()
    arguments, options = said[0]
    with torch.no_grad():
        against(
            lambda: hf.experts_forward(module, *inputs), lambda: op(*arguments, **options), "fused_experts", rounds=500
        )

# SPDX-License-Identifier: Apache-2.0
"""A golden vector: one file of tests/golden, and the comparisons within its own tolerance."""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open


class Vector:
    """One file: tensors by name, `config`, and its tolerance."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
        self.stem, self.config = path.stem, json.loads(meta.get("config", "{}"))
        text = meta.get("tolerance", "")
        self.atol = float(m[1]) if (m := re.search(r"atol ([\d.e+-]+)", text)) else 1e-5
        self.rtol = float(m[1]) if (m := re.search(r"rtol ([\d.e+-]+)", text)) else 1e-4

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def param(self, *names: str) -> torch.Tensor:
        """The first of these parameters that is there, as a leaf that its gradient will be compared for."""
        name = next(n for n in names if "param." + n in self)
        leaf = self["param." + name].clone().requires_grad_()
        self.leaves[name] = leaf
        return leaf

    leaves: dict[str, torch.Tensor]

    def close(self, actual: torch.Tensor, name: str) -> None:
        wanted = self[name]
        assert actual.shape == wanted.shape, name
        assert torch.allclose(actual, wanted, rtol=self.rtol, atol=self.atol), (
            f"{self.stem}: {name} differs by {float((actual - wanted).abs().max()):.3g}"
        )
        if wanted.numel():  # the twin: the same comparison does notice four times its tolerance
            moved = actual.detach().contiguous().clone()
            at = int(wanted.abs().argmax())
            moved.view(-1)[at] = wanted.reshape(-1)[at] + 4 * (self.atol + self.rtol * wanted.reshape(-1)[at].abs())
            assert not torch.allclose(moved, wanted, rtol=self.rtol, atol=self.atol), name

    def same(self, actual: torch.Tensor, name: str) -> None:
        assert torch.equal(actual.long(), self[name].long().reshape(actual.shape)), f"{self.stem}: {name} differs"


def compare_loss(v, loss, inputs, name):
    value = loss(inputs)
    v.close(value.detach().reshape(1), name)
    (grad,) = torch.autograd.grad(value, inputs.logits)
    v.close(grad.reshape(v["grad_logits_" + name].shape), "grad_logits_" + name)

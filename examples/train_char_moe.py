# SPDX-License-Identifier: Apache-2.0
"""Five ways to balance experts, side by side: a byte-level language model trained on a CPU within two minutes.

    python examples/train_char_moe.py --out char_moe.png

The text is the source of Python's standard library. The model: the last bytes, embedded and mixed by causal
convolutions, and two MoE layers of 8 experts; all runs start from the same weights and see the same batches. The router
starts with a preference for its first experts, as happens by bad luck in larger models: what is then done about it is
the lesson. It prints loss and balance of every run and draws their load.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_kernels as mk
from moe_kernels import losses, routers
from moe_kernels.demo.text import batch, standard_library

HIDDEN, WIDTH, EXPERTS, LAYERS, CONTEXT = 96, 128, 8, 2, 8

RUNS: dict[str, dict[str, Any]] = {  # name -> arguments of MoELayer
    "no balancing": {"top_k": 1, "router": routers.Router(renormalize=False)},
    "aux loss": {"top_k": 1, "router": routers.Router(renormalize=False), "losses": losses.Switch(0.02)},
    "loss-free bias": {"top_k": 1, "router": routers.Router(renormalize=False, correction_bias=True)},
    "expert choice": {"top_k": 1, "router": routers.ExpertChoice(group="sequence")},
    "hash": {"top_k": 1, "router": routers.Hash(256, seed=1)},
}


class Block(nn.Module):
    """Mix the last CONTEXT positions, then an MoE layer; both with a residual."""

    def __init__(self, **moe: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.mix = nn.Conv1d(HIDDEN, HIDDEN, CONTEXT, groups=4)
        self.moe = mk.MoELayer(HIDDEN, WIDTH, EXPERTS, **moe)

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        past = F.pad(self.norm1(x).mT, (CONTEXT - 1, 0))
        x = x + F.silu(self.mix(past)).mT
        return x + self.moe(self.norm2(x), token_ids=token_ids)


class ByteModel(nn.Module):
    """Bytes [B, S] -> logits of the next one [B, S, 256]."""

    def __init__(self, **moe: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, HIDDEN)
        self.blocks = nn.ModuleList(Block(**moe) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, tokens)
        return self.head(self.norm(x))

    def aux_loss(self) -> Tensor:
        return torch.stack([block.moe.aux_loss for block in self.blocks]).sum()


def unlucky(model: ByteModel) -> None:
    """The same start for every run: weights by name, and routers that prefer their first experts."""
    for name, p in model.named_parameters():
        g = torch.Generator().manual_seed(sum(name.encode()))
        with torch.no_grad():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=g) * (0.3 if name == "embed.weight" else p.shape[-1] ** -0.5))
            if name.endswith("router.weight"):
                direction = torch.randn(HIDDEN, generator=g)
                p.mul_(0.3).add_(torch.linspace(1.0, -1.0, EXPERTS)[:, None] * direction * 0.05)


def train(name: str, text: Tensor, steps: int, rows: int, length: int) -> dict[str, Any]:
    """One run: the loss of held-out text and a Monitor."""
    torch.manual_seed(0)
    model = ByteModel(**RUNS[name])
    unlucky(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    monitor, balance = mk.Monitor(model, every=5), mk.Balance(model, rate=0.01)
    held_out = text[-(1 << 16) :]
    for step in range(steps):
        tokens = batch(text[: -(1 << 16)], step, rows, length + 1)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        (loss + model.aux_loss()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        monitor.step()
        balance.step()
    model.eval()
    with torch.no_grad():
        tokens = torch.cat([batch(held_out, -1 - i, rows, length + 1) for i in range(8)])
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    return {"loss": float(loss), "monitor": monitor}


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """A column a run: the load of the first layer over time, above what is left of it at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from moe_kernels import plots

    figure = Figure(figsize=(4.2 * len(results), 7), layout="constrained")
    FigureCanvasAgg(figure)
    for (name, result), (over_time, heat) in zip(results.items(), figure.subplots(2, len(results)).T):
        plots.load_over_time(over_time, result["monitor"])
        over_time.set_title(f"{name}: loss {result['loss']:.3f}")
        plots.load_map(heat, result["monitor"], last=5)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("char_moe.png"))
    asked = parser.parse_args()
    text, results, started = standard_library(), {}, time.perf_counter()
    print(
        f"{asked.steps} steps of {asked.rows} x {asked.length} bytes, {LAYERS} MoE layers of {EXPERTS} experts, top-1"
    )
    print(f"{'':<16}{'held-out loss':>14}{'MaxVio':>9}{'entropy':>9}{'dead':>6}")
    for name in RUNS:
        result = results[name] = train(name, text, asked.steps, asked.rows, asked.length)
        monitor = result["monitor"]
        last = monitor.records[-5 * LAYERS :]
        mean = {what: sum(r[what] for r in last) / len(last) for what in ("max_violation", "entropy")}
        dead = sum(r["dead"] for r in monitor.records[-LAYERS:])
        print(f"{name:<16}{result['loss']:>14.3f}{mean['max_violation']:>9.2f}{mean['entropy']:>9.3f}{dead:>6}",
              flush=True)  # fmt: skip
        for alert in monitor.alerts():
            print(f"    {alert}")
    draw(results, asked.out)
    print(f"{time.perf_counter() - started:.0f} s; picture: {asked.out}")


if __name__ == "__main__":
    main()

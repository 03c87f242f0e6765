# SPDX-License-Identifier: Apache-2.0
"""What a `Monitor` costs of a training step: steps with one and without, in turn, by the clock and by processor time.

The bar is 2 % of the step. Processor time counts what all threads of this process did, whatever else the machine runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels.watch import Seen

SIZES = [(256, 512, 64, 8, 1024), (256, 512, 16, 2, 1024), (96, 128, 8, 1, 2048)]  # H, I, E, K, T
LAYERS, ROUNDS, BAR = 2, 13, 0.02


class Layers(nn.Module):
    def __init__(self, H: int, I: int, E: int, K: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mk.MoELayer(H, I, E, K, losses="switch") for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def medians(sides: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """Milliseconds of the clock and of the processor, of every side; one after the other, round by round."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, run in sides.items():
            clock, processor = time.perf_counter(), time.process_time()
            run()
            seen[name].append((1e3 * (time.perf_counter() - clock), 1e3 * (time.process_time() - processor)))
    return {name: (statistics.median(t[0] for t in v[3:]), statistics.median(t[1] for t in v[3:]))
            for name, v in seen.items()}  # fmt: skip


@pytest.mark.parametrize(("H", "I", "E", "K", "T"), SIZES)
def test_monitor(H: int, I: int, E: int, K: int, T: int, remember: Callable[..., None]) -> None:
    """Every step watched; with every=n it is an n-th of this."""
    torch.manual_seed(0)
    model, x = Layers(H, I, E, K), torch.randn(T, H)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    monitor = mk.Monitor(model)
    own: list[float] = []  # processor time inside the monitor
    see = monitor._watch.callback

    def timed(seen: Seen) -> None:
        started = time.process_time()
        see(seen)
        own[-1] += time.process_time() - started

    def step(callback: Callable[[Seen], None]) -> None:
        monitor._watch.callback = callback
        y = model(x).square().mean()
        (y + torch.stack([layer.aux_loss for layer in model.layers]).sum()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def watched() -> None:
        own.append(0.0)
        step(timed)
        started = time.process_time()
        monitor.step()
        own[-1] += time.process_time() - started

    found = medians({"with": watched, "without": lambda: step(lambda seen: None)})
    (clock, processor), (clock0, processor0) = found["with"], found["without"]
    share = 1e3 * statistics.median(own[3:]) / processor0
    name = f"monitor, E={E} K={K} T={T} H={H}"
    remember(f"{name}: step by the clock, with : without", clock, clock0, "ms")
    remember(f"{name}: step by processor time, with : without", processor, processor0, "ms")
    remember(f"{name}: inside, of the step's processor time", 100 * share, 100 * BAR, "%")
    assert len(monitor.records) == LAYERS * ROUNDS

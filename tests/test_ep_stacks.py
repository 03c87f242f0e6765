# SPDX-License-Identifier: Apache-2.0
"""`ExpertParallel` inside the stacks people use: all routers, DDP, FSDP2, recomputation, compile, checkpoints."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import closeness
import ep_stacks
import processes
import pytest
import torch
from torch.distributed.checkpoint import load

import moe_kernels as mk
from moe_kernels import expert_parallel
from moe_kernels.expert_parallel import engine

ROOT = Path(__file__).resolve().parents[1]


def test_around_a_layer_and_inside_others(tmp_path: Path) -> None:
    """Two ranks: twelve kinds of layer; DDP, recomputation, FSDP2, compile; mixed requires_grad; gradcheck; threads."""
    expected = {"every_router": 12, "data_parallel": 5, "who_wants_gradients": 1, "exact_gradients": 4, "threads": 2}
    assert processes.run("ep_stacks:everything", tmp_path) == [expected] * 2


def test_experts_sharded_over_data_too(tmp_path: Path) -> None:
    assert processes.run("ep_stacks:two_dimensions", tmp_path, world=4) == [1] * 4


def test_a_checkpoint_changes_the_number_of_ranks(tmp_path: Path) -> None:
    """Written by four ranks, read by two, and by one that has a plain layer."""
    processes.run("ep_stacks:save_from", tmp_path, world=4)
    assert processes.run("ep_stacks:load_into", tmp_path, world=2) == [1, 1]
    model = ep_stacks.Model(False)
    for p in model.parameters():
        p.data.zero_()
    state = model.state_dict()
    load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    for name, value in ep_stacks.Model(False).state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("chunks", range(1, 9))
def test_schedule(chunks: int) -> None:
    """R20: every exchange and product once, a chunk's in order, and no more than two dispatches ahead of a combine."""
    order = engine.schedule(chunks)
    assert sorted(order) == sorted((what, i) for what in ("dispatch", "experts", "combine") for i in range(chunks))
    for i in range(chunks):
        assert order.index(("dispatch", i)) < order.index(("experts", i)) < order.index(("combine", i))
        if i + 1 < chunks:  # the next rows are on their way before this chunk is computed
            assert order.index(("dispatch", i + 1)) < order.index(("experts", i))
    ahead = 0
    for what, _ in order:
        ahead += {"dispatch": 1, "experts": 0, "combine": -1}[what]
        assert 0 <= ahead <= 2


def test_names_and_copies() -> None:
    """State dicts keep the layer's names; a copy has no connection; local parameters are the experts."""
    layer = mk.MoELayer(8, 4, 4, 2, shared_intermediate_size=4)
    names, model = list(layer.state_dict()), torch.nn.Sequential(layer)
    ep = mk.ExpertParallel(layer)
    assert list(layer.state_dict()) == names
    ep(torch.ones(2, 8))
    assert ep.engine.link is not None
    assert copy.deepcopy(ep).engine.link is None
    assert list(expert_parallel.local_parameters(model)) == ["0.experts.w13", "0.experts.w2"]
    alone = mk.ExpertParallel(mk.MoELayer(8, 4, 4, 2).experts)
    assert list(expert_parallel.local_parameters(alone)) == ["experts.w13", "experts.w2"]


def example(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*start, str(ROOT / "examples/train_ep.py"), *words]
    return subprocess.run(command, env=env, timeout=240, capture_output=True, text=True, check=False)


def test_example_trains_to_the_loss_of_one_process() -> None:
    """In float64, where the order of sums shows in the last digits only: 11 steps, losses equal to 1e-9."""
    words = ("--steps", "11", "--length", "32", "--dtype", "float64")
    runs = [example(*words), example(*words, ranks=2)]
    losses = [[float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("step")] for run in runs]
    assert len(losses[0]) == len(losses[1]) == 2, runs[1].stderr[-3000:]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][1] < losses[0][0] - 0.5


def test_example_names_the_rank_that_died() -> None:
    run = example("--steps", "11", "--length", "32", "--kill-rank", "1", "--kill-step", "3", ranks=2)
    assert run.returncode != 0
    assert "[rank 0] ExpertParallel: rank 1, process" in run.stdout, (run.stdout, run.stderr[-2000:])


DOCUMENT = (ROOT / "docs/expert_parallel.md").read_text()


def test_document() -> None:
    """The snippet runs; every transport has a row; the example's options exist."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "expert_parallel.md", "exec"), {})
    assert set(re.findall(r"^\| `(\w+)` \| (?:once|to|as) ", DOCUMENT, re.MULTILINE)) == set(engine.TRANSPORTS)
    options = set(re.findall(r"train_ep\.py.*?(--[a-z-]+)", DOCUMENT))
    assert options and all(f'"{option}"' in (ROOT / "examples/train_ep.py").read_text() for option in options)


def test_the_bound_of_a_sum_in_another_order() -> None:
    """What the workers compare with: a sum backwards is within, and not far below; what must not pass does not."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 64, dtype=torch.float64, generator=g), torch.randn(64, dtype=torch.float64, generator=g)
    one, other = (x * w).cumsum(1)[:, -1], (x * w).flip(1).cumsum(1)[:, -1]
    assert closeness.within(other, one, 64) and not torch.equal(other, one)
    assert float((other - one).abs().max()) > closeness.bound(one, 64) / 300
    for wrong in (one.float().double(), one + 2 * closeness.bound(one, 64), one * torch.nan, one[1:]):
        assert not closeness.within(wrong, one, 64)
    with pytest.raises(AssertionError, match="sum: .* away, .* allowed"):
        closeness.check(one + 1e-9, one, 64, what="sum")

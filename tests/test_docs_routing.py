# SPDX-License-Identifier: Apache-2.0
"""docs/routing.md: every one-line example runs, and every router, policy and loss has a row."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_kernels as mk
from moe_kernels import capacity, losses
from moe_kernels.routers import RouterSettings
from moe_kernels.routers.hashed import _Hashed

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "routing.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \|.*\| `(.*)` \|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("name", "code"), ROWS, ids=[row[0] for row in ROWS])
def test_an_example_runs(name, code):
    names = {"mk": mk, "torch": torch, "layer": functools.partial(mk.MoELayer, 64, 128, 8)}
    torch.manual_seed(0)
    layer = eval(code, names)
    assert isinstance(layer, mk.MoELayer)
    x = torch.randn(2, 8, 64, requires_grad=True)
    y = layer(x, token_ids=torch.randint(0, 256, (2, 8)))
    (y.sum() + layer.aux_loss).backward()
    assert y.shape == x.shape and y.any() and x.grad.isfinite().all()
    assert bool(layer.losses) == bool(layer.aux_loss.requires_grad)


def test_nothing_is_left_out():
    assert len(ROWS) > 45
    known = [c for c in (*RouterSettings.__subclasses__(), *_Hashed.__subclasses__()) if c is not _Hashed]
    assert len(known) == 12
    for kind in known:
        assert f"mk.{kind.__name__}(" in TEXT or f"routers.{kind.__name__}(" in TEXT, kind
    for policy in capacity.DROP_POLICIES:
        assert f"| {policy} |" in TEXT
    for name, kind in losses.LOSSES.items():
        assert f'"{name}"' in TEXT or f"losses.{kind.__name__}(" in TEXT, name


def test_the_snippet_of_balancing_runs(capsys):
    text = (Path(__file__).resolve().parents[1] / "docs" / "balancing.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "docs/balancing.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[0.")


def test_the_training_example_runs(tmp_path):
    """Small: five runs, a line of loss and balance for each, one picture."""
    script = Path(__file__).resolve().parents[1] / "examples" / "train_char_moe.py"
    words = ["--steps", "2", "--rows", "1", "--length", "32", "--out", str(tmp_path / "a.png")]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(
        r"^(no balancing|aux loss|loss-free bias|expert choice|hash) +([\d.]+) +([\d.]+)", done.stdout, re.M
    )
    assert len(rows) == 5 and all(4 < float(loss) < 8 for _, loss, _ in rows) and rows[3][2] == "0.00"
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_the_lora_example_runs(tmp_path):
    pytest.importorskip("peft", reason="an optional peer of the example")
    pytest.importorskip("transformers", reason="an optional peer of the example")
    script = Path(__file__).resolve().parents[1] / "examples" / "finetune_lora.py"
    words = ["--steps", "3", "--rows", "2", "--length", "32"]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 of 2 MoE layers taken" in done.stdout and done.stdout.count("step ") == 2
    assert float(re.search(r"differ by ([\d.e+-]+)", done.stdout)[1]) < 1e-4

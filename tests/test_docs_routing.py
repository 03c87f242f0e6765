# SPDX-License-Identifier: Apache-2.0
"""docs/routing.md: every one-line example runs, and every router, policy and loss has a row."""

import functools
import re
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

# SPDX-License-Identifier: Apache-2.0
"""Every test: compiled kernels only, fixed seeds, and memory that nobody has written yet is NaN."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a cached graph may hold an older backward of ours
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: fast on a busy machine too

import pytest
import torch

import moe_kernels as mk
from moe_kernels import _build, reference

STRICT = "MOE_KERNELS_STRICT"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=None, metavar="DIR", help="folder of golden vectors (default: tests/golden)")


def pytest_configure(config: pytest.Config) -> None:
    if _build.ops_loaded or os.environ.get("CI"):
        os.environ.setdefault(STRICT, "1")


def pytest_report_header() -> str:
    return f"moe_kernels {mk.__version__}: " + (_build.reason or f"library {_build.info()['library']}")


def golden_folder(config: pytest.Config) -> Path:
    return Path(config.getoption("--golden") or Path(__file__).with_name("golden"))


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch then fills what `empty` returns with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


CPU = SimpleNamespace(
    name="cpu", route=mk.route, limit_capacity=mk.limit_capacity, permute=mk.permute, grouped_gemm=mk.grouped_gemm,
    unpermute=mk.unpermute, fused_experts=mk.fused_experts, device="cpu",
)  # fmt: skip
REFERENCE = SimpleNamespace(
    name="reference", route=reference.route, limit_capacity=reference.limit_capacity, permute=reference.permute,
    grouped_gemm=reference.grouped_gemm, unpermute=reference.unpermute, fused_experts=reference.fused_experts,
    device="cpu",
)  # fmt: skip


@pytest.fixture(params=[REFERENCE, CPU], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> SimpleNamespace:
    """What a test body runs against; a further device is one more entry."""
    return request.param

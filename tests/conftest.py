# SPDX-License-Identifier: Apache-2.0
"""Every test: compiled kernels only, fixed seeds, and memory that nobody has written yet is NaN."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a cached graph may hold an older backward of ours
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep: fast on a busy machine too

import pytest
import simt_ops
import torch
from torch.utils._pytree import tree_map

import moe_kernels as mk
from moe_kernels import _build, reference
from moe_kernels.routers import assignment, expert_choice

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
    unpermute=mk.unpermute, fused_experts=mk.fused_experts, expert_choice=expert_choice.choose,
    sinkhorn=assignment.balance, device="cpu",
)  # fmt: skip
REFERENCE = SimpleNamespace(
    name="reference", route=reference.route, limit_capacity=reference.limit_capacity, permute=reference.permute,
    grouped_gemm=reference.grouped_gemm, unpermute=reference.unpermute, fused_experts=reference.fused_experts,
    expert_choice=reference.expert_choice, sinkhorn=reference.sinkhorn, device="cpu",
)  # fmt: skip


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on the GPU, of and into CPU tensors, so that one test body serves every device."""

    def run(*args: Any, **kwargs: Any) -> Any:
        moved = tree_map(lambda v: v.cuda() if isinstance(v, torch.Tensor) else v, (args, kwargs))
        return tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, function(*moved[0], **moved[1]))

    return run


CUDA = SimpleNamespace(
    name="cuda", route=_on_gpu(mk.route), permute=_on_gpu(mk.permute), unpermute=_on_gpu(mk.unpermute),
    expert_choice=_on_gpu(expert_choice.choose), sinkhorn=_on_gpu(assignment.balance), device="cuda",
)  # fmt: skip
EMULATED = (
    "test_route",
    "test_permute",
    "test_unpermute",
    "test_expert_choice",
    "test_sinkhorn",
)  # the stages that have CUDA kernels


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`, what a test body runs against: the reference, every kernel of this build, and the CUDA kernels on the
    emulator. A further device is one more entry."""
    if "backend" not in metafunc.fixturenames:
        return
    backends = [REFERENCE, CPU]
    if metafunc.module.__name__ in EMULATED:
        backends += [simt_ops.BACKEND, *([CUDA] if torch.cuda.is_available() else [])]
    metafunc.parametrize("backend", backends, ids=lambda backend: backend.name, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> SimpleNamespace:
    if request.param is simt_ops.BACKEND:
        if reason := simt_ops.missing():
            pytest.skip(reason)
        simt_ops.restart()
    return request.param

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
from moe_kernels import _build, fallback, reference
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
    name="cpu", device="cpu", route=mk.route, route_with_sums=mk.route_with_sums,
    sum_scores=torch.ops.moe_kernels.sum_scores.default, limit_capacity=mk.limit_capacity, permute=mk.permute,
    grouped_gemm=mk.grouped_gemm, unpermute=mk.unpermute, fused_experts=mk.fused_experts,
    expert_choice=expert_choice.choose, sinkhorn=assignment.balance,
)  # fmt: skip
REFERENCE = SimpleNamespace(
    name="reference", device="cpu", route=reference.route, route_with_sums=reference.route_with_sums,
    sum_scores=fallback.sum_scores, limit_capacity=reference.limit_capacity, permute=reference.permute,
    grouped_gemm=reference.grouped_gemm, unpermute=reference.unpermute, fused_experts=reference.fused_experts,
    expert_choice=reference.expert_choice, sinkhorn=reference.sinkhorn,
)  # fmt: skip


def _on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on the GPU, of and into CPU tensors, so that one test body serves every device."""

    def run(*args: Any, **kwargs: Any) -> Any:
        moved = tree_map(lambda v: v.cuda() if isinstance(v, torch.Tensor) else v, (args, kwargs))
        return tree_map(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, function(*moved[0], **moved[1]))

    return run


CUDA = SimpleNamespace(
    name="cuda", device="cuda", route=_on_gpu(mk.route), route_with_sums=_on_gpu(mk.route_with_sums),
    sum_scores=_on_gpu(torch.ops.moe_kernels.sum_scores.default), limit_capacity=_on_gpu(mk.limit_capacity),
    permute=_on_gpu(mk.permute), unpermute=_on_gpu(mk.unpermute), grouped_gemm=_on_gpu(mk.grouped_gemm),
    fused_experts=_on_gpu(mk.fused_experts), expert_choice=_on_gpu(expert_choice.choose),
    sinkhorn=_on_gpu(assignment.balance),
)  # fmt: skip
EMULATED = {  # the stages that have CUDA kernels
    "test_route", "test_route_sums", "test_sum_scores", "test_limit_capacity", "test_permute", "test_unpermute",
    "test_expert_choice", "test_sinkhorn", "test_grouped_gemm",
}  # fmt: skip
# Too many products for the emulator: test_cuda_experts.py takes what it needs of the bodies.
ON_GPU = EMULATED | {"test_fused_experts"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`, what a test body runs against: the reference, every kernel of this build, and the CUDA kernels on the
    emulator. A further device is one more entry."""
    if "backend" not in metafunc.fixturenames:
        return
    backends = [REFERENCE, CPU]
    if metafunc.module.__name__ in EMULATED:
        backends.append(simt_ops.BACKEND)
    if metafunc.module.__name__ in ON_GPU and torch.cuda.is_available():
        backends.append(CUDA)
    metafunc.parametrize("backend", backends, ids=lambda backend: backend.name, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> SimpleNamespace:
    if request.param is simt_ops.BACKEND:
        if reason := simt_ops.missing():
            pytest.skip(reason)
        simt_ops.restart()
    return request.param

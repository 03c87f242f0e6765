# SPDX-License-Identifier: Apache-2.0
"""moe_kernels: the Mixture-of-Experts layer of a PyTorch model as handwritten kernels, forward and backward."""

from . import _build
from ._version import __version__

_build.load()

from . import auto_pack, balance, draws, interop, losses, presets, reference, routers  # noqa: E402
from . import hf as _hf  # noqa: E402  the ops come after the library that implements them
from .auto_pack import repack  # noqa: E402
from .balance import Balance, Reinit  # noqa: E402
from .capacity import Capacity, limit_capacity  # noqa: E402
from .dropout import Dropout  # noqa: E402
from .expert_parallel import ExpertParallel, MoECommError  # noqa: E402
from .explain import Explanation, explain  # noqa: E402
from .hf import ReplaceReport, replace, restore  # noqa: E402
from .layers import MoELayer  # noqa: E402
from .monitor import Monitor  # noqa: E402
from .ops import (  # noqa: E402
    PackedExperts,
    Permuted,
    Routing,
    fused_experts,
    grouped_gemm,
    pack_experts,
    permute,
    route,
    route_with_sums,
    unpermute,
)
from .planning import plan  # noqa: E402
from .routers import Router  # noqa: E402

_hf.install_hook()

__all__ = [
    "Balance",
    "Capacity",
    "Dropout",
    "ExpertParallel",
    "Explanation",
    "MoECommError",
    "MoELayer",
    "Monitor",
    "PackedExperts",
    "Permuted",
    "Reinit",
    "ReplaceReport",
    "Router",
    "Routing",
    "__version__",
    "auto_pack",
    "balance",
    "draws",
    "explain",
    "fused_experts",
    "grouped_gemm",
    "interop",
    "limit_capacity",
    "losses",
    "pack_experts",
    "permute",
    "plan",
    "presets",
    "reference",
    "repack",
    "replace",
    "restore",
    "route",
    "route_with_sums",
    "routers",
    "unpermute",
]

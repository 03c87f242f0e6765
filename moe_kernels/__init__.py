# SPDX-License-Identifier: Apache-2.0
"""moe_kernels: the Mixture-of-Experts layer of a PyTorch model as handwritten kernels, forward and backward."""

from . import _build
from ._version import __version__

_build.load()

from . import hf as _hf  # noqa: E402  the ops come after the library that implements them
from . import reference  # noqa: E402
from .explain import Explanation, explain  # noqa: E402
from .ops import (  # noqa: E402
    PackedExperts,
    Permuted,
    Routing,
    fused_experts,
    grouped_gemm,
    pack_experts,
    permute,
    route,
    unpermute,
)

_hf.install_hook()

__all__ = [
    "Explanation",
    "PackedExperts",
    "Permuted",
    "Routing",
    "__version__",
    "explain",
    "fused_experts",
    "grouped_gemm",
    "pack_experts",
    "permute",
    "reference",
    "route",
    "unpermute",
]

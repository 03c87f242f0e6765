# SPDX-License-Identifier: Apache-2.0
"""Hugging Face: the experts function and its registration under `experts_implementation="moe_kernels"`."""

from .experts import MOE_MODULE, activation_name, experts_forward, fused_gate
from .hook import (
    FP8_MODULE,
    NAME,
    fp8_experts_forward,
    hook_state,
    install_hook,
    is_registered,
    register,
)

__all__ = [
    "FP8_MODULE",
    "MOE_MODULE",
    "NAME",
    "activation_name",
    "experts_forward",
    "fp8_experts_forward",
    "fused_gate",
    "hook_state",
    "install_hook",
    "is_registered",
    "register",
]

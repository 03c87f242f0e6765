# SPDX-License-Identifier: Apache-2.0
"""Hugging Face: the switch `experts_implementation="moe_kernels"`, and `replace` for every model.

experts.py is the function behind the switch, hook.py its registration, replace.py replace, restore and the report,
blocks/ the families that the switch does not reach. Nothing here imports transformers.
"""

from .blocks.grok1 import Grok1MoE
from .experts import MOE_MODULE, activation_name, experts_forward, fused_gate, local_weights
from .hook import (
    FP8_MODULE,
    NAME,
    fp8_experts_forward,
    hook_state,
    install_hook,
    is_registered,
    register,
)
from .replace import Entry, ReplaceReport, replace, restore, survey

__all__ = [
    "FP8_MODULE",
    "MOE_MODULE",
    "NAME",
    "Entry",
    "Grok1MoE",
    "ReplaceReport",
    "activation_name",
    "experts_forward",
    "fp8_experts_forward",
    "fused_gate",
    "hook_state",
    "install_hook",
    "is_registered",
    "local_weights",
    "register",
    "replace",
    "restore",
    "survey",
]

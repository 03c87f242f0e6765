# SPDX-License-Identifier: Apache-2.0
"""What a family's file says about a class it can take over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def _nothing(_module: Any) -> str:
    return ""


def _none(_module: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Adapter:
    """One class whose forward we have. The module, its parameters and its router stay; only `forward` is ours."""

    kind: str
    """name of the class"""
    home: str
    """module that defines it; "" for the remote code of a checkpoint, which can be anywhere"""
    forward: Callable[..., Any]
    """forward(module, *the arguments of the class's own forward)"""
    columns: Callable[[Any], list[list[Tensor]]]
    """the weights that the kernels read, by kind; TypeError, AttributeError or KeyError if the layout is another"""
    per_expert: bool = False
    """whether a column holds one parameter an expert: `replace` then moves it into one block of memory"""
    act_fn: Callable[[Any], Any] | None = None
    """the activation, which decides between the fused and the unfused path; None: the path has no name of its own"""
    path: str = "fused_experts"
    """what runs"""
    inside: tuple[str, ...] = ()
    """the children that are no longer called, () for all: nobody's hooks may sit there"""
    refuse: Callable[[Any], str] = _nothing
    """why this one cannot be taken, or an empty string"""
    options: Callable[[Any], dict[str, Any]] = _none
    """keyword arguments of forward, found out once; TypeError if it cannot be"""

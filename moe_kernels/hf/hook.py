# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's own switch: how "moe_kernels" gets into the experts registries of transformers.

transformers (>= 5.0) looks its experts function up by name at every call. `register()` puts ours under "moe_kernels";
no model code, parameter, router or state_dict key changes. transformers is never imported here: what is loaded is
registered at once, the rest when it loads.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .experts import MOE_MODULE, experts_forward

NAME = "moe_kernels"
FP8_MODULE = "transformers.integrations.finegrained_fp8"
_REGISTRIES = {MOE_MODULE: "ALL_EXPERTS_FUNCTIONS", FP8_MODULE: "ALL_FP8_EXPERTS_FUNCTIONS"}


def fp8_experts_forward(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What transformers finds under our name for an FP8 model: a refusal that says what to do."""
    raise TypeError(
        f"moe_kernels: {type(module).__name__} holds FP8 experts, and quantised experts are not supported. "
        "Load the model with its quantization config set to dequantize=True, or choose experts_implementation="
        "'grouped_mm'"
    )


_FUNCTION_OF = {MOE_MODULE: experts_forward, FP8_MODULE: fp8_experts_forward}


def register() -> bool:
    """Register "moe_kernels" in the experts registries of transformers that are loaded; True if the main one was.

    Never imports transformers. Calling it again is harmless.
    """
    done = [_register_in(name) for name in _REGISTRIES]
    return done[0]


def is_registered() -> bool:
    """Whether `experts_implementation="moe_kernels"` is known to the transformers that is loaded."""
    registry = getattr(sys.modules.get(MOE_MODULE), _REGISTRIES[MOE_MODULE], None)
    return registry is not None and registry.get(NAME) is experts_forward


def hook_state() -> str:
    """One line for `doctor`: registered, waiting for transformers to load, or not installed."""
    if is_registered():
        return f'registered: experts_implementation="{NAME}" works'
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return "waiting: registers itself when transformers loads"
    return "not installed"


def install_hook() -> None:
    """Register now what is loaded; the rest registers itself when it loads. Called by `import moe_kernels`."""
    waiting = [name for name in _REGISTRIES if not _register_in(name)]
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


def _register_in(module_name: str) -> bool:
    registry = getattr(sys.modules.get(module_name), _REGISTRIES[module_name], None)
    if registry is None:
        return False
    try:
        registry.register(NAME, _FUNCTION_OF[module_name])
    except Exception as error:  # a future transformers must still import
        warnings.warn(f"moe_kernels: could not register with {module_name}: {error!r}", RuntimeWarning, stacklevel=2)
        return False
    return True


class _Finder(importlib.abc.MetaPathFinder):
    """Sees the import of a module with a registry, lets the usual finders find it, and registers after it has run."""

    def __init__(self, waiting: list[str]) -> None:
        self.waiting = set(waiting)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.discard(name)  # so that the search below passes us by
        spec = importlib.util.find_spec(name)
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader; hands the module back to it, runs it, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register_in(module.__name__)

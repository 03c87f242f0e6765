# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: setuptools, and a plain `pip install .` borrows the torch that is already installed.

pip builds in an isolated environment that shares the interpreter and hides its packages. To ask for torch there would
download gigabytes and perhaps another version; so look where the interpreter keeps its packages, and ask for torch only
when none of them is new enough.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import site
import sys
import sysconfig
from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no torch)

FLOOR = (2, 11)


def _package_folders() -> list[str]:
    """Where the running interpreter keeps packages, though the isolated build hides them."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sys.prefix == sys.base_prefix:
        folders.append(site.getusersitepackages())
    return list(dict.fromkeys(folder for folder in folders if os.path.isdir(folder)))


def _new_enough(version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= FLOOR


def _borrow_torch() -> bool:
    """True when a torch that is new enough can be imported, if need be from the interpreter's own packages."""
    for folder in (None, *_package_folders()):
        found = importlib.metadata.distributions(name="torch", **({"path": [folder]} if folder else {}))
        if any(_new_enough(torch.version) for torch in found):
            if folder is not None:
                sys.path.append(folder)  # last: the isolated environment's own packages win
                importlib.invalidate_caches()
            return True
    return False


def _torch_requirement() -> list[str]:
    return [] if _borrow_torch() else [f"torch>={FLOOR[0]}.{FLOOR[1]}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*_setuptools.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []  # setup.py makes extensions only where it can import torch, and an sdist has none


def build_wheel(*args: Any, **kwargs: Any) -> str:
    _borrow_torch()
    return _setuptools.build_wheel(*args, **kwargs)


def build_editable(*args: Any, **kwargs: Any) -> str:
    _borrow_torch()
    return _setuptools.build_editable(*args, **kwargs)

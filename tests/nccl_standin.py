# SPDX-License-Identifier: Apache-2.0
"""The stand-in for NCCL and CUDA's streams, built for the tests that use it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler: the stand-in for NCCL cannot be built")
    path = tmp_path_factory.mktemp("nccl") / "libstandin.so"
    source = Path(__file__).with_name("nccl_standin.cpp")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(path), "-lrt"], check=True)
    return str(path)

# SPDX-License-Identifier: Apache-2.0
"""The build: what is loaded, what it may depend on, what a user reads when it is not there, and how CUDA is decided."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import moe_kernels
from moe_kernels import _build

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(moe_kernels.__file__).resolve().parent

sys.path.insert(0, str(ROOT / "build_support"))
cuda_choice = importlib.import_module("cuda_choice")
sys.path.remove(str(ROOT / "build_support"))


def undefined_symbols(library: Path) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed, and only it lists the symbols")
    command = [nm, "-D", "-C", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split(maxsplit=1)[1] for line in lines]
    assert names, "a shared library needs at least libc"
    return names


def host_library() -> Path:
    return Path(importlib.import_module("moe_kernels._host").__file__)


def ask_elsewhere(folder: Path, **variables: str) -> dict[str, object]:
    """`_build` of the copy of the package in `folder`, in a new Python that finds this copy first."""
    code = (
        "import json, warnings; warnings.simplefilter('ignore'); import moe_kernels; from moe_kernels import _build;"
        "print(json.dumps({**_build.info(), 'file': moe_kernels.__file__}))"
    )
    env = {**os.environ, **variables}
    env.pop("MOE_KERNELS_STRICT", None)
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    info: dict[str, object] = json.loads(run.stdout)
    assert Path(str(info["file"])).is_relative_to(folder)
    return info


def copy_package(folder: Path, *, libraries: bool) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", *([] if libraries else ["*.so"]))
    return Path(shutil.copytree(PACKAGE, folder / "moe_kernels", ignore=ignored))


def test_the_compiled_library_is_the_one_loaded() -> None:
    assert _build.ops_loaded, _build.reason
    assert _build.reason == ""
    assert Path(str(_build.info()["library"])) == PACKAGE / "_ops.abi3.so"
    assert str(PACKAGE / "_ops.abi3.so") in Path("/proc/self/maps").read_text()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("moe_kernels::fused_experts", "CPU")


def test_the_installed_package_is_the_one_tested() -> None:
    record = importlib.import_module("moe_kernels._build_info").INFO
    assert record["version"] == moe_kernels.__version__
    if PACKAGE == ROOT / "moe_kernels":  # an editable install; its libraries must not be older than their sources
        built = (PACKAGE / "_ops.abi3.so").stat().st_mtime
        assert all(path.stat().st_mtime <= built for path in (ROOT / "csrc/cpu").iterdir()), (
            "run `pip install -e .` again"
        )


def test_ops_needs_only_the_stable_interface() -> None:
    names = undefined_symbols(PACKAGE / "_ops.abi3.so")
    unstable = ("at::", "c10::", "torch::", "caffe2::", "Py", "_Py", "cuda", "pybind11::")
    assert [name for name in names if name.startswith(unstable)] == []
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)


def test_ops_asks_torch_for_memory_only() -> None:
    called = set(re.findall(rb"aten::(\w+)", (PACKAGE / "_ops.abi3.so").read_bytes()))
    memory = {
        b"new_empty",
        b"new_zeros",
        b"empty_like",
        b"clone",
        b"contiguous",
        b"copy_",
        b"zero_",
        b"fill_",
        b"to",
        b"view",
        b"transpose",
    }
    assert called - memory == set()


def test_host_knows_no_torch() -> None:
    names = undefined_symbols(host_library())
    assert [name for name in names if name.startswith(("at::", "c10::", "torch", "aoti_"))] == []


def test_info() -> None:
    info = _build.info()
    assert info["torch"] == torch.__version__
    assert info["torch_built"] == importlib.import_module("moe_kernels._build_info").INFO["torch"]
    assert "-O3" in info["flags"]
    assert not any(flag.startswith(("-march", "-ffast-math", "-std")) for flag in info["flags"])
    assert info["cuda"] is None or info["arch_list"]
    assert info["cuda_reason"]
    assert info["isa"] in info["isa_levels"]
    assert info["isa_levels"] == ["portable", "avx2", "avx512"][: len(info["isa_levels"])]
    json.dumps(info)


def active_isa(wanted: str) -> subprocess.CompletedProcess[str]:
    """Asks the host module alone, in a new Python without torch."""
    code = (
        "import sys; from importlib.util import module_from_spec, spec_from_file_location as at;"
        f"spec = at('_host', {str(host_library())!r}); host = module_from_spec(spec); spec.loader.exec_module(host);"
        "assert 'torch' not in sys.modules; print(host.active_isa())"
    )
    env = {**os.environ, "MOE_KERNELS_ISA": wanted}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", ""])
def test_isa_is_lowered_and_never_raised(level: str) -> None:
    levels = importlib.import_module("moe_kernels._host").isa_levels()
    assert active_isa(level).stdout.strip() == (level if level in levels else levels[-1])


def test_an_unknown_isa_is_named() -> None:
    said = active_isa("sse9").stderr
    assert "RuntimeError: MOE_KERNELS_ISA must be portable, avx2 or avx512, got sse9" in said


def test_not_built(tmp_path: Path) -> None:
    package = copy_package(tmp_path, libraries=False)
    info = _build._not_built(package, [])
    assert info.startswith(f"the compiled library was not built in {package}. Run `pip install .`")


def test_a_checkout_that_shadows_the_installed_package(tmp_path: Path) -> None:
    package = copy_package(tmp_path, libraries=False)
    info = ask_elsewhere(tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert info["ops_loaded"] is False
    reason = str(info["reason"])
    assert reason.startswith(
        f"moe_kernels: the source checkout {package.parent} shadows the installed package {PACKAGE},"
    )
    assert "pip install -e ." in reason


def test_a_damaged_library(tmp_path: Path) -> None:
    library = copy_package(tmp_path, libraries=True) / "_ops.abi3.so"
    library.write_bytes(b"not a library" * 100)
    info = ask_elsewhere(tmp_path)
    assert info["ops_loaded"] is False
    assert "damaged or was built for another machine" in str(info["reason"])
    assert "pip install --force-reinstall" in str(info["reason"])


def test_a_library_that_does_not_fit_this_torch(tmp_path: Path) -> None:
    library = copy_package(tmp_path, libraries=True) / "_ops.abi3.so"
    symbol = next(name for name in undefined_symbols(library) if name.startswith("aoti_torch_"))
    missing = symbol[:-1] + "0"
    library.write_bytes(library.read_bytes().replace(symbol.encode() + b"\0", missing.encode() + b"\0"))
    reason = str(ask_elsewhere(tmp_path)["reason"])
    assert reason.startswith("moe_kernels: the compiled library does not fit this torch: built with torch ")
    assert f"running torch {torch.__version__}, which lacks {missing}." in reason


def test_a_host_module_of_another_python(tmp_path: Path) -> None:
    package = copy_package(tmp_path, libraries=True)
    assert _build._other_python(package, "_host") == ""
    next(package.glob("_host.*.so")).rename(package / "_host.cpython-39-x86_64-linux-gnu.so")
    said = _build._other_python(package, "_host")
    assert said.startswith("_host.cpython-39-x86_64-linux-gnu.so was built for another Python than this cpython-3")
    assert "pip install --force-reinstall" in said


def test_an_old_torch() -> None:
    assert _build._torch_too_old("2.10.1+cpu").startswith("torch 2.10.1+cpu is too old for the compiled library")
    assert _build._torch_too_old("2.9.0") != ""
    assert [_build._torch_too_old(v) for v in ("2.11.0", "2.15.0+cu132", "3.0.0a0+git")] == ["", "", ""]


NO_CUDA, CUDA_13 = ("2.13.0+cpu", None), ("2.13.0+cu130", "13.0")


@pytest.mark.parametrize(
    ("env", "built_with", "nvcc", "build", "reason"),
    [
        ({}, NO_CUDA, "13.0", False, "torch 2.13.0+cpu was built without CUDA"),
        ({}, CUDA_13, None, False, "no nvcc in"),
        ({}, CUDA_13, "12.8", False, "nvcc is 12.8, but torch 2.13.0+cu130 is built with CUDA 13.0"),
        ({}, CUDA_13, "13.1", True, "nvcc 13.1 fits torch"),
        ({"MOE_KERNELS_CUDA": "0", "FORCE_CUDA": "1"}, CUDA_13, "13.0", False, "MOE_KERNELS_CUDA=0"),
        ({"MOE_KERNELS_CUDA": "1"}, NO_CUDA, "12.8", True, "MOE_KERNELS_CUDA=1"),
        ({"FORCE_CUDA": "1"}, NO_CUDA, "12.8", True, "FORCE_CUDA=1"),
        ({"MOE_KERNELS_CUDA": "", "FORCE_CUDA": "0"}, NO_CUDA, None, False, "torch 2.13.0+cpu was built without CUDA"),
    ],
)
def test_cuda_decision(
    env: dict[str, str], built_with: tuple[str, str | None], nvcc: str | None, build: bool, reason: str
) -> None:
    choice = cuda_choice.choose(env, *built_with, nvcc)
    assert choice.build is build
    assert choice.reason.startswith(reason)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"MOE_KERNELS_CUDA": "1"}, "MOE_KERNELS_CUDA=1, but no nvcc in"),
        ({"FORCE_CUDA": "1"}, "FORCE_CUDA=1, but no nvcc in"),
        ({"MOE_KERNELS_CUDA": "yes"}, "MOE_KERNELS_CUDA must be 0 or 1, got 'yes'"),
    ],
)
def test_cuda_wishes_that_cannot_be_met(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cuda_choice.choose(env, *CUDA_13, None)


def test_architectures() -> None:
    assert cuda_choice.gencode_flags("8.0;9.0a 12.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert cuda_choice.gencode_flags(cuda_choice.DEFAULT_ARCHS)
    for wrong in ("Hopper", "90", ""):
        with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
            cuda_choice.gencode_flags(wrong)


def listed_sources() -> dict[str, set[str]]:
    table: dict[str, set[str]] = {}
    for line in (ROOT / "csrc/sources.txt").read_text().splitlines():
        if words := line.split("#")[0].split():
            table.setdefault(words[0], set()).add(words[1])
    return table


def test_every_source_is_listed() -> None:
    listed = listed_sources()
    assert listed["cpu"] == {f"csrc/cpu/{path.name}" for path in (ROOT / "csrc/cpu").glob("*.cpp")}
    kernels = {f"csrc/cuda/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert {path for path in listed["cuda"] if path.endswith(".cu")} == kernels
    assert listed["ops"] | listed["host"] | listed["cuda"] >= {
        f"csrc/bindings/{path.name}" for path in (ROOT / "csrc/bindings").glob("*.cpp")
    }


def test_sdist_has_all_that_a_build_needs(tmp_path: Path) -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("the tests run outside a source tree")
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "__pycache__", "*.so")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
    code = f"import sys; sys.path.insert(0, 'build_support'); import backend; backend.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "moe_kernels").rglob("*.py")} - {
        "moe_kernels/_build_info.py"
    }
    rest = {
        "setup.py",
        "pyproject.toml",
        "build_support/backend.py",
        "Makefile",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
    }
    assert (sources | python | rest | {"moe_kernels/py.typed", "tests/test_build.py"}) - names == set()
    assert [name for name in names if name.endswith((".so", "_build_info.py"))] == []

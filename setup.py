# SPDX-License-Identifier: Apache-2.0
"""Builds moe_kernels._ops (torch's stable ABI: one build serves every torch from 2.11 on) and _host (pybind11).

Variables: MOE_KERNELS_CUDA=0|1, FORCE_CUDA=1, TORCH_CUDA_ARCH_LIST, CUDA_HOME, PYTORCH_NVCC, CXX, MAX_JOBS.
"""

import os
import pprint
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))
import cuda_choice  # noqa: E402
import nvcc  # noqa: E402

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ImportError as error:  # metadata and sdist need neither
    from setuptools.command.build_ext import build_ext as BuildExtension

    MISSING = str(error)
else:
    MISSING = ""

TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest torch whose stable calls may be used
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden"]


def sources() -> dict[str, list[str]]:
    """csrc/sources.txt: library -> its files, in the order of the list."""
    lines = (line.split("#")[0].split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines())
    table: dict[str, list[str]] = {name: [] for name in ("ops", "host", "cpu", "cuda", "nvrtc")}
    for library, path in filter(None, lines):
        table[library].append(path)
    return table


def job_limit() -> int:
    """Compilers at once: every core, but 4 GiB of memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, memory // 2**32))


class Build(BuildExtension):
    """torch's build, and: CUDA objects from nvcc, one folder of objects an extension, a record of what was built."""

    def run(self):
        if MISSING:
            raise SystemExit(f"moe_kernels: {MISSING}; building needs torch>=2.11 and pybind11 in this environment")
        os.environ.setdefault("MAX_JOBS", str(job_limit()))
        super().run()  # then the libraries stand where `pip install .` or `pip install -e .` wants them
        record = f"# Written by setup.py: what this build is.\nINFO = {pprint.pformat(self.info, width=100)}\n"
        package = Path(self.get_ext_fullpath("moe_kernels._ops")).parent
        (package / "_build_info.py").write_text(record)
        shutil.rmtree(package / "csrc", ignore_errors=True)
        for path in self.kernel_texts:  # as the launchers saw them: the two must fit
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, package / path)

    def build_extensions(self):
        ops, host, launchers = self.extensions
        ops.include_dirs, ops.library_dirs = include_paths(), library_paths()
        host.include_dirs = [pybind11.get_include()]
        cxx = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
        self.info = {
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "compiler": subprocess.run(cxx, capture_output=True, text=True, check=False).stdout.split("\n")[0],
            "flags": [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"],
            **self.add_cuda(ops),
        }
        self.kernel_texts = self.add_launchers(launchers)
        if not self.kernel_texts:
            self.extensions.remove(launchers)
        super().build_extensions()

    def build_extension(self, ext):
        shared, self.build_temp = self.build_temp, str(Path(self.build_temp, ext.name))
        super().build_extension(ext)  # its own folder: isa.cpp is in both extensions and would share one object file
        self.build_temp = shared

    def add_cuda(self, ops):
        """Compiles the .cu files into `ops` if they are wanted; one line says what was decided, and why."""
        found, files = nvcc.find(), sources()["cuda"]
        kernels = [path for path in files if path.endswith(".cu")]
        try:
            choice = cuda_choice.choose(os.environ, torch.__version__, torch.version.cuda, found and found.version)
            archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda_choice.DEFAULT_ARCHS
            flags = [*nvcc.FLAGS, *(cuda_choice.gencode_flags(archs) if choice.build else [])]
        except ValueError as error:
            raise SystemExit(f"moe_kernels: {error}") from None
        if not choice.build:
            print(f"moe_kernels: CPU kernels only: {choice.reason}")
            return {"cuda": None, "cuda_reason": choice.reason, "arch_list": "", "nvcc_flags": []}
        print(f"moe_kernels: CPU kernels, and CUDA kernels for {archs}: {choice.reason}")
        home = found.home()
        out = Path(self.build_temp, "cuda").resolve()
        ops.extra_objects += nvcc.compile_objects([found.path, *flags], kernels, out)
        ops.sources += [path for path in files if path not in kernels]
        ops.include_dirs.append(str(home / "include"))
        ops.library_dirs += [str(home / "lib64"), str(home / "lib")]
        ops.libraries += ["cudart_static", "rt", "dl", "pthread"]
        ops.extra_link_args.append("-Wl,--exclude-libs,ALL")  # the CUDA runtime stays inside
        return {"cuda": found.version, "cuda_reason": choice.reason, "arch_list": archs, "nvcc_flags": flags}

    def add_launchers(self, ext):
        """Compiles the launchers alone where nvcc does not compile the kernels; returns the texts that NVRTC needs."""
        if self.info["cuda"] or os.environ.get("MOE_KERNELS_CUDA") == "0":
            return []
        kernels = [path for path in sources()["cuda"] if path.endswith(".cu")]
        command = [*shlex.split(os.environ.get("CXX", "c++")), *CXX_FLAGS, *nvcc.LAUNCHERS]
        ext.extra_objects += nvcc.compile_objects(command, kernels, Path(self.build_temp, "launchers").resolve())
        ext.include_dirs, ext.library_dirs = include_paths(), library_paths()
        texts = [path for pattern in ("*.h", "cuda/*.h", "cuda/*.cuh") for path in (ROOT / "csrc").glob(pattern)]
        return sorted(path.relative_to(ROOT) for path in texts)


FILES = sources()
COMMON = {"language": "c++", "extra_compile_args": CXX_FLAGS}
OPS = Extension(
    "moe_kernels._ops",
    [*FILES["ops"], *FILES["cpu"]],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
    libraries=["torch_cpu"],
    py_limited_api=True,
    **COMMON,
)
HOST = Extension("moe_kernels._host", FILES["host"], libraries=["dl"], **COMMON)
NVRTC = Extension(  # the CUDA ops of a build without nvcc: moe_kernels/nvrtc.py
    "moe_kernels._nvrtc",
    [*FILES["nvrtc"], *(path for path in FILES["cuda"] if path.endswith(".cpp"))],
    define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("MOE_NVRTC", None)],
    libraries=["torch_cpu", "dl"],
    py_limited_api=True,
    **COMMON,
)
setup(ext_modules=[OPS, HOST, NVRTC], cmdclass={"build_ext": Build})

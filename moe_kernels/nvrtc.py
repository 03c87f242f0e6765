# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of a build without nvcc: NVRTC, the compiler in a library, compiles each at its first use.

Such a build has the launchers, compiled by the C++ compiler (csrc/nvrtc/driver.h), and beside them the kernels' source.
A launcher asks for a kernel by name; what the compiler makes of it is kept on disk and found again by every later
process. Nothing here touches a device: the launcher says for which architecture. `docs/nvrtc.md` tells the rest.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import cubin_cache

_PACKAGE = Path(__file__).resolve().parent
SOURCES = _PACKAGE / "csrc"  # as they were when the launchers were compiled; setup.py puts them there

active = False
reason = "the library has not been asked for yet"
_lock = threading.Lock()  # one compilation at a time; waiting for it lets Python's other threads run
_kept: dict[object, object] = {}  # what the launchers point to: it must not go away


def _candidates() -> Iterator[Path | str]:
    """Where NVRTC may be: the packages that a torch with CUDA and CuPy bring, torch itself, the system's, a toolkit."""
    wanted = (torch.version.cuda or "").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    wheels = [path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    yield from sorted(wheels, key=lambda path: not path.name.endswith(f".so.{wanted}"))  # torch's own major first
    yield from sorted(Path(torch.__file__).with_name("lib").glob("libnvrtc*.so*"))
    if found := ctypes.util.find_library("nvrtc"):
        yield found
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield from sorted(Path(home).glob("lib64/libnvrtc.so*"))


class Compiler:
    """NVRTC through ctypes. Errors: RuntimeError that says what to install."""

    def __init__(self) -> None:
        for path in _candidates():
            if "builtins" in str(path) or ".alt." in str(path):
                continue
            try:
                self._library = ctypes.CDLL(str(path))
                break
            except OSError:
                continue
        else:
            raise RuntimeError(
                "NVRTC, the compiler in a library, is not installed: pip install nvidia-cuda-nvrtc (CUDA 13), "
                "nvidia-cuda-nvrtc-cu12 (CUDA 12) or 'moe-kernels-torch[cupy]', or set CUDA_HOME to a toolkit"
            )
        self.path = str(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result:
            text = self._library.nvrtcGetErrorString
            text.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {text(result).decode()}")

    def architectures(self) -> list[int]:
        """Those it compiles for, such as 80 and 90."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(self, source: str, kernel: str, options: tuple[str, ...]) -> tuple[bytes, bytes]:
        """The cubin of one kernel, and the kernel's name in it. Errors: RuntimeError with the compiler's words."""
        program, lowered = ctypes.c_void_p(), ctypes.c_char_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        try:
            self._call("nvrtcAddNameExpression", program, kernel.encode())
            texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            try:
                self._call("nvrtcCompileProgram", program, len(options), texts)
            except RuntimeError as error:
                log = self._read(program, "nvrtcGetProgramLog", "nvrtcGetProgramLogSize").rstrip(b"\0").decode()
                raise RuntimeError(f"NVRTC {self.version} could not compile {kernel}: {error}\n{log}") from None
            self._call("nvrtcGetLoweredName", program, kernel.encode(), ctypes.byref(lowered))
            return self._read(program, "nvrtcGetCUBIN", "nvrtcGetCUBINSize"), lowered.value or b""
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, text: str, length: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(length, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(text, program, buffer)
        return buffer.raw


compiler = cache(Compiler)


@cache
def _texts(folder: Path) -> dict[str, str]:
    paths = [*folder.glob("*.h"), *folder.glob("cuda/*.h"), *folder.glob("cuda/*.cuh")]
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(paths)}


def _header_of(kernel: str, folder: Path) -> str:
    """The file that defines a kernel. Errors: RuntimeError if there is not exactly one."""
    stem = kernel.split("<")[0].split("::")[-1]
    defined = re.compile(rf"^(template .*|MOE_KERNEL .*|\s*)\b{stem}\(", re.MULTILINE)
    found = [name for name, text in _texts(folder).items() if "MOE_KERNEL" in text and defined.search(text)]
    if len(found) != 1:
        raise RuntimeError(f"the source of {kernel} is not in {folder}: found it in {found or 'no file'}")
    return found[0]


def architecture(major: int, minor: int) -> str:
    """What NVRTC compiles for on a device of this compute capability. Errors: RuntimeError if it cannot."""
    known = compiler().architectures()
    if 10 * major + minor not in known:
        raise RuntimeError(
            f"NVRTC {compiler().version} ({compiler().path}) does not know sm_{major}{minor}, only sm_"
            f"{', sm_'.join(map(str, known))}: install another nvidia-cuda-nvrtc"
        )
    return f"sm_{major}{minor}" + ("a" if major == 9 else "")  # 9.0a has the instructions that 9.0 has not: wgmma


def kernel_image(kernel: str, arch: str, folder: Path = SOURCES) -> tuple[bytes, bytes]:
    """The cubin of `kernel`, such as "route_kernel<moe::bf16>", for "sm_90a", and its name in the cubin.

    From the disk if some process has compiled it before. Errors: RuntimeError with the compiler's words.
    """
    options = (f"--gpu-architecture={arch}", "-std=c++17", "-default-device")
    source = f'#include "{_header_of(kernel, folder)}"\nusing namespace moe;\nusing namespace moe::cuda;\n'
    digest = hashlib.sha256()
    for word in (compiler().version, kernel, *options, source, *(w for pair in _texts(folder).items() for w in pair)):
        digest.update(f"{len(word)}:{word}".encode())
    key = digest.hexdigest()
    with _lock:
        if found := cubin_cache.read(key):
            return found
        made = compiler().compile(source, kernel, (*options, f"-I{folder}"))
        cubin_cache.write(key, *made)
        return made


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_char_p),
)  # fmt: skip


def _compile(kernel: bytes, major: int, minor: int, image: Any, text: Any) -> int:
    """What a launcher calls; on any thread, so nothing may be raised."""
    try:
        cubin, name = kernel_image(kernel.decode(), architecture(major, minor))
    except Exception as error:
        _kept[kernel, "error"] = text[0] = str(error).encode()
        return 1
    place = ctypes.create_string_buffer(cubin, len(cubin))
    _kept[kernel, major, minor] = place, name
    image[0], text[0] = ctypes.addressof(place), name
    return 0


_compile_callback = _CALLBACK(_compile)


def attach(library: Path) -> None:
    """Gives the launchers in `library`, already loaded, their compiler."""
    ctypes.CDLL(str(library)).moe_nvrtc_install(_compile_callback)


def kernels(library: Path) -> list[str]:
    """The names of all kernels that the launchers in `library` may ask for."""
    names = ctypes.CDLL(str(library)).moe_nvrtc_kernels
    names.restype = ctypes.c_char_p
    return sorted(names().decode().splitlines())


def about() -> str:
    """One line for a report: which compiler, and where the kernels are kept."""
    problem = cubin_cache.problem()
    kept = f"not kept: {problem}" if problem else f"kept in {cubin_cache.folder()}"
    return f"NVRTC {compiler().version}, each at its first use, {kept}"


def load(library: Path | None) -> None:
    """Registers the ops for CUDA tensors if torch and NVRTC can serve them; afterwards `active` and `reason` tell."""
    global active, reason
    if library is None:
        reason = "this build has no launchers for it"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA, so there are no CUDA tensors to serve"
    else:
        try:
            compiler()
            torch.ops.load_library(library)
            attach(library)
        except Exception as error:
            reason = str(error.__cause__ or error)
        else:
            active, reason = True, ""

# SPDX-License-Identifier: Apache-2.0
"""The CUDA route of a build without nvcc, as far as it goes without a GPU: names, cubins, cache, the driver's calls.

The launchers run against a driver that writes down what it is asked; no kernel runs here.
"""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_kernels import _build, cubin_cache, doctor, nvrtc
from moe_kernels.fallback import backend_of

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = next(iter(Path(_build.__file__).parent.glob("_nvrtc.*.so")), None)
SAMPLE = (
    "permute_rows_kernel<short unsigned int>", "unpermute_kernel<moe::f16, 8>", "grouped_rows_kernel<float, 7, true>",
    "decode_w13_kernel<moe::f16, 1>", "grouped_wgrad_kernel<moe::bf16>", "zero_rows_kernel<uint4>",
)  # fmt: skip


def compiler_or_skip() -> nvrtc.Compiler:
    try:
        return nvrtc.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of cubins of its own."""
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path / "cubins"))
    cubin_cache._warn_once.cache_clear()
    yield tmp_path / "cubins"
    cubin_cache._warn_once.cache_clear()


# ---------------------------------------------------------------- names and cubins


@pytest.mark.skipif(LIBRARY is None, reason="this build compiled its CUDA kernels with nvcc, or MOE_KERNELS_CUDA=0")
def test_every_launch_names_a_kernel_of_the_shipped_source() -> None:
    code = "import sys; from moe_kernels import nvrtc; print(*nvrtc.kernels(sys.argv[1]), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code, str(LIBRARY)], capture_output=True, text=True, check=True)
    names = done.stdout.splitlines()  # elsewhere: to load the library is to register its ops
    assert len(names) == len(set(names)) >= 129 and set(SAMPLE) <= set(names)
    for name in names:
        assert nvrtc._header_of(name, nvrtc.SOURCES).startswith("cuda/"), name
    with pytest.raises(RuntimeError, match="the source of no_such_kernel<moe::bf16> is not in"):
        nvrtc._header_of("no_such_kernel<moe::bf16>", nvrtc.SOURCES)


@pytest.mark.skipif(LIBRARY is None, reason="this build compiled its CUDA kernels with nvcc, or MOE_KERNELS_CUDA=0")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_kernels_compile_to_cubins_that_have_their_names(arch: str, kept: Path) -> None:
    """A sample, one of each stage; `make cuda` compiles them all."""
    compiler_or_skip()
    for name in SAMPLE:
        cubin, lowered = nvrtc.kernel_image(name, arch)
        assert cubin.startswith(b"\x7fELF") and b".text." + lowered + b"\0" in cubin
        assert lowered.startswith(b"_ZN3moe4cuda")
    assert len(list(kept.iterdir())) == len(SAMPLE)


@pytest.mark.skipif(LIBRARY is None, reason="this build compiled its CUDA kernels with nvcc, or MOE_KERNELS_CUDA=0")
def test_ops_are_registered_for_cuda_tensors() -> None:
    """In a process of its own: every op that has a CUDA kernel under nvcc has one here."""
    code = (
        "import sys, torch; from moe_kernels import ops; from moe_kernels.schemas import SCHEMAS;"
        "torch.ops.load_library(sys.argv[1]);"
        "print(*(op for op in SCHEMAS if ops.backend_of(op, 'cuda')[0] == 'cuda kernel'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(LIBRARY)], capture_output=True, text=True, check=True)
    served = set(done.stdout.split())
    assert served >= {
        "route", "route_backward", "permute", "unpermute", "grouped_gemm", "fused_experts", "fused_experts_backward",
        "expert_choice", "sinkhorn", "limit_capacity", "sum_scores",
    }  # fmt: skip


# ---------------------------------------------------------------- the cache


def test_a_kernel_is_compiled_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler_or_skip()
    made: list[str] = []
    compile_really = nvrtc.Compiler.compile

    def counted(self: nvrtc.Compiler, source: str, kernel: str, options: tuple[str, ...]) -> tuple[bytes, bytes]:
        made.append(kernel)
        return compile_really(self, source, kernel, options)

    monkeypatch.setattr(nvrtc.Compiler, "compile", counted)
    folder = ROOT / "csrc" if LIBRARY is None else nvrtc.SOURCES
    first = nvrtc.kernel_image("narrow_ids_kernel", "sm_80", folder)
    assert nvrtc.kernel_image("narrow_ids_kernel", "sm_80", folder) == first and len(made) == 1
    nvrtc.kernel_image("narrow_ids_kernel", "sm_90a", folder)
    assert len(made) == 2  # another architecture, another cubin
    texts = dict(nvrtc._texts(folder))
    texts["moe.h"] += "// changed"
    monkeypatch.setattr(nvrtc, "_texts", lambda folder: texts)
    nvrtc.kernel_image("narrow_ids_kernel", "sm_80", folder)
    assert len(made) == 3  # another source
    compiler = nvrtc.compiler()
    monkeypatch.setattr(compiler, "version", "0.0")
    nvrtc.kernel_image("narrow_ids_kernel", "sm_80", folder)
    assert len(made) == 4  # another compiler


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "name", "magic"])
def test_a_damaged_file_is_not_used(harm: str, kept: Path) -> None:
    cubin_cache.write("k", b"\x7fELF" + bytes(range(256)), b"_Zname")
    assert cubin_cache.read("k") == (b"\x7fELF" + bytes(range(256)), b"_Zname")
    file = kept / "k.cubin"
    content = bytearray(file.read_bytes())
    if harm == "cut":
        content = content[:-1]
    elif harm == "flip":
        content[-7] ^= 1
    elif harm == "empty":
        content = content[:0]
    elif harm == "magic":
        content[0] ^= 1
    else:
        content[cubin_cache._HEAD.size] += 1  # of the name's length
    file.write_bytes(content)
    assert cubin_cache.read("k") is None
    cubin_cache.write("k", b"again", b"_Zname")
    assert cubin_cache.read("k") == (b"again", b"_Zname")


def test_the_folder_is_private(kept: Path) -> None:
    assert cubin_cache.read("k") is None and not kept.exists()  # reading makes nothing
    cubin_cache.write("k", b"c", b"n")
    assert kept.stat().st_mode & 0o7777 == 0o700 and (kept / "k.cubin").stat().st_mode & 0o7777 == 0o600
    assert [path.name for path in kept.iterdir()] == ["k.cubin"]  # nothing left aside


@pytest.mark.parametrize("fault", ["link", "open", "owner", "file"])
def test_a_folder_of_others_is_refused(fault: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither read nor written, one warning, and the kernel is there all the same."""
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    if fault == "link":
        kept.symlink_to(real)
    elif fault == "file":
        kept.write_text("")
    else:
        kept.mkdir(mode=0o700)
    cubin_cache_uid = os.geteuid()
    if fault in ("open", "owner"):
        cubin_cache.write("k", b"c", b"n")
        assert cubin_cache.read("k") == (b"c", b"n")
    if fault == "open":
        kept.chmod(0o750)
    elif fault == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: cubin_cache_uid + 1)
    assert cubin_cache.read("k") is None
    with pytest.warns(RuntimeWarning, match="not kept for the next process"):
        cubin_cache.write("other", b"c", b"n")
    assert not list(real.iterdir()) and cubin_cache.problem()


def test_a_file_of_others_is_refused(kept: Path, tmp_path: Path) -> None:
    cubin_cache.write("k", b"c", b"n")
    (kept / "linked.cubin").symlink_to(kept / "k.cubin")
    assert cubin_cache.read("linked") is None
    (kept / "k.cubin").chmod(0o622)
    assert cubin_cache.read("k") is None


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOE_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cubin_cache.folder() == tmp_path / "xdg" / "moe_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    assert cubin_cache.folder() == tmp_path / ".cache" / "moe_kernels"
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path / "mine"))
    assert cubin_cache.folder() == tmp_path / "mine"


# ---------------------------------------------------------------- what a user reads


def test_without_nvrtc_the_words_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["libno_such_nvrtc.so"]))
    with pytest.raises(RuntimeError, match=r"pip install nvidia-cuda-nvrtc .*moe-kernels-torch\[cupy\]"):
        nvrtc.Compiler()


def test_an_architecture_that_nvrtc_does_not_know() -> None:
    compiler_or_skip()
    assert nvrtc.architecture(8, 0) == "sm_80" and nvrtc.architecture(9, 0) == "sm_90a"
    with pytest.raises(RuntimeError, match="does not know sm_70, only sm_"):
        nvrtc.architecture(7, 0)


def test_words_of_a_failed_compilation(kept: Path) -> None:
    compiler_or_skip()
    with pytest.raises(RuntimeError, match=r"(?s)could not compile broken.*error: identifier"):
        nvrtc.compiler().compile("__global__ void broken() { nowhere(); }", "broken", ("--gpu-architecture=sm_80",))


def test_why_the_route_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch without CUDA nothing is registered, and doctor and backend_of say why."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA: the route may be on")
    if _build.info()["cuda"] is None:
        assert not nvrtc.active
        assert ("no launchers" if LIBRARY is None else "has no CUDA") in nvrtc.reason
        assert backend_of("route", "cuda")[0] == "reference"
        lines, _ = doctor.report()
        line = next(line for line in lines if line.startswith("CUDA kernels"))
        assert "by nvcc: " in line and f"by NVRTC: {nvrtc.reason}" in line


def test_doctor_names_the_active_route(monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    compiler_or_skip()
    monkeypatch.setattr(nvrtc, "active", True)
    monkeypatch.setattr(_build, "_record", lambda: {"cuda": None, "cuda_reason": "no nvcc in PATH"})
    assert _build.cuda_route() == (
        f"NVRTC {nvrtc.compiler().version}, each at its first use, kept in {kept} (no nvcc in PATH)"
    )
    kept.chmod(0o755)
    assert "not kept: " in _build.cuda_route() and "chmod 700" in _build.cuda_route()


# ---------------------------------------------------------------- launchers on a driver that only writes down


DRIVE = """
import ctypes, os, sys
from pathlib import Path
from moe_kernels import nvrtc
nvrtc.SOURCES = Path(sys.argv[3])
nvrtc.kernel_image.__defaults__ = (nvrtc.SOURCES,)
calls, fake = ctypes.CDLL(sys.argv[1]), ctypes.CDLL("libcuda.so.1")
calls.words.restype = fake.fake_log.restype = ctypes.c_char_p
calls.route.argtypes = [ctypes.c_int64]
assert calls.use(0) == 0
assert calls.route(100) == 999 and b"nobody has installed a compiler" in calls.words(999)
nvrtc.attach(Path(sys.argv[2]))
for _ in range(2):
    assert calls.route(100) == 0, calls.words(999)
assert calls.sinkhorn() == 0 and calls.decode() == 0, calls.words(999)
assert calls.words(700) == b"an illegal memory access was encountered"
print(fake.fake_log().decode())
"""


def test_launchers_ask_the_driver_for_what_they_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, grids, streams, attributes and parameters as they arrive; a function is loaded once."""
    compiler_or_skip()
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path / "cubins"))
    for name in ("route_kernel<moe::bf16>", "sinkhorn_kernel<float>", "decode_w13_sm90_kernel<moe::bf16, 8>",
                 "decode_w2_sm90_kernel<moe::bf16, 8>"):  # fmt: skip
        nvrtc.kernel_image(name, "sm_90a", ROOT / "csrc")  # NVRTC itself would ask the driver more than this one knows
    sys.path.insert(0, str(ROOT / "build_support"))
    launchers = importlib.import_module("nvrtc").launchers()
    sys.path.remove(str(ROOT / "build_support"))
    cxx = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O0", "-shared", "-fPIC"]
    fake, calls = tmp_path / "libcuda.so.1", tmp_path / "calls.so"
    subprocess.run([*cxx, str(ROOT / "tests/nvrtc/fake_driver.cpp"), "-o", str(fake)], check=True)
    source = ["-DMOE_NVRTC", "-Wno-unknown-pragmas", str(ROOT / "tests/nvrtc/calls.cpp"), str(launchers)]
    subprocess.run([*cxx, *source, f"-Wl,-rpath,{launchers.parent}", "-o", str(calls)], check=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    command = [sys.executable, "-c", DRIVE, str(calls), str(launchers), str(ROOT / "csrc")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.split("\n")
    assert lines[0] == "context"  # torch's, made current on a thread that had none
    launches = [line.split() for line in lines if line.startswith("launch")]
    assert [line for line in lines if line.startswith("load")] == [f"load {i}" for i in (1, 2, 3, 4)]
    route, again, sinkhorn, w13, w2 = launches
    assert route == again and "route_kernelINS_4bf16E" in route[1] and route[-2:] == ["first", "100"]
    assert all(launch[6] == "77" for launch in launches)  # the stream
    assert "sinkhorn_kernelIfE" in sinkhorn[1] and sinkhorn[7:9] == ["2", "1"]  # cooperative
    assert "decode_w13_sm90_kernelINS_4bf16ELi8E" in w13[1] and w13[2:5] == ["4", "8", "384"]
    assert "decode_w2_sm90_kernelINS_4bf16ELi8E" in w2[1] and w2[2:5] == ["16", "1", "384"]
    assert w13[7:9] == ["6", "1"] and w2[7:11] == ["6", "1", "4", "4"]  # programmatic dependents; clusters of four
    assert [line for line in lines if line.startswith("map")] == [  # bf16, swizzled by 128 bytes
        "map 9 3 256/64 128/32 2/1 8/1", "map 9 3 128/64 256/32 1/1 8/1",
    ]  # fmt: skip
    assert f"attribute 8 {w13[5]}" in lines and int(w13[5]) > 48 * 1024
    assert "memset 0 256" in lines  # route's counts

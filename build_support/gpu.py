# SPDX-License-Identifier: Apache-2.0
"""What a machine with a GPU has to show, in one go and one report: build/gpu/report.md.

    make gpu                   on a GPU: probe, tests, tests under compute-sanitizer, benchmarks
    make gpu BACKEND=simt      rehearses the same steps without one: the emulator in place of the GPU

Every step runs, whatever the one before said. Exit status 0: all passed. 1: a step failed. 77: skipped, no GPU here.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import cubins
import nvcc

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/gpu"
STAGES = ["test_route.py", "test_permute.py", "test_unpermute.py", "test_grouped_gemm.py"]
EXPERTS = "test_fused_experts.py"  # of a GPU
EMULATED_EXPERTS = "test_cuda_experts.py"  # the same bodies, as many as the emulator runs in minutes
SANITIZED = "ties or absent or strides or padding or several_slots"  # minutes under a sanitizer, every kernel in it
STEP_SECONDS = 3600


@dataclass
class Step:
    """A command in the tests' or the bench's folder; `reason` says why there is none."""

    name: str
    command: list[str]
    folder: str = "tests"
    reason: str = ""
    env: dict[str, str] = field(default_factory=dict)


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def on_gpu() -> list[Step]:
    """The steps on a real device."""
    found, sanitizer = nvcc.find(), shutil.which("compute-sanitizer")
    probe = BUILD / "probe"
    flags = ["-std=c++17", "-O1", "-arch=native", "simt/probe.cu", "-o", str(probe)]
    build = [] if found is None else [found.path, *flags]
    missing = "no compute-sanitizer on PATH (it comes with the CUDA toolkit)"
    some = pytest(*STAGES, EXPERTS, "-k", f"cuda and ({SANITIZED})")
    checks = [
        Step(
            f"tests under {tool}",
            [sanitizer or "", "--tool", tool, "--error-exitcode", "1", *some],
            reason="" if sanitizer else missing,
        )
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ]
    return [
        Step("device", ["nvidia-smi"]),
        Step("doctor", [sys.executable, "-m", "moe_kernels", "doctor"]),
        Step("probe: build", build, reason="" if build else "no nvcc"),
        Step("probe: hardware facts against tests/golden/hw", pytest("test_simt_hw.py"),
             env={"MOE_KERNELS_PROBE": str(probe)}),
        Step("tests", pytest(*STAGES, EXPERTS, "-k", "cuda")),
        Step("tests: streams, devices, graphs", pytest("test_cuda_device.py")),
        *checks,
        Step("benchmarks", [sys.executable, "cuda_stages.py"], folder="bench"),
        Step("benchmarks of the expert MLP", [sys.executable, "cuda_experts.py"], folder="bench"),
    ]  # fmt: skip


def rehearsed() -> list[Step]:
    """The same steps on the emulator, which is its own sanitizer."""
    return [
        Step("device", [sys.executable, "-c", "import platform; print('emulated on', platform.machine())"]),
        Step("doctor", [sys.executable, "-m", "moe_kernels", "doctor"]),
        Step("probe: hardware facts against tests/golden/hw", pytest("test_simt_hw.py")),
        Step("tests", pytest(*STAGES, "-k", f"simt and ({SANITIZED})")),
        Step("tests: streams, devices, graphs", [], reason="needs a GPU: the emulator has no streams"),
        Step("tests of the expert MLP", pytest(EMULATED_EXPERTS, "-k", "absent or strides or skew")),
        Step("tests under another schedule", pytest(*STAGES, "-k", f"simt and ({SANITIZED})"),
             env={"MOE_KERNELS_SIMT_SEED": "1000"}),
        Step("benchmarks", [sys.executable, "cuda_stages.py", "--simt"], folder="bench"),
        Step("benchmarks of the expert MLP", [sys.executable, "cuda_experts.py", "--simt"], folder="bench"),
    ]  # fmt: skip


def run(step: Step) -> tuple[str, str]:
    """("passed" | "failed" | "not run", what it said)."""
    if step.reason:
        return "not run", step.reason
    env = {**os.environ, "MOE_KERNELS_STRICT": "1", **step.env}
    try:
        done = subprocess.run(
            step.command, cwd=ROOT / step.folder, env=env, text=True, timeout=STEP_SECONDS, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return "failed", str(error)
    return "passed" if done.returncode == 0 else "failed", done.stdout


def main() -> int:
    simt = os.environ.get("BACKEND", "") == "simt"
    if not simt:
        import torch

        if not torch.cuda.is_available():
            print("gpu: SKIPPED, nothing was run: torch sees no GPU here (BACKEND=simt rehearses on the emulator)")
            return cubins.SKIPPED
    title = "Rehearsal on the emulator: no figure here is of a GPU" if simt else "On a GPU"
    report = [f"# {title}", "", time.strftime("%Y-%m-%d") + f", Python {platform.python_version()}", ""]
    verdicts, details = [], []
    for step in rehearsed() if simt else on_gpu():
        begin = time.monotonic()
        verdict, said = run(step)
        verdicts.append((step.name, verdict, time.monotonic() - begin))
        print(f"gpu: {step.name}: {verdict} ({verdicts[-1][2]:.0f} s)", flush=True)
        tail = "\n".join(said.rstrip().splitlines()[-60:])
        details += [f"## {step.name}: {verdict}", "", "```", tail, "```", ""]
    report += ["| step | verdict | seconds |", "| --- | --- | ---: |"]
    report += [f"| {name} | {verdict} | {seconds:.0f} |" for name, verdict, seconds in verdicts]
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "report.md").write_text("\n".join([*report, "", *details]))
    print(f"gpu: the report is {(BUILD / 'report.md').relative_to(ROOT)}")
    return 1 if any(verdict == "failed" for _, verdict, _ in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())

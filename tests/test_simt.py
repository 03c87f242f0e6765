# SPDX-License-Identifier: Apache-2.0
"""The emulator: correct kernels run clean under every schedule, wrong ones are reported with the line that is wrong."""

import json
import re
import sys
from pathlib import Path

import pytest

SIMT = Path(__file__).with_name("simt")
sys.path.insert(0, str(SIMT))
import programs  # noqa: E402

if reason := programs.missing():
    pytest.skip(reason, allow_module_level=True)

MAIN = SIMT / "main.cpp"


@pytest.fixture(scope="module", params=["rules_sync", "rules_async"])
def rules(request):
    return programs.build(request.param, [SIMT / f"{request.param}.cu", MAIN])


@pytest.fixture(scope="module")
def faulty():
    return programs.build("faulty", [SIMT / "faulty.cu", MAIN])


@pytest.mark.parametrize("seed", programs.SEEDS)
def test_correct_kernels_run_clean(rules, seed):
    lines = programs.run(rules, seed=seed).splitlines()
    assert lines and all(line.startswith("ok ") for line in lines), "\n".join(lines)


def test_portable_fibers():
    program = programs.build("rules_ucontext", [SIMT / "rules_sync.cu", MAIN], flags="-DMOE_SIMT_UCONTEXT")
    for seed in (0, 4):
        lines = programs.run(program, seed=seed).splitlines()
        assert lines and all(line.startswith("ok ") for line in lines), "\n".join(lines)


def test_address_and_undefined_behaviour_sanitizers():
    """Without the hooks; the fibers tell the sanitizer of their stacks."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    sources = [SIMT / "rules_sync.cu", MAIN]
    program = programs.build("rules_sanitized", sources, flags=flags, link_flags=flags, hooks=False)
    for seed in (1, 5):
        lines = programs.run(program, seed=seed).splitlines()
        assert lines and all(line.startswith("ok ") for line in lines), "\n".join(lines)


FAULTS = {  # case -> the kind of report, and what it says besides its line
    "race_shared": ("race", r"of 4 bytes at shared \+0x\w+ is not ordered with the (read|write) by thread"),
    "race_global": ("race", r"write of 4 bytes at 'cudaMalloc \d+' \+0x\w+ is not ordered with the write by thread"),
    "bounds_global": ("bounds", r"write of 4 bytes outside device memory, at byte 80 of 'cudaMalloc 1', which has 80"),
    "bounds_shared": ("bounds", r"write of 4 bytes at byte 128 of the block's 128 bytes of shared memory"),
    "misaligned": ("misaligned", r"write of 8 bytes at 'cudaMalloc 1' \+0x4"),
    "uninitialised_shared": ("uninitialised", r"read of shared \+0x\w+, which nobody has written"),
    "uninitialised_global": ("uninitialised", r"read of 4 bytes at 'cudaMalloc 1' \+0x4, which nobody has written"),
    "read_only": ("read-only", r"ld.global.nc of 'cudaMalloc 1' \+0x0, which this kernel writes"),
    "deadlock_barrier": (
        "deadlock",
        r"32 \(first: thread \(0,0,0\) .*__syncthreads, barrier 0, 32 of 64 threads there",
    ),
    "deadlock_flag": ("deadlock", r"a loop that reads 'cudaMalloc \d+' \+0x0 and keeps finding 0"),
    "divergent_barrier": (
        "barrier",
        r"__syncthreads under divergence: others of the block are at the one at .*faulty.cu",
    ),
    "in_flight": ("in flight", r"read of 16 bytes at shared \+0x\w+, into which the cp.async of thread"),
    "stack_of_another": ("bounds", r"read of 4 bytes outside device memory"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_every_schedule_reports_the_fault_and_its_line(faulty, case):
    kind, text = FAULTS[case]
    source = (SIMT / "faulty.cu").read_text().splitlines()
    here = [number for number, line in enumerate(source, 1) if re.search(rf"// {case} (here|earlier)", line)]
    for seed in programs.SEEDS:
        report = programs.run(faulty, case, seed=seed)
        assert report.startswith(f"WRONG {case}: {kind}: "), report
        assert re.search(text, report), report
        assert not here or any(f"faulty.cu:{line}" in report for line in here), report
        assert re.search(rf"replay: MOE_KERNELS_SIMT_SEED={seed}\n", report), report


def test_a_seed_replays(faulty):
    """The same seed is the same run: the same threads meet."""
    reports = {seed: programs.run(faulty, "race_global", "race_shared", seed=seed) for seed in range(12)}
    assert all(programs.run(faulty, "race_global", "race_shared", seed=seed) == text for seed, text in reports.items())
    assert len({re.sub(r"(schedule|replay).*", "", text) for text in reports.values()}) > 3, "the seed changes nothing"


@pytest.fixture(scope="module")
def audit():
    return programs.build("audit", [SIMT / "audit.cu"])


@pytest.mark.parametrize(
    ("space", "stride", "width", "offset", "served", "ideal"),
    [  # 32 banks of 4 bytes; sectors of 32 bytes
        ("shared", 4, 4, 0, 1, 1),
        ("shared", 8, 4, 0, 2, 1),
        ("shared", 12, 4, 0, 1, 1),
        ("shared", 128, 4, 0, 32, 1),
        ("shared", 0, 4, 0, 1, 1),
        ("shared", 8, 8, 0, 2, 2),
        ("shared", 16, 16, 0, 4, 4),
        ("shared", 128, 16, 0, 32, 4),
        ("shared", 144, 16, 0, 4, 4),
        ("global", 4, 4, 0, 4, 4),
        ("global", 4, 4, 4, 5, 4),
        ("global", 16, 16, 0, 16, 16),
        ("global", 32, 4, 0, 32, 4),
        ("global", 0, 4, 0, 1, 1),
    ],
)
def test_address_audit_counts(audit, space, stride, width, offset, served, ideal):
    sites = json.loads(programs.run(audit, space, str(stride), str(width), str(offset), seed=4))
    reads = [s for s in sites if s["space"] == space and s["kind"] == "read" and s["bytes"] >= width]
    assert len(reads) == 1
    assert (reads[0]["requests"], reads[0]["served"], reads[0]["ideal"]) == (1, served, ideal)
    assert re.search(r"audit.cu:\d+", reads[0]["site"])


@pytest.mark.parametrize(("stride", "served"), [(1, 4), (2, 6), (32, 74)])
def test_address_audit_pairs_the_lanes_of_a_round(audit, stride, served):
    """37 numbers by 32 lanes, twice: rounds of 32 and of 5 lanes, however many turns a lane had before."""
    sites = json.loads(programs.run(audit, "rounds", str(stride), "4", "37", seed=4))
    reads = [s for s in sites if s["space"] == "shared" and s["kind"] == "read"]
    assert [(s["requests"], s["served"], s["ideal"]) for s in reads] == [(4, served, 4)]


def test_assembly_stands_in_one_file_and_has_a_twin():
    """Every asm statement is in a ptx*.cuh, beside its emulated twin; no kernel has static shared memory."""
    cuda = SIMT.parents[1] / "csrc/cuda"
    files = ("ptx.cuh", "ptx_sm90.cuh")
    for file in [*cuda.glob("*.cuh"), *cuda.glob("*.cu"), *cuda.glob("*.h")]:
        text = re.sub(r"//.*", "", file.read_text())
        assert file.name in files or not re.search(r"\basm\b", text), file
        assert file.name == "device.h" or "__shared__" not in text, file
    ptx = "".join((cuda / name).read_text() for name in files)
    heads = re.compile(r"^(?:template <[^>]*> )?MOE_DEVICE \w+ (\w+)\(", re.M)
    starts = [*heads.finditer(ptx)]
    ends = [*(match.start() for match in starts[1:]), len(ptx)]
    assert len(starts) > 70
    untwinned = [m[1] for m, end in zip(starts, ends, strict=True) if "MOE_TWIN(" not in ptx[m.start() : end]]
    assert untwinned == ["cvt_f32_bf16"]  # a shift everywhere

# SPDX-License-Identifier: Apache-2.0
"""The emulator's Hopper half: TMA, wgmma, register counts, clusters. Correct kernels run clean under every schedule,
wrong ones are reported with the line that is wrong."""

import re
import sys
from pathlib import Path

import pytest

SIMT = Path(__file__).with_name("simt")
sys.path.insert(0, str(SIMT))
import programs  # noqa: E402

if reason := programs.missing():
    pytest.skip(reason, allow_module_level=True)

SHARED_SOURCES = [SIMT / "main.cpp", SIMT.parents[1] / "csrc/cuda/tensor_map.cu"]


@pytest.fixture(scope="module", params=["rules_sm90", "rules_cluster"])
def rules(request):
    return programs.build(request.param, [SIMT / f"{request.param}.cu", *SHARED_SOURCES])


@pytest.mark.parametrize("seed", programs.SEEDS)
def test_correct_kernels_run_clean(rules, seed):
    lines = programs.run(rules, seed=seed).splitlines()
    assert lines and all(line.startswith("ok ") for line in lines), "\n".join(lines)


FAULTS = {  # case -> the kind of report, and what it says besides its line
    "unfenced_store": ("proxy", r"read of 8192 bytes .* between the write by thread .* no fence.proxy.async"),
    "unfenced_wgmma": ("proxy", r"read of 16 bytes .* no fence.proxy.async"),
    "unfenced_copy": ("proxy", r"read of 16 bytes .* no fence.proxy.async"),
    "unfenced_overwrite": ("proxy", r"write of 8192 bytes .* no fence.proxy.async"),
    "unfenced_global": ("proxy", r"read of 128 bytes at 'cudaMalloc 1' .* no fence.proxy.async"),
    "no_wgmma_fence": ("wgmma.fence", r"wgmma before any wgmma.fence"),
    "touched_accumulator": ("wgmma.fence", r"accumulators that were touched after the last wgmma.fence"),
    "touched_a": ("wgmma.fence", r"reads registers that were written after the last wgmma.fence"),
    "early_accumulator": ("in flight", r"read of an accumulator of the wgmma at .*, which has not been waited for"),
    "unwaited_load": ("race", r"read of 16 bytes .* not ordered with the write by the TMA load for the mbarrier"),
    "overwritten_operand": ("race", r"write of 8192 bytes .* not ordered with the read by the wgmma of warpgroup 0"),
    "overwritten_staging": ("race", r"write of 4 bytes .* not ordered with the read by the bulk store of thread 0"),
    "unwaited_store": ("race", r"read of 4 bytes at 'cudaMalloc 1' .* not ordered with the write by the bulk store"),
    "exit_wgmma": ("async", r"the block ended with a wgmma of thread"),
    "exit_load": ("async", r"the block ended with a TMA load for the mbarrier at shared \+0x\w+ that nobody"),
    "exit_store": ("async", r"the block ended with a bulk store of thread"),
    "few_bytes": ("deadlock", r"0 arrivals and -4096 bytes to come"),
    "many_bytes": ("deadlock", r"0 arrivals and 16 bytes to come"),
    "unaligned_128": ("descriptor", r"a starts at 0x\w+, which is no multiple of 1024"),
    "unaligned_64": ("descriptor", r"a starts at 0x\w+, which is no multiple of 512"),
    "unaligned_32": ("descriptor", r"a starts at 0x\w+, which is no multiple of 256"),
    "unaligned_box": ("misaligned", r"TMA load at shared address 0x\w+, which must be a multiple of 1024"),
    "odd_columns": ("wgmma", r"n = 12: a multiple of 8 from 8 to 256"),
    "tile_outside": ("bounds", r"a of wgmma at byte \d+ of the block's"),
    "no_map": ("tensor map", r"TMA load with what no cuTensorMapEncodeTiled has encoded"),
    "narrow_box": ("tensor map", r"rows of 64 bytes under a swizzle of 128"),
    "half_warpgroup": ("warpgroup", r"wgmma.mma_async after thread .* has ended|ends while others of its warpgroup"),
    "unequal_operands": ("warpgroup", r"operands that differ between threads of the warpgroup"),
    "uneven_registers": ("setmaxnreg", r"40 and 48 registers in one warpgroup|48 and 40 registers in one warpgroup"),
    "registers_of_nobody": ("deadlock", r"setmaxnreg.inc, for registers"),
    "decrease_up": ("setmaxnreg", r".dec to 176 registers in a warpgroup that has 168"),
    "increase_down": ("setmaxnreg", r".inc to 160 registers in a warpgroup that has 168"),
    "registers_by_four": ("setmaxnreg", r"44 registers: a multiple of 8 from 24 to 256"),
    "too_few_registers": ("setmaxnreg", r"16 registers: a multiple of 8 from 24 to 256"),
    "early_exit": ("cluster", r"ended without knowing of an access|at block 1 of the cluster, which has ended"),
    "foreign_multicast": ("cluster", r"TMA multicast to blocks 0x4 of a cluster of 2"),
    "unmet_neighbour": ("mbarrier", r"is not ordered after its mbarrier.init|which was not initialised"),
    "overwritten_neighbour": ("race", r"is not ordered with the write by"),
    "independent": ("grid", r"of a dependent launch ended without griddepcontrol.wait"),
    "large_shared": ("launch", r"at most 227 KiB of dynamic shared memory"),
    "odd_cluster": ("launch", r"the grid is no multiple of the cluster"),
}


@pytest.fixture(scope="module", params=programs.SEEDS)
def reports(request):
    """Seed, and the report of every case under it."""
    faulty = programs.build("faulty_sm90", [SIMT / "faulty_sm90.cu", *SHARED_SOURCES])
    text = "\n" + programs.run(faulty, seed=request.param)
    found = {}
    for report in re.split(r"\n(?=ok |WRONG )", text):
        if match := re.match(r"(?:ok|WRONG) (\w+)", report):
            found[match[1]] = report
    return request.param, found


def test_every_schedule_reports_every_fault_and_its_line(reports):
    seed, found = reports
    assert set(found) == set(FAULTS)
    source = (SIMT / "faulty_sm90.cu").read_text().splitlines()
    for case, (kind, text) in FAULTS.items():
        report = found[case]
        assert report.startswith(f"WRONG {case}: {kind}: "), report
        assert re.search(text, report), report
        here = [number for number, line in enumerate(source, 1) if re.search(rf"// {case} (here|earlier)", line)]
        assert not here or any(f"faulty_sm90.cu:{line}" in report for line in here), report
        assert re.search(rf"replay: MOE_KERNELS_SIMT_SEED={seed}$", report), report

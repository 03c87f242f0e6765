# SPDX-License-Identifier: Apache-2.0
"""The mutation suite: plants faults in the kernels and asks the emulator to report each of them, in every run.

    python tests/mutants/run.py [SUBJECT ...] [--list] [--third N] [-v]

A fault is caught if every seed reports it; one that only costs speed, if the address audit counts more. What is neither
stands in survivors.py with the proof that it is harmless; a proof that is no longer needed is an error too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/simt"), str(ROOT / "tests/mutants")]
import by_hand  # noqa: E402
import generate  # noqa: E402
import programs  # noqa: E402
import survivors  # noqa: E402

# What is mutated, and the files that are compiled with it.
SUBJECTS: dict[str, tuple[list[str], list[str]]] = {
    "rules_sync": (["tests/simt/rules_sync.cu"], ["tests/simt/rules_sync.cu"]),
    "rules_async": (["tests/simt/rules_async.cu"], ["tests/simt/rules_async.cu"]),
    "rules_sm90": (["tests/simt/rules_sm90.cu"], ["tests/simt/rules_sm90.cu", "csrc/cuda/tensor_map.cu"]),
    "rules_cluster": (["tests/simt/rules_cluster.cu"], ["tests/simt/rules_cluster.cu", "csrc/cuda/tensor_map.cu"]),
    "route": (
        [f"csrc/cuda/{name}.cuh" for name in ("route", "scores", "score_sums", "block_copy", "warp")],
        ["csrc/cuda/route.cu", "csrc/cuda/sum_scores.cu", "tests/mutants/route_cases.cpp"],
    ),
    "sum_scores": (["csrc/cuda/sum_scores.cuh"], ["csrc/cuda/sum_scores.cu", "tests/mutants/sum_scores_cases.cpp"]),
    "limit_capacity": (
        ["csrc/cuda/limit_capacity.cuh"],
        ["csrc/cuda/limit_capacity.cu", "tests/mutants/limit_capacity_cases.cpp"],
    ),
    "permute": (
        ["csrc/cuda/permute.cuh", "csrc/cuda/slots.cuh"],
        ["csrc/cuda/permute.cu", "tests/mutants/permute_cases.cpp"],
    ),
    "expert_choice": (
        ["csrc/cuda/expert_choice.cuh"],
        ["csrc/cuda/expert_choice.cu", "tests/mutants/expert_choice_cases.cpp"],
    ),
    "sinkhorn": (["csrc/cuda/sinkhorn.cuh"], ["csrc/cuda/sinkhorn.cu", "tests/mutants/sinkhorn_cases.cpp"]),
    "unpermute": (["csrc/cuda/unpermute.cuh"], ["csrc/cuda/unpermute.cu", "tests/mutants/unpermute_cases.cpp"]),
    "fused_experts": (
        ["csrc/cuda/fused_experts.cuh", "csrc/cuda/grouped_fma.cuh"],
        [
            "csrc/cuda/fused_experts.cu",
            "csrc/cuda/grouped_fma.cu",
            "csrc/cuda/unpermute.cu",
            "tests/mutants/fused_experts_cases.cpp",
        ],
    ),
    "grouped_wgrad": (
        ["csrc/cuda/grouped_wgrad.cuh", "csrc/cuda/mma_tile.cuh"],
        ["csrc/cuda/grouped_wgrad.cu", "tests/mutants/wgrad_cases.cpp"],
    ),
    "grouped_gemm": (
        ["csrc/cuda/grouped_gemm.cuh", "csrc/cuda/tile_scheduler.cuh"],
        ["csrc/cuda/grouped_gemm_bf16.cu", "tests/mutants/gemm_cases.cpp"],
    ),
    "decode": (
        ["csrc/cuda/decode.cuh", "csrc/cuda/expert_rows.cuh"],
        ["csrc/cuda/decode.cu", "csrc/cuda/permute.cu", "tests/mutants/decode_cases.cpp"],
    ),
}
# Constants made small in the copy, so that tiny shapes take every path: several tiles, several turns of a block.
SMALLER: dict[str, tuple[str, str]] = {
    "csrc/cuda/launch.h": ("kMostBlocks = 132 * 8", "kMostBlocks = 2"),
    "csrc/cuda/route_tile.h": ("kFewBlocks = 64;", "kFewBlocks = 2;"),
    "csrc/cuda/sum_scores.cu": ("most_groups = 65535", "most_groups = 1"),
    "csrc/cuda/expert_choice.cu": ("most = 132 * 8", "most = 2"),
    "csrc/sinkhorn.h": ("kTileTokens = 64", "kTileTokens = 8"),
    "csrc/cuda/fused_experts.cu": ("s.E < 65535 ? s.E : 65535", "s.E < 2 ? s.E : 2"),
    "csrc/cuda/grouped_fma.cu": ("parts < 65535 ? parts : 65535", "parts < 1 ? parts : 1"),
    "csrc/cuda/permute.cu": ("blocks < 1056 ? blocks : 1056", "blocks < 1 ? blocks : 1"),
    "csrc/cuda/grouped_gemm_config.h": (  # two tiles are enough to go through every path
        '    {"wgmma 2x128x256", 128, 256, 128, 4, 8, 1, false, 2, false, 2},\n'
        '    {"wgmma 128x256", 128, 256, 128, 4, 8, 1, false, 2},\n'
        '    {"wgmma 2x64x256", 64, 256, 128, 5, 4, 1, false, 2, true, 2},\n'
        '    {"wgmma 64x256", 64, 256, 128, 5, 4, 1, false, 2, true},\n'
        '    {"mma 128x256", 128, 256, 64, 4, 2, 4, false},\n    {"mma 128x128", 128, 128, 64, 3, 2, 2, true},\n',
        "",
    ),
    "csrc/cuda/permute_tile.h": (
        "kTileSlots = 2048;       // of a block, where there are several\nconstexpr int64_t kOneBlockSlots = 16384",
        "kTileSlots = 288;\nconstexpr int64_t kOneBlockSlots = 200",
    ),
}
TIMEOUT = 300.0


@dataclass
class Verdict:
    fault: generate.Fault
    caught: int  # runs
    runs: int
    report: str  # the first thing that was noticed
    audit: str

    @property
    def kind(self) -> str:
        return "caught" if self.caught == self.runs else "audit" if self.audit else "survived"


def planted(subject: str) -> tuple[Path, list[generate.Fault]]:
    """Copies the sources, plants the faults of the subject in the copy, and builds it."""
    tree = ROOT / "build/mutants" / subject
    faults: list[generate.Fault] = []
    mutated, sources = SUBJECTS[subject]
    copy = partial(copy_if_changed, written=(*SMALLER, *mutated))
    for folder in ("csrc", "tests/simt", "tests/mutants"):
        shutil.copytree(ROOT / folder, tree / folder, dirs_exist_ok=True, copy_function=copy)
    for file in mutated:
        edits = by_hand.FAULTS.get(file, [])
        text, new = generate.plant(file, (ROOT / file).read_text(), edits, faults[-1].number + 1 if faults else 0)
        faults += new
        depth = "../" * file.count("/")
        text = f'#include "{depth}tests/mutants/faults.h"\n#line 1 "{file}"\n{text}'
        write_if_changed(tree / file, text)
    for file, (old, new) in SMALLER.items():
        text = (ROOT / file).read_text()
        if old not in text:
            raise SystemExit(f"{file} no longer says: {old}")
        write_if_changed(tree / file, text.replace(old, new))
    extra = ["tests/mutants/main.cpp", "tests/mutants/faults.cpp"]
    program = programs.build(f"mutants_{subject}", [tree / source for source in [*sources, *extra]])
    return program, faults


def write_if_changed(path: Path, text: str) -> None:
    if path.read_text() != text:
        path.write_text(text)


def copy_if_changed(source: str, target: str, written: tuple[str, ...]) -> str:
    """The files `written` differ from their sources on purpose; they are written again by the caller, if changed."""
    to = Path(target)
    if to.exists() and (to.read_bytes() == Path(source).read_bytes() or str(target).endswith(written)):
        return target
    return str(shutil.copyfile(source, target))


def judge(program: Path, fault: generate.Fault) -> Verdict:
    seeds = [str(seed) for seed in programs.SEEDS]
    try:
        command = [str(program), str(fault.number), *seeds]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        lines, crashed = done.stdout.splitlines(), done.returncode != 0
    except subprocess.TimeoutExpired as error:
        lines, crashed = (error.stdout or b"").decode().splitlines(), True
    runs = [line for line in lines if line.startswith("seed ")]
    caught = [line for line in runs if " caught " in line]
    audit = next((line for line in lines if line.startswith("audit ")), "")
    report = caught[0].split(" caught ", 1)[1] if caught else ("the run did not end" if crashed else "")
    return Verdict(fault, len(caught), len(seeds), report, audit)


def report(verdicts: list[Verdict], *, whole: bool, verbose: bool) -> int:
    """Prints what stands out; returns how many faults are neither caught nor proved harmless, and how many proofs are
    of no use. whole: all faults of their files are here."""
    open_, harmless, used = 0, 0, set[str]()
    for verdict in verdicts:
        proof = survivors.HARMLESS.get(verdict.fault.key)
        if verdict.kind == "survived":
            used.add(verdict.fault.key)
            harmless += proof is not None
            open_ += proof is None
            mark = "harmless" if proof else "SURVIVED"
            if verbose or not proof:
                print(f"{mark} {verdict.caught}/{verdict.runs} {verdict.fault}  {proof or verdict.report}")
        elif verbose:
            print(
                f"{verdict.kind} {verdict.caught}/{verdict.runs} {verdict.fault}\n    {verdict.audit or verdict.report}"
            )
    keys, files = {verdict.fault.key for verdict in verdicts}, {verdict.fault.file for verdict in verdicts}
    for key in survivors.HARMLESS:
        if key not in used and (key in keys or (whole and key.split(" | ")[0] in files)):
            print(f"survivors.py proves harmless what is caught or gone: {key}")
            open_ += 1
    kinds = [verdict.kind for verdict in verdicts]
    print(
        f"{len(verdicts)} faults: {kinds.count('caught')} reported in every run, {kinds.count('audit')} by the address "
        f"audit, {harmless} proved harmless, {kinds.count('survived') - harmless} open"
    )
    return open_


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []], help="default: all")
    parser.add_argument("--list", action="store_true", help="only list the faults")
    parser.add_argument("--third", type=int, default=None, help="0, 1 or 2: only every third fault, from this one on")
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    verdicts: list[Verdict] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for subject in options.subjects or SUBJECTS:
            begin = time.monotonic()
            program, faults = planted(subject)
            if options.third is not None:
                faults = faults[options.third :: 3]
            if options.list:
                print("\n".join(f"{fault.number} {fault}" for fault in faults))
                continue
            if judge(program, generate.Fault(-1, "", 0, "", "")).caught:
                raise SystemExit(f"{subject}: reported without any fault")
            built = time.monotonic()
            verdicts += pool.map(lambda fault, program=program: judge(program, fault), faults)
            print(
                f"{subject}: {len(faults)} faults, built in {built - begin:.0f} s, ran {time.monotonic() - built:.0f} s"
            )
    return report(verdicts, whole=options.third is None, verbose=options.verbose) if verdicts else 0


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)

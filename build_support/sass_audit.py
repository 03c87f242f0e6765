# SPDX-License-Identifier: Apache-2.0
"""Reads what ptxas made of every kernel and holds it against build_support/budgets.json.

    python build_support/sass_audit.py            prints the table; fails where a kernel is over its budget
    python build_support/sass_audit.py --write    takes what is there as the budget, and writes docs/cuda_audit.md

Registers, spills and instructions come from the cubins of `make cuda` through cuobjdump and nvdisasm; shared memory
from the launchers' own layout headers; occupancy from both and the limits of the processor. Exit status as cubins.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import cubins
import nvcc

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "build_support/budgets.json"
PAGE = ROOT / "docs/cuda_audit.md"
SLACK = 1.05  # instructions may grow by this much before someone has to look; nothing else may grow


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    registers: int
    warps: int
    blocks: int
    shared: int  # bytes; each block takes 1024 of them for itself


LIMITS = {"80": Limits(65536, 64, 32, 164 * 1024), "90a": Limits(65536, 64, 32, 228 * 1024)}

# The shared memory and the threads of a block at the shapes named, asked of the headers that the launchers use.
LAYOUT = """
#include <cstdio>
#include <initializer_list>
#include "cuda/decode.cuh"
#include "cuda/expert_choice_tile.h"
#include "cuda/grouped_fma.cuh"
#include "cuda/grouped_gemm_config.h"
#include "cuda/grouped_wgrad.cuh"
#include "cuda/permute_tile.h"
#include "cuda/route_tile.h"
using namespace moe::cuda;
int main() {
  for (int element : {8, 4, 2})
    for (int E : {8, 64, 128, 256, 512, 2048})
      for (int backward : {0, 1}) {
        const RouteTile t = route_tile(32768, E, 1, E < 8 ? E : 8, element, backward, true);
        std::printf("route%s %d %d %d %u\\n", backward ? "_backward" : "", element, E, t.warps, t.bytes);
        const RouteTile s = route_tile(32768, E, 1, 0, element, backward, true);
        std::printf("sum_scores%s %d %d %d %u\\n", backward ? "_backward" : "", element, E, s.warps, s.bytes);
      }
  for (int element : {8, 4, 2})
    for (int E : {8, 64, 128, 256, 512, 2048}) {
      const int acc = element == 8 ? 8 : 4;
      std::printf("expert_scores %d %d %d %u\\n", element, E, kChoiceWarps, choice_tile(E, acc, 32).bytes);
      std::printf("expert_slots %d %d %d %u\\n", element, E, kChoiceWarps, choice_tile(E, acc, kChoiceWarps).bytes);
      std::printf("sinkhorn %d %d 8 %u\\n", element, E, (E + 256) * acc);
    }
  for (int E : {8, 64, 128, 256, 512, 2048})
    for (long S : {16384L, 262144L}) {
      const IndexTile t = index_tile(S, E);
      std::printf("%s 0 %d %d %u\\n", t.tiles == 1 ? "permute_index" : "permute_place", E, t.warps, t.bytes);
      for (const char* name : {t.tiles == 1 ? "limit_capacity" : "limit_count", t.tiles == 1 ? "" : "limit_drop"})
        if (*name) std::printf("%s 0 %d %d %u\\n", name, E, t.warps, t.offsets);
    }
  std::printf("grouped_wgrad 4 0 4 %u\\n", WgradTile<float>::kBytes);
  std::printf("grouped_wgrad 2 0 4 %u\\n", WgradTile<moe::bf16>::kBytes);
  const int fma_bytes = 2 * kWgradFmaDepth * kWgradFmaWidth * 4;
  for (int element : {8, 4, 2}) std::printf("grouped_wgrad_fma %d 0 8 %d\\n", element, fma_bytes * (1 + element / 8));
  for (int slots : {8, 64, 512}) {
    std::printf("decode_w13 2 %d %d %d\\n", slots, kDecodeWarps, (slots > 64 ? 64 : 8) * DecodeParts<2>::kPitch * 4);
    const int parts = kDecodeTokens * DecodeParts<1>::kPitch * 4, list = slots * 12 + 16;
    std::printf("decode_w2 2 %d %d %d\\n", slots, kDecodeWarps, list + slots * kDecodeRows * 4 + parts);
  }
  for (int halves : {1, 2})
    for (int element : {8, 4, 2}) {
      const size_t of_float = halves == 1 ? sizeof(FmaShared<float, 1>) : sizeof(FmaShared<float, 2>);
      const size_t of_double = halves == 1 ? sizeof(FmaShared<double, 1>) : sizeof(FmaShared<double, 2>);
      std::printf("grouped_fma %d 0 4 %zu\\n", 10 * halves + element, element == 8 ? of_double : of_float);
    }
  for (int row = 0; row < kFma; ++row)
    std::printf("grouped_rows%s %d 0 %d %d\\n", kTileRows[row].wgmma() ? "_sm90" : "", row, kTileRows[row].warps(),
                kTileRows[row].shared_bytes());
}
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    registers: int
    stack: int
    local_accesses: int  # LDL and STL: what spills turn into
    instructions: int
    global_accesses: int
    shared_accesses: int
    collectives: int  # shuffles, votes, matches, reductions
    double_precision: int
    slots_per_mma: float  # instructions of the innermost loop with tensor-core products, for each of those; 0: none


def tool(name: str) -> str:
    """cuobjdump or nvdisasm from its package. Errors: RuntimeError that says what to install."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or [] if found else []:
        for path in Path(folder).glob(f"*/bin/{name}"):
            return str(path)
    raise RuntimeError(f"audit: no {name}: pip install nvidia-cuda-{name} (Makefile has the version)")


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(names: list[str]) -> list[str]:
    """Short names such as route<bf16>, without arguments and namespaces."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = [re.sub(r"moe::(cuda::)?|^void |\(.*", "", line) for line in text.splitlines()]
    words = {"unsigned short": "2 bytes", "unsigned int": "4 bytes", "uint2": "8 bytes", "uint4": "16 bytes"}
    for index, name in enumerate(short):
        for word, meaning in words.items():
            name = name.replace(f"<{word}>", f"<{meaning}>")
        short[index] = name.replace("_kernel", "")
    return short


_LINE = re.compile(r"^\s*(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M)


def slots_per_mma(code: str) -> float:
    """Instructions of the shortest backward branch's span that holds HMMA or HGMMA, over those in it."""
    labels: dict[str, int] = {}
    words: list[str] = []
    spans = []
    for label, word, operands in _LINE.findall(code):
        if label:
            labels[label] = len(words)
            continue
        words.append(word.split(".")[0])
        target = re.search(r"\.L_\w+", operands)
        if words[-1] == "BRA" and target and target[0] in labels:
            span = words[labels[target[0]] :]
            if products := span.count("HMMA") + span.count("HGMMA"):
                spans.append((len(span), products))
    return round(min(spans)[0] / min(spans)[1], 1) if spans else 0.0


def read(cubin: Path) -> dict[str, Kernel]:
    """Every kernel of a cubin, by its short name."""
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", run(tool("cuobjdump"), "-res-usage", str(cubin)))
    parts = re.split(r"//-+ \.text\.(\w+)\s+-+", run(tool("nvdisasm"), "-c", str(cubin)))
    code = dict(zip(parts[1::2], parts[2::2]))
    kernels = {}
    for (mangled, registers, stack), name in zip(usage, demangled([u[0] for u in usage])):
        words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code[mangled])
        count = Counter(word.split(".")[0] for word in words if word != "NOP")

        def of(*opcodes: str, count: Counter[str] = count) -> int:
            return sum(count[opcode] for opcode in opcodes)

        kernels[name] = Kernel(
            registers=int(registers), stack=int(stack), local_accesses=of("LDL", "STL"),
            instructions=sum(count.values()), global_accesses=of("LDG", "STG", "LDGSTS", "RED", "ATOMG"),
            shared_accesses=of("LDS", "STS", "ATOMS"), collectives=of("SHFL", "VOTE", "MATCH", "REDUX", "CREDUX"),
            double_precision=of("DADD", "DMUL", "DFMA", "DSETP", "MUFU64"), slots_per_mma=slots_per_mma(code[mangled]),
        )  # fmt: skip
    return kernels


def layouts() -> dict[tuple[str, int], dict[int, tuple[int, int]]]:
    """(kernel, element bytes, or row of kTileRows, or 0) -> E, or 0 -> (warps, bytes of shared memory) of a block."""
    source, program = cubins.BUILD / "layout.cpp", cubins.BUILD / "layout"
    source.write_text(LAYOUT)
    flags = ("-std=c++17", "-DMOE_SIMT", f"-I{ROOT / 'csrc'}")  # device headers too, for their constants
    run(*os.environ.get("CXX", "c++").split(), *flags, str(source), "-o", str(program))
    table: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}
    for line in run(str(program)).splitlines():
        name, element, experts, warps, size = line.split()
        table.setdefault((name, int(element)), {})[int(experts)] = (int(warps), int(size))
    return table


def occupancy(arch: str, registers: int, warps: int, shared: int) -> float:
    """Resident warps over the most a multiprocessor holds."""
    limit = LIMITS[arch]
    by_registers = limit.registers // (-(-registers // 8) * 8 * 32) // warps
    by_shared = limit.shared // (shared + 1024)
    return min(by_registers, by_shared, limit.blocks, limit.warps // warps) * warps / limit.warps


# Warps and bytes of shared memory where they do not depend on E.
SHARED = {
    "permute_scan": (32, 4096), "limit_scan": (32, 4096), "add_rows<float>": (32, 4096), "add_rows<double>": (32, 8192)
}  # fmt: skip
# Issue slots of the main loop for each of its products on tensor cores. Six leaves them busy, but for two kernels that
# wait for weights, which nobody uses twice. A multiprocessor gets 48 bytes a clock from L2 (kProcessors) and has four
# schedulers: a product that takes b bytes of weights has 4 * b / 48 slots.
#   16 rows in tf32   8 columns x 8 numbers of 4 bytes: 21. Each product rounds two registers that are its own and a
#                     quarter of four: 1 + 3, and reads 3/4 and copies 9/16 pieces of 16 bytes, each with an address.
#   decode            16 rows of weights x 16 numbers of 2 bytes: 42. No barrier, no shared memory in its loop.
SLOTS_PER_MMA = 6
MMA_SLOTS = {f"grouped_rows<float, 7, {along}>": 10 for along in ("true", "false")}
WEIGHTS_ONCE = 4 * 16 * 16 * 2 // 48
MOST_PRODUCTS = 48  # kernels of grouped products on one architecture, of the portable ones and of those of sm_90a
HGMMA_SLOTS = 12  # of 128 clocks each; a third of them set descriptors, some are NOPs
ELEMENT = {"double": 8, "float": 4, "bf16": 2, "f16": 2}


def occupancies(name: str, arch: str, kernel: Kernel, table: dict) -> dict[int, float]:
    """E -> occupancy; the key 0 where E does not matter."""
    stem, _, argument = name.partition("<")
    words = argument.rstrip(">").split(", ")
    which = int(words[1]) if stem in ("grouped_rows", "grouped_rows_sm90") else ELEMENT.get(words[0], 0)
    which += 10 * int(words[1]) if stem == "grouped_fma" else 0
    of_kernel = table.get((stem, which)) or table.get((stem, 0))
    if of_kernel is None:
        warps, size = SHARED.get(name, (8, 0))
        return {0: occupancy(arch, kernel.registers, warps, size)}
    return {E: occupancy(arch, kernel.registers, warps, size) for E, (warps, size) in of_kernel.items()}


def complaints(arch: str, found: dict[str, Kernel], budget: dict[str, dict[str, int]], table: dict) -> list[str]:
    """What is over its budget, and kernels over the logits of low occupancy."""
    said = [f"sm_{arch} {name}: no budget (--write)" for name in found.keys() - budget.keys()]
    said += [f"sm_{arch} {name}: in budgets.json, but not compiled" for name in budget.keys() - found.keys()]
    for name, kernel in found.items():
        if kernel.local_accesses or kernel.stack:
            said.append(f"sm_{arch} {name}: {kernel.local_accesses} local accesses, {kernel.stack} bytes of stack")
        for field, value in asdict(kernel).items():
            most = budget.get(name, {}).get(field)
            if most is not None and value > most * (SLACK if field == "instructions" else 1):
                said.append(f"sm_{arch} {name}: {field} {value}, budget {most}")
        most = MMA_SLOTS.get(name, WEIGHTS_ONCE if name.startswith("decode") else SLOTS_PER_MMA)
        on_tensor_cores = name.startswith(("grouped_wgrad<", "grouped_rows<", "decode_w13<", "decode_w2<"))
        if on_tensor_cores and not 0 < kernel.slots_per_mma <= most:
            said.append(f"sm_{arch} {name}: {kernel.slots_per_mma} slots per HMMA, wanted {most}")
        if arch == "90a" and name.startswith("grouped_rows_sm90<") and not 0 < kernel.slots_per_mma <= HGMMA_SLOTS:
            said.append(f"sm_{arch} {name}: {kernel.slots_per_mma} slots per HGMMA, wanted {HGMMA_SLOTS}")
        if name.startswith(("route", "sum_scores")) and "double" not in name:
            for E, share in occupancies(name, arch, kernel, table).items():
                if E <= 512 and share < 0.5:
                    said.append(f"sm_{arch} {name}: occupancy {share:.0%} at E={E}, wanted 50 %")
    names = [name.split("<")[0] for name in found if name.startswith("grouped_")]
    for kind, products in (
        ("portable", [n for n in names if "sm90" not in n]),
        ("sm_90a", [n for n in names if "sm90" in n]),
    ):
        if len(products) > MOST_PRODUCTS:
            said.append(f"sm_{arch}: {len(products)} {kind} kernels of grouped products, wanted {MOST_PRODUCTS}")
    return said


def page(found: dict[str, dict[str, Kernel]], table: dict, version: str) -> str:
    """The table as Markdown."""
    lines = [
        "# What ptxas makes of the kernels",
        "",
        f"Written by `make audit ARGS=--write` with nvcc {version}; `make audit` fails when a kernel gets worse.",
        "Read from the machine code, nothing is measured: registers and occupancy say what a multiprocessor can hold,",
        "not how fast it is. No kernel spills. Slots per HMMA: instructions of the main loop for each of its products",
        "on tensor cores. Occupancy is of 64 warps; where it depends on E: E = 8 / 128 / 512; of decode: 8 / 64 / 512",
        "slots.",
        "",
        "| kernel | arch | registers | instructions | global | shared | collectives | slots per HMMA | occupancy |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for arch, kernels in found.items():
        for name, k in sorted(kernels.items()):
            share = occupancies(name, arch, k, table)
            keys = [E for E in (8, 128, 512) if E in share] or share
            shown = " / ".join(f"{share[E]:.0%}" for E in keys) or "-"
            counts = (k.registers, k.instructions, k.global_accesses, k.shared_accesses, k.collectives, k.slots_per_mma)
            lines.append(f"| `{name}` | sm_{arch} | " + " | ".join(map(str, counts)) + f" | {shown} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    found = nvcc.find()
    if found is None:
        print("audit: SKIPPED, nothing was read: no nvcc to compile the kernels with")
        return cubins.SKIPPED
    try:
        files = cubins.build(found)
        by_arch: dict[str, dict[str, Kernel]] = {}
        for path in files:
            by_arch.setdefault(path.suffixes[-2].removeprefix(".sm_"), {}).update(read(path))
    except RuntimeError as error:
        print(error)
        return 1
    table = layouts()
    text = page(by_arch, table, found.version)
    if "--write" in arguments:
        budgets = {a: {n: asdict(k) for n, k in sorted(kernels.items())} for a, kernels in by_arch.items()}
        BUDGETS.write_text(json.dumps({"nvcc": found.version, "kernels": budgets}, indent=1) + "\n")
        PAGE.write_text(text)
    budgets = json.loads(BUDGETS.read_text())
    print(text)
    said = []
    if budgets["nvcc"] != found.version:
        print(f"audit: the budgets are of nvcc {budgets['nvcc']}, this is {found.version}: only spills are checked")
        budgets["kernels"] = {arch: {name: {} for name in kernels} for arch, kernels in by_arch.items()}
    for arch, kernels in by_arch.items():
        said += complaints(arch, kernels, budgets["kernels"].get(arch, {}), table)
    print("\n".join(said) or f"audit: {sum(map(len, by_arch.values()))} kernels within their budgets")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""The documents tell the truth: snippets run, paths exist, words work, the stage table matches the tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_kernels as mk
from moe_kernels import cli

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["route", "permute", "grouped_gemm", "unpermute", "limit_capacity", "sum_scores", "expert_choice", "sinkhorn",
          "fused_experts"]  # fmt: skip
DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
# made by a command, or of others
ELSEWHERE = {"demo_out/demo.json", "config.json", "compile_commands.json", "torch/extension.h"}


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def quoted(document: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def test_readme_snippets_run() -> None:
    """One after the other, as a reader would type them."""
    pytest.importorskip("transformers")
    snippets = blocks("README.md", "python")
    assert len(snippets) >= 4
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["model"].config._experts_implementation == "moe_kernels"
    assert names["y"].shape == (5, 64)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    named = [n for n in quoted(document) if re.fullmatch(r"[\w./-]+(\.(py|cpp|h|md|txt|toml|json)|/)", n)]
    missing = []
    for name in set(named) - ELSEWHERE:
        folders = [ROOT, ROOT / "moe_kernels"]  # CONTRIBUTING shortens names that stand beside a full one
        if not name.startswith(".") and not any((folder / name).exists() for folder in folders):
            missing.append(name)
    assert not missing, f"{document} names what is not there: {missing}"
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / document).read_text())
    assert not [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_words_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"\.PHONY:(.*)", makefile)[1].split())  # type: ignore[index]
    words = {w for line in re.findall(r"^make ([a-z ]+)", text, re.MULTILINE) for w in line.split("#")[0].split()}
    words |= set(re.findall(r"`make ([a-z]+)", text))
    assert words
    assert words <= phony


def test_command_line_words_exist() -> None:
    text = (ROOT / "README.md").read_text()
    help_text = cli.parser().format_help()
    for word in {w for line in re.findall(r"python -m moe_kernels ([a-z| ]+)", text) for w in line.split("|")}:
        assert word.split()[0] in help_text


def stages() -> list[list[str]]:
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## Stages")[1].split("## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_stage_table_matches_the_tree() -> None:
    rows = stages()
    assert [row[0] for row in rows] == STAGES
    for stem, reference, cpu, cuda, binding, test, bench in rows:
        assert reference == f"reference.{stem}" and callable(getattr(mk.reference, stem))
        assert callable(getattr(torch.ops.moe_kernels, stem))
        assert (cpu, test, bench) == (f"csrc/cpu/{stem}.cpp", f"tests/test_{stem}.py", f"bench/bench_{stem}.py")
        assert cuda == (f"csrc/cuda/{stem}.cuh" if (ROOT / f"csrc/cuda/{stem}.cu").exists() else "-")
        assert f'"{stem}"' in (ROOT / binding).read_text()
        for path in (cpu, test, bench):
            assert (ROOT / path).exists(), path


def test_architecture_is_one_page() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 110


def test_no_file_is_called_utils() -> None:
    folders = ("moe_kernels", "csrc", "tests", "bench", "build_support")
    assert not [p for folder in folders for p in (ROOT / folder).rglob("*util*")]


def test_every_source_has_its_licence_line() -> None:
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    folders = ("moe_kernels", "csrc", "tests", "bench", "build_support")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    bare = [p for p in files if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()[:200]]
    assert not [str(p) for p in bare if p.name != "_build_info.py"]

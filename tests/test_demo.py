# SPDX-License-Identifier: Apache-2.0
"""The demo and the command line: what they print, what they write and with which exit code they end."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_kernels import cli, demo, doctor, hf

pytest.importorskip("transformers")

from moe_kernels.demo import families, full_size, report, text, tolerance, training

TINY = training.Size(hidden=64, width=48, layers=1, experts=4, rows=2, length=32, steps=6)
TINY_LAYER = dataclasses.replace(full_size.MIXTRAL, name="tiny", hidden=64, width=96, experts=4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own code at sizes that take seconds."""
    monkeypatch.setattr(families, "FAMILIES", {name: families.FAMILIES[name] for name in ("mixtral", "gpt_oss")})
    monkeypatch.setattr(training, "QUICK", TINY)
    monkeypatch.setattr(full_size, "QWEN3", TINY_LAYER)


@pytest.mark.usefixtures("small")
def test_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert demo.run(quick=True, out=str(tmp_path)) == 0
    said = capsys.readouterr().out
    for word in ("mixtral", "gpt_oss", "2 of 2", "tokens/s", "curves equal", "tiny", "decode", "prefill", "skipped: M"):
        assert word in said
    assert "DIFFER" not in said and "Everything is equal." in said
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["ok"] is True and found["quick"] is True
    assert [row["family"] for row in found["families"]] == ["mixtral", "gpt_oss"]
    assert len(found["training"]["losses"]["moe_kernels"]) == TINY.steps
    assert len(found["training"]["expert_load"]) == TINY.layers
    assert [row["tokens"] for row in found["layers"]["rows"]] == [1, 16, 128]
    picture = (tmp_path / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("error", "noticed"), [(1e-3, {"families"}), (1e-2, {"families", "training"})])
def test_a_wrong_layer_ends_with_1(
    error: float, noticed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors far beyond rounding. Six steps of training show the smaller one for some texts only: rounding, too, can
    turn a choice of experts."""
    right = hf.experts_forward

    def wrong(*arguments: Any) -> torch.Tensor:
        return right(*arguments) * (1 + error)

    monkeypatch.setattr(hf, "experts_forward", wrong)
    registry = importlib.import_module(hf.MOE_MODULE).ALL_EXPERTS_FUNCTIONS
    registry.register(hf.NAME, wrong)
    try:
        assert demo.run(quick=True, out=str(tmp_path), parts=("families", "training")) == 1
    finally:
        registry.register(hf.NAME, right)
    found = json.loads((tmp_path / "demo.json").read_text())
    wrong_parts = {"families"} if not any(row["ok"] for row in found["families"]) else set()
    assert noticed <= wrong_parts | ({"training"} if not found["training"]["ok"] else set())


def test_full_size_layers_notice_a_wrong_result() -> None:
    """Four times the bound in the output is DIFFERENT, nothing is not."""
    module = full_size.experts_module(TINY_LAYER)
    fine = full_size.compare(TINY_LAYER, module, 8, rounds=3, budget=5.0)
    assert fine["ok"] and 0 < fine["error"] <= fine["bound"]
    registry = importlib.import_module(hf.MOE_MODULE).ALL_EXPERTS_FUNCTIONS
    registry.register(hf.NAME, lambda *arguments: hf.experts_forward(*arguments) * (1 + 4 * fine["bound"]))
    try:
        assert not full_size.compare(TINY_LAYER, module, 8, rounds=3, budget=5.0)["ok"]
    finally:
        registry.register(hf.NAME, hf.experts_forward)


def test_layers_that_do_not_fit_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "free_bytes", lambda: 10_000_000)
    found = full_size.compare_all(quick=False)
    assert found["rows"] == []
    assert [line.split(":")[0] for line in found["skipped"]] == ["Qwen3-30B-A3B", "Mixtral 8x7B"]
    assert "needs 1.8 GB, 0.0 GB are free" in found["skipped"][0]


def test_free_memory_is_known() -> None:
    assert full_size.free_bytes() > 1 << 20


def test_the_text_is_real_and_the_same_twice() -> None:
    words = text.standard_library(1 << 16)
    assert words.numel() == 1 << 16 and b"import" in bytes(words.tolist())
    assert torch.equal(text.batch(words, 3, 2, 16), text.batch(words, 3, 2, 16))
    assert not torch.equal(text.batch(words, 3, 2, 16), text.batch(words, 4, 2, 16))


def test_a_nudge_is_what_it_says() -> None:
    """Every experts output moves by a relative delta, and so does its gradient; afterwards nothing is left."""
    model = families.tiny_model("mixtral", layers=1)
    ids = torch.arange(16)[None]
    seen: list[torch.Tensor] = []
    keep = tolerance.experts_modules(model)[0].register_forward_hook(lambda _m, _a, y: seen.append(y.detach()))
    plain = families.outputs_and_gradients(model, ids)
    with tolerance.nudged(model, 1e-3):
        moved = families.outputs_and_gradients(model, ids)
    keep.remove()
    assert torch.equal(seen[0], seen[1])  # the hook sees the output before the nudge
    assert tolerance.distance(plain["logits"], moved["logits"]) > 0
    again = families.outputs_and_gradients(model, ids)
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    y = torch.ones(4, 4, requires_grad=True)
    out = tolerance._Nudge.apply(y, 1e-3, torch.Generator().manual_seed(0))
    out.sum().backward()
    assert set((out.detach() - 1).abs().mul(1e3).round().unique().tolist()) == {1.0}
    assert y.grad is not None and float((y.grad - 1).abs().max()) == pytest.approx(1e-3, rel=1e-3)


def test_tolerance_of_a_loss_curve_only_grows() -> None:
    limits = training.tolerances([4.0, 3.0, 2.0], [4.0, 3.1, 2.0])
    assert limits[0] < 1e-4 and limits[1] == pytest.approx(0.4, rel=1e-3) and limits[2] == pytest.approx(0.4, rel=1e-3)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _name: None)
    assert cli.main(["demo"]) == 2
    assert 'pip install ".[hf]"' in capsys.readouterr().err


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = {"ok": True, "seconds": 1.0, "machine": {"moe_kernels": "0", "torch": "0", "threads": 1, "isa": "x"}}
    assert report.finish(results, tmp_path) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert (tmp_path / "demo.json").exists() and not (tmp_path / "demo.png").exists()


def test_table_lines_up() -> None:
    assert report.table(("a", "b"), [("long", "1"), ("x", "22")]).splitlines()[2:] == ["   long   1", "   x     22"]


def test_bench_runs_the_suite_of_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "moe_kernels" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "Clone the project" in capsys.readouterr().err
    for folder, name, code in (("csrc", "moe.h", ""), ("bench", "suite.py", "import sys; sys.exit(len(sys.argv))")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(code)
    assert cli.main(["bench", "--quick", "--only", "route"]) == 4


def test_unknown_words_and_options() -> None:
    for arguments in (["juggle"], [], ["doctor", "--loud"], ["demo", "--part", "none"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor"])
    said = capsys.readouterr().out
    assert code == (0 if doctor._build.ops_loaded else 1)
    for word in ("library", "built with", "CUDA kernels", "instructions", "threads", "fused_experts", "What to do"):
        assert word in said
    assert 'registered: experts_implementation="moe_kernels" works' in said


def test_doctor_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor._build, "ops_loaded", False)
    monkeypatch.setattr(doctor._build, "reason", "moe_kernels: the library was not built. Run `pip install .`")
    monkeypatch.setattr(doctor, "installed", lambda name: "4.57.1" if name == "transformers" else "")
    monkeypatch.setattr(doctor, "processors", lambda: 10_000)
    _, advice = doctor.report()
    wanted = ("Run `pip install .`", "safetensors is not installed", "transformers 4.57.1 has no", "OMP_NUM_THREADS")
    for line in wanted:
        assert any(line in entry for entry in advice), line


def test_command_line_of_the_installed_package(tmp_path: Path) -> None:
    """`python -m moe_kernels demo --quick`, the first part of it, in a process of its own."""
    words = f"-m moe_kernels demo --quick --part families --out {tmp_path}/new".split()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deepseek_v3" in done.stdout and "Everything is equal." in done.stdout
    assert (tmp_path / "new" / "demo.json").exists()

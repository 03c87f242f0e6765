# SPDX-License-Identifier: Apache-2.0
"""`python -m moe_kernels plan`: the table, JSON and picture say what `plan` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_kernels import cli
from moe_kernels.placement import balance
from moe_kernels.planning import Links, plan
from moe_kernels.planning import report as plan_report


def said(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["plan", *options]) == 0
    return capsys.readouterr().out


def test_table_has_a_line_a_cluster_size(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--dispatch", "fp8", "--nodes-per-token", "4").splitlines()
    sizes = [int(line.split()[0]) for line in lines[2:]]
    assert sizes == [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    cells = lines[2 + sizes.index(64)].split()
    p = plan(4096, 7168, 2048, 256, 8, 64, dispatch_dtype=torch.float8_e4m3fn, nodes_per_token=4)
    assert cells[1:5] == [f"{p.us[n]:.0f}" for n in ("flat", "rank_dedup", "two_level", "allgather")]
    assert cells[5:8] == ["two_level", str(p.chunks), p.dominant]
    assert cells[8] == f"{p.bytes['two_level']['nic'] / 1e6:.1f}"


def test_a_size_without_two_level_shows_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    row = said(capsys, "--gpus", "12").splitlines()[-1].split()
    assert row[0] == "12" and row[3] == "-"


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(
        capsys, "--json", "--gpus", "4,8", "--hidden", "64", "--intermediate", "32", "--experts", "8", "--top-k", "2",
        "--tokens", "128", "--gpus-per-node", "4", "--capacity-factor", "1.1", "--links", "nic_gbs=9,nic_us=4",
        "--combine", "fp32",
    )  # fmt: skip
    rows = json.loads(text)
    for W, row in zip((4, 8), rows):
        p = plan(128, 64, 32, 8, 2, W, gpus_per_node=4, combine_dtype=torch.float32, capacity_factor=1.1,
                 links=Links(nic_gbs=9, nic_us=4))  # fmt: skip
        assert {k: v for k, v in vars(p).items() if k not in ("phases", "traffic")} == row
    assert rows[0]["drop_prob"] > 0


def monitor_file(folder: Path) -> Path:
    records = [{"layer": name, "counts": counts, "step": s} for s in (0, 1)
               for name, counts in (("a", [1, 1, 1, 1]), ("b", [8, 4, 2, 2]))]  # fmt: skip
    path = folder / "moe.json"
    path.write_text(json.dumps({"records": records, "pairs": {}, "by_class": {}}))
    return path


def test_load_of_a_monitor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--gpus", "4", "--experts", "4", "--top-k", "2", "--load", str(monitor_file(tmp_path))]
    even, hot = (json.loads(said(capsys, *options, *layer))[0] for layer in ([], ["--layer", "b"]))
    assert even["imbalance"] == pytest.approx(1.0) and hot["imbalance"] == pytest.approx(2.0)


def test_slots_balance_the_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gpus", "4", "--experts", "4", "--top-k", "2", "--load", str(monitor_file(tmp_path)), "--layer", "b"]
    fullest = [float(said(capsys, *options, *more).splitlines()[-1].split()[-2]) for more in ([], ["--slots", "8"])]
    placed = balance([8, 4, 2, 2], num_slots=8, world_size=4).rank_load([8, 4, 2, 2])
    assert fullest == [2.0, round(float(placed.max()) / 4, 2)] and fullest[1] < 1.5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--gpus", "8,x"], "--gpus must be numbers such as 8,64, got '8,x'"),
        (["--gpus", "0"], "plan: world_size must be 1 or more, got 0"),
        (["--preset", "gpt-9"], "name must be one of switch-base-128"),
        (["--links", "nic=4"], "--links must be one of nvlink_gbs"),
        (["--links", "nic_gbs=fast"], "--links nic_gbs must be a number, got 'fast'"),
        (["--links", "nic_gbs=0"], "Links: nic_gbs must be a number"),
        (["--load", "missing.json"], "missing.json"),
        (["--load", "MONITOR", "--layer", "z"], "--layer must be one of a, b, got 'z'"),
        (["--load", "MONITOR"], "plan: load must be [E=256] counts or shares, got [4]"),
        (["--slots", "512"], "--slots must be given together with --load, got 512"),
        (["--top-k", "1000"], "plan: K must be in 1..E=256, got 1000"),
    ],
)
def test_bad_options_end_with_2(
    options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(monitor_file(tmp_path))
    assert cli.main(["plan", *(path if o == "MONITOR" else o for o in options)]) == 2
    assert text in capsys.readouterr().out


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    out = tmp_path / "plan.png"
    assert str(out) in said(capsys, "--gpus", "8,64", "--out", str(out))
    assert out.read_bytes()[:4] == b"\x89PNG"
    plans = [plan(64, 64, 64, 64, 4, W) for W in (8, 16)]
    axes = plan_report.over_ranks(Figure().add_subplot(), plans, {p.world_size: p.us for p in plans}, "us")
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn == {name: [p.us[name] for p in plans] for name in plan_report.COLORS}
    with pytest.raises(ValueError, match="plans must be at least one Plan"):
        plan_report.draw([], out)


def test_import_of_the_package_needs_no_matplotlib() -> None:
    import subprocess
    import sys

    code = "import sys, moe_kernels.planning.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

# SPDX-License-Identifier: Apache-2.0
"""calibrate: the fit finds known constants, and real processes agree on what they measure."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch

from moe_kernels.planning import Links, plan
from moe_kernels.planning.calibrate import calibrate, fit


def test_fit_finds_the_line() -> None:
    sizes = [1e3, 1e5, 1e6, 4e6]
    alpha, speed = fit(sizes, [5 + s / 44e3 for s in sizes])
    assert alpha == pytest.approx(5) and speed == pytest.approx(44)
    noisy = [(5 + s / 44e3) * (1 + 0.02 * (-1) ** i) for i, s in enumerate(sizes)]
    assert fit(sizes, noisy)[1] == pytest.approx(44, rel=0.05)
    assert fit(sizes, [5 + s / 22e3 for s in sizes])[1] != pytest.approx(44, rel=0.05)


def test_fit_of_odd_times_is_still_a_speed() -> None:
    assert fit([1e3, 1e6], [1.0, 5000.0])[0] == 0.0  # below the origin
    alpha, speed = fit([1e3, 1e6], [50.0, 40.0])  # falling
    assert alpha >= 0 and speed == pytest.approx(1e6 / 40 / 1e3)


def test_processes_agree_on_their_links(tmp_path: Path) -> None:
    first, *others = processes.run("plan_workers:measure", tmp_path, world=2)
    assert others == [first]
    one_node, one_each, _ = first
    assert one_node.tflops == one_each.tflops == 7.0
    assert one_node.nic_us == 123.0 and one_node.nvlink_gbs != Links().nvlink_gbs
    assert one_each.nvlink_gbs == Links().nvlink_gbs and one_each.nic_gbs != Links().nic_gbs
    assert plan(64, 64, 64, 8, 2, 2, gpus_per_node=1, links=one_each).us["flat"] > 0


def test_constants_of_a_group_with_known_ones(tmp_path: Path) -> None:
    """Time is simulated: 2 ms and 1 ns a byte come back as 2000 us and 1 GB/s."""
    first, second = processes.run("plan_workers:delayed", tmp_path, world=2)
    assert first == second
    assert first.nic_us == pytest.approx(2000, rel=1e-6) and first.nic_gbs == pytest.approx(1.0, rel=1e-6)


def test_four_processes_tell_the_links_apart(tmp_path: Path) -> None:
    found = processes.run("plan_workers:measure", tmp_path, world=4)
    assert all(links == found[0] for links in found)
    for links in found[0]:
        assert links.nic_us >= 0 and links.peer_us >= 0
    two_nodes = found[0][2]
    assert two_nodes.nvlink_gbs != Links().nvlink_gbs and two_nodes.nic_gbs != Links().nic_gbs


def test_refusals() -> None:
    with pytest.raises(RuntimeError, match="calibrate: needs a process group"):
        calibrate()


@pytest.fixture
def alone(tmp_path: Path):  # type: ignore[no-untyped-def]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_arguments() -> None:
    assert calibrate(gpus_per_node=1) == Links()  # a single rank has no link
    for bad, text in (
        ({"sizes": (8,)}, "calibrate: sizes must be two or more"),
        ({"sizes": (0, 8)}, "sizes must be"),
        ({"repeats": 0}, "calibrate: repeats must be 1 or more, got 0"),
        ({"gpus_per_node": 0}, "calibrate: gpus_per_node must be 1 or more"),
    ):
        with pytest.raises(ValueError) as caught:
            calibrate(**bad)  # type: ignore[arg-type]
        assert text in str(caught.value)

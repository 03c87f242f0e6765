# SPDX-License-Identifier: Apache-2.0
"""The fuzzer: a short run, the same every time; a wrong kernel is noticed, and its case can be run again."""

from types import SimpleNamespace

import conftest
import fuzz

import moe_kernels as mk


def test_a_short_run():
    count, wrong = fuzz.campaign([conftest.CPU], range(150), seconds=600.0)
    assert (count, wrong) == (150, [])


def test_a_wrong_kernel_is_noticed_by_its_seed(capsys):
    wrong_cpu = SimpleNamespace(
        **{**vars(conftest.CPU), "fused_experts": lambda *a, **k: mk.fused_experts(*a, **k) * 1.001}
    )
    _, wrong = fuzz.campaign([wrong_cpu], range(12), seconds=600.0)
    wanted = [seed for seed in range(12) if fuzz.draw_case(seed, small=False)[0].startswith("fused_experts")]
    found = [int(line.split("seed ")[1].split(":")[0]) for line in wrong]
    assert found
    assert set(found) <= set(wanted)
    assert f"seed {found[0]}: fused_experts" in capsys.readouterr().out
    assert fuzz.fails(found[0], wrong_cpu) == wrong[0]  # the same case, the same words
    assert fuzz.fails(found[0], conftest.CPU) == ""


def test_nothing_is_wrong_in_no_time():
    assert fuzz.campaign([conftest.CPU], range(5), seconds=-1.0) == (0, [])

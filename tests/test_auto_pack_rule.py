# SPDX-License-Identifier: Apache-2.0
"""When layers pack by themselves, when not, and what doctor and explain say about it."""

import copy

import torch
from test_auto_pack import E, H, I, K, T, _in_place, called, layer_and_x, soon, warm, without
from torch import nn

import moe_kernels as mk
from moe_kernels import auto_pack, doctor

__all__ = ["soon"]  # the fixture, for every test here


def never(layer: nn.Module, *args) -> None:
    for _ in range(auto_pack.AFTER + 3):
        called(layer, *args)
    assert auto_pack.packed() == (0, 0)


def test_training_never_packs() -> None:
    layer, x = layer_and_x()
    for _ in range(auto_pack.AFTER + 3):
        layer(x).sum().backward()
    assert auto_pack.packed() == (0, 0)
    layer.requires_grad_(False)
    for _ in range(auto_pack.AFTER + 1):
        layer(x)
    assert auto_pack.packed()[0] == 1, "nothing requires a gradient: inference, whatever the grad mode"
    y = layer(x.requires_grad_())
    y.sum().backward()  # the parameters are read, and differentiated through
    assert x.grad is not None


def test_calls_are_counted_for_the_same_weights() -> None:
    layer, x = layer_and_x()
    for _ in range(6):
        called(layer, x)
        called(layer, x)
        _in_place(layer)
    assert auto_pack.packed() == (0, 0)


def test_few_rows_and_other_reasons() -> None:
    layer, x = layer_and_x()
    never(layer, x[:11])
    never(layer_and_x(interleaved=True)[0], x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        never(layer, x)
    shared = copy.deepcopy(layer)
    shared.share_memory()
    never(shared, x)
    assert "shared memory" in auto_pack._slots[shared.experts].refused


def test_traced_layers_read_the_parameters() -> None:
    layer, x = layer_and_x()
    want = without(layer, x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for _ in range(auto_pack.AFTER + 3):
        assert torch.equal(called(compiled, x), want)
    assert auto_pack.packed() == (0, 0)
    warm(layer, x)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert "fused_experts.default" in str(program.graph) and "packed" not in str(program.graph)


def test_memory_rule(monkeypatch) -> None:
    layer, x = layer_and_x()
    need, total = auto_pack.panel_bytes(E, H, I, True, 4), 1 << 30
    monkeypatch.setattr(auto_pack, "free_memory", lambda: (need + total // 4 - 1, total))
    never(layer, x)
    assert "less than a quarter of 1.0 GiB" in auto_pack._slots[layer.experts].refused
    assert any("less than a quarter" in line for line in auto_pack.report())
    monkeypatch.setattr(auto_pack, "free_memory", lambda: None)
    never(layer, x)
    monkeypatch.setattr(auto_pack, "free_memory", lambda: (need + total // 4, total))
    for _ in range(auto_pack.AFTER + 1):
        called(layer, x)
    found = auto_pack._slots[layer.experts].copy
    assert found.packed13.nbytes + found.packed2.nbytes == need


def test_no_memory_after_all(monkeypatch) -> None:
    layer, x = layer_and_x()
    never_there = {"pack_experts": type("Op", (), {"default": staticmethod(lambda *_: (_ for _ in ()).throw(
        RuntimeError("can't allocate 5 bytes")))}), "fused_experts_packed": None}  # fmt: skip
    monkeypatch.setattr(torch.ops.moe_kernels, "pack_experts", never_there["pack_experts"])
    never(layer, x)
    assert auto_pack._slots[layer.experts].refused == "packing failed: can't allocate 5 bytes"


def test_free_memory_of_machine_and_group(monkeypatch, tmp_path) -> None:
    monkeypatch.undo()
    real = auto_pack.free_memory()
    assert real is None or 0 < real[0] <= real[1]
    monkeypatch.setattr(auto_pack, "_ROOT", tmp_path)
    assert auto_pack.free_memory() is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  600 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("4:cpu:/x\n0::/a/b\n")
    assert auto_pack.free_memory() == (600 * 1024, 1000 * 1024)
    inner, outer = tmp_path / "sys/fs/cgroup/a/b", tmp_path / "sys/fs/cgroup/a"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (outer, "500000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("450000\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 20000\n")
    assert auto_pack.free_memory() == (70000, 500000)
    old = tmp_path / "sys/fs/cgroup/memory"
    old.mkdir()
    for name, text in (("memory.limit_in_bytes", "90000"), ("memory.usage_in_bytes", "30000"), ("memory.stat", "")):
        (old / name).write_text(text)
    (tmp_path / "proc/self/cgroup").write_text("7:cpu,memory:/\n")
    assert auto_pack.free_memory() == (60000, 90000)


def test_switches(monkeypatch) -> None:
    layer, x = layer_and_x()
    monkeypatch.setenv(auto_pack.VARIABLE, "0")
    never(layer, x)
    assert auto_pack.rule() == "off (MOE_KERNELS_PACK=0)"
    monkeypatch.delenv(auto_pack.VARIABLE)
    warm(layer, x)
    auto_pack.enable(False)
    assert auto_pack.packed() == (0, 0) and auto_pack.rule() == "off"
    never(layer, x)
    auto_pack.enable()
    warm(layer, x)


def test_doctor_and_explain(monkeypatch) -> None:
    layer, x = layer_and_x()
    sizes = {"T": T, "H": H, "I": I, "E": E, "K": K, "dtype": torch.float32, "device": "cpu"}
    said = mk.explain("fused_experts", **sizes)
    nbytes = auto_pack.panel_bytes(E, H, I, True, 4)
    assert f"packs {nbytes} bytes after 2 calls with the same weights" in said.config
    assert any("packed now: 0 layers, 0 bytes" in line for line in doctor.report()[0])
    warm(layer, x)
    held = auto_pack._slots[layer.experts].copy
    assert held.nbytes == nbytes + sum(t.nbytes for t in held.samples)
    lines = doctor.report()[0]
    assert any(f"packed now: 1 layers, {held.nbytes} bytes" in line for line in lines)
    assert any("after 2 calls with the same weights, while a quarter of the memory stays free" in ln for ln in lines)
    for change, why in (({"T": 11}, "no expert gets 12 rows"), ({"transposed": True}, "transposed")):
        refused = dict(mk.explain("fused_experts", **{**sizes, **change}).refused)
        assert why in refused["packed copy of a layer"]
    monkeypatch.setattr(auto_pack, "free_memory", lambda: (nbytes, 1 << 30))
    assert "less than a quarter" in dict(mk.explain("fused_experts", **sizes).refused)["packed copy of a layer"]
    monkeypatch.setenv(auto_pack.VARIABLE, "0")
    assert "off" in dict(mk.explain("fused_experts", **sizes).refused)["packed copy of a layer"]
    assert any("off (MOE_KERNELS_PACK=0)" in line for line in doctor.report()[0])

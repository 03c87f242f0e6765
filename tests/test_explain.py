# SPDX-License-Identifier: Apache-2.0
"""explain() says what really runs: the kernel, its instruction set and its way through a product, read off results.

The probe is a sum whose rounded value names the order it was added in: [big, 1, 1, ..] with big = 2^24 (2^53), where
big + 1 rounds back to big. One running sum stays at big; sums in lanes lose only the ones in big's lane; sums in blocks
lose only those in big's block.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
from moe_kernels import _build
from moe_kernels.explain import explain
from moe_kernels.routers import assignment, expert_choice
from moe_kernels.schemas import DTYPES, SCHEMAS
from moe_kernels.testing import make_case

LENGTH = 6144  # the ones lost by every number of lanes (3072 .. 384) differ from those lost by every block (64, 128)
BIG = {torch.float32: 2.0**24, torch.float64: 2.0**53}
VECTOR_BYTES = {"avx512": 64, "avx2": 32, "portable": 16}


def probe(dtype: torch.dtype) -> torch.Tensor:
    values = torch.ones(LENGTH, dtype=dtype)
    values[0] = BIG[dtype]
    return values


def way_that_ran(total: torch.Tensor, isa: str) -> str:
    """The way, with the depth of a packed block, that a probe's sum was added in."""
    dtype = total.dtype
    counted = int(total.double() - BIG[dtype])
    lanes = VECTOR_BYTES[isa] // dtype.itemsize
    if counted == 0:
        return "direct"
    return "dot" if counted == LENGTH - LENGTH // lanes else f"packed {LENGTH - counted}"


def run(op: str, rows: int, N: int, transposed: bool, dtype: torch.dtype) -> tuple[str, torch.Tensor, dict[str, int]]:
    """One product of `op` on the probe: its name in an explanation, its first sum, its sizes. One expert, K = 1."""
    ids, weights = torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, 1, dtype=dtype)
    turn = (lambda w: w.mT.contiguous()) if transposed else (lambda w: w)
    sizes = {"T": rows, "E": 1, "K": 1, "H": N, "I": LENGTH}
    first = torch.zeros(rows, N, dtype=dtype)
    first[:, 0] = 1
    spread = torch.zeros(1, LENGTH, N, dtype=dtype)  # x = e0 -> the probe
    spread[0, :, 0] = probe(dtype)
    options = {"activation": "relu", "gated": False, "transposed": transposed}
    if op == "grouped_gemm":
        a, b = probe(dtype).expand(rows, LENGTH).contiguous(), torch.ones(1, N, LENGTH, dtype=dtype)
        y = mk.grouped_gemm(a, turn(b) if transposed else b.mT, torch.tensor([rows], dtype=torch.int32))
        return "a b", y[0, 0], {**sizes, "H": LENGTH, "I": N}
    if op == "x w13":
        w13 = turn(torch.ones(1, N, LENGTH, dtype=dtype))
        w2 = turn(torch.eye(LENGTH, N, dtype=dtype)[None])
        y = mk.fused_experts(probe(dtype).expand(rows, LENGTH), w13, w2, weights, ids, **options)
        return op, y[0, 0], {**sizes, "H": LENGTH, "I": N}
    if op == "h w2":
        w2 = turn(torch.ones(1, N, LENGTH, dtype=dtype))
        return op, mk.fused_experts(first, turn(spread), w2, weights, ids, **options)[0, 0], sizes
    if op == "grad_y w2":  # d bias of w13 = grad_y w2 of the one row whose grad_y is the probe
        x, w13 = torch.ones(rows, LENGTH, dtype=dtype), turn(torch.ones(1, N, LENGTH, dtype=dtype))
        bias = torch.zeros(1, N, dtype=dtype, requires_grad=True)
        w2, grad = turn(torch.ones(1, LENGTH, N, dtype=dtype)), torch.zeros(rows, LENGTH, dtype=dtype)
        grad[0] = probe(dtype)
        mk.fused_experts(x, w13, w2, weights, ids, w13_bias=bias, **options).backward(grad)
        return op, bias.grad[0, 0], {**sizes, "H": LENGTH, "I": N}
    x = first.requires_grad_()  # grad_h w13: one output column hands the probe on to grad_h
    w2 = torch.zeros(1, N, LENGTH, dtype=dtype)
    w2[0, 0] = probe(dtype)
    mk.fused_experts(x, turn(torch.ones(1, LENGTH, N, dtype=dtype)), turn(w2), weights, ids, **options).backward(
        torch.eye(1, N, dtype=dtype).expand(rows, N)
    )
    return op, x.grad[0, 0], sizes


FORWARD = {"grouped_gemm": "grouped_gemm", "x w13": "fused_experts", "h w2": "fused_experts"}


def said(op: str, product: str, transposed: bool, dtype: torch.dtype, sizes: dict[str, int]) -> tuple[str, str]:
    """(instruction set, way) by explain()."""
    name = FORWARD.get(op, "fused_experts_backward")
    found = explain(name, dtype=dtype, device="cpu", gated=False, transposed=transposed, **sizes)
    assert not found.fallback
    text = re.search(rf"{product}: (\w+), (\d+) columns(?: x (\d+) deep)?", found.config)
    assert text is not None, found.config
    return found.backend.removeprefix("cpu "), f"packed {text[3]}" if text[3] else text[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("op", [*FORWARD, "grad_y w2", "grad_h w13"])
def test_the_way_is_the_one_that_ran(op: str, transposed: bool, dtype: torch.dtype) -> None:
    """At both sides of every threshold, with full and with ragged panels."""
    seen = set()
    for rows in (1, 11, 12, 15, 16, 33):
        for N in (64, 40):
            product, total, sizes = run(op, rows, N, transposed, dtype)
            isa, way = said(op, product, transposed, dtype, sizes)
            assert way_that_ran(total, isa) == way, (rows, N)
            seen.add(way.split()[0])
    assert len(seen) > 1, "the sizes above are meant to reach more than one way"


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_the_instruction_set_is_the_one_that_ran(level: str) -> None:
    """The number of lanes tells it; MOE_KERNELS_ISA lowers both alike."""
    code = (
        "import json, torch, test_explain as t;"
        "_, total, sizes = t.run('x w13', 1, 64, False, torch.float32);"
        "print(json.dumps([t.said('x w13', 'x w13', False, torch.float32, sizes)[0], float(total)]))"
    )
    env = {**os.environ, "MOE_KERNELS_ISA": level, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    isa, total = json.loads(done.stdout)
    levels = _build.info()["isa_levels"]
    assert isa == (level if level in levels else levels[-1])
    assert way_that_ran(torch.tensor(total), isa) == "dot"


class Seen(TorchDispatchMode):
    """The names of our ops that are called while open."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "moe_kernels":
            self.ops.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def call_everything(dtype: torch.dtype) -> set[str]:
    """Forward and backward of the whole package."""
    case = make_case(dtype=dtype)
    x, w13, w2 = (t.detach().requires_grad_() for t in (case.x, case.w13, case.w2))
    weights, E = case.topk_weights.detach().requires_grad_(), case.w13.shape[0]
    with Seen() as seen:
        logits = torch.randn(9, 8, dtype=dtype, requires_grad=True)
        routing = mk.route(logits, 2)
        (routing.topk_weights.sum() + mk.losses.Switch()(mk.losses.LossInputs(logits, routing))).backward()
        mk.fused_experts(x, w13, w2, weights, case.topk_ids).sum().backward()
        rows = mk.permute(x, case.topk_ids, E)
        h = mk.grouped_gemm(rows.x_rows, w13.mT, rows.expert_offsets[1:])
        mk.unpermute(h, rows.slot_to_row, weights).sum().backward()
        packed = mk.pack_experts(case.w13, case.w2)
        mk.fused_experts(case.x, packed, None, case.topk_weights, case.topk_ids)
        mk.limit_capacity(case.topk_ids, E, 2)
        expert_choice.choose(logits, 2, 9)
        assignment.balance(logits, 2)
    return seen.ops


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_op_has_a_kernel_here(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict mode raises wherever the reference would run: nothing raises, and explain() says so of every op."""
    monkeypatch.setenv("MOE_KERNELS_STRICT", "1")
    assert call_everything(dtype) == set(SCHEMAS)
    for op in SCHEMAS:
        found = explain(op, T=64, H=32, I=24, E=8, K=2, dtype=dtype, device="cpu")
        assert not found.fallback and found.backend == f"cpu {_build.info()['isa']}", str(found)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{op}", "CPU")


@pytest.mark.parametrize("name", mk.presets.names())
def test_no_preset_falls_back_here(name: str) -> None:
    """Forward and backward, every dtype, decode and prefill."""
    p = mk.presets.get(name)
    sizes = {"H": p.hidden_size, "I": p.intermediate_size, "E": p.num_experts, "K": p.top_k, "device": "cpu"}
    for op in SCHEMAS:
        for dtype in DTYPES:
            assert not any(explain(op, T=T, dtype=dtype, **sizes).fallback for T in (1, 4096))


def test_a_build_without_kernels_falls_back_and_says_so(tmp_path: Path) -> None:
    """The same reason in the explanation and in the warning of the op that really ran."""
    package = Path(mk.__file__).parent
    shutil.copytree(package, tmp_path / "moe_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = (
        "import json, warnings, torch, moe_kernels as mk\n"
        "from moe_kernels.explain import explain\n"
        "found = explain('route', T=4, H=8, I=8, E=4, K=2, dtype=torch.float32, device='cpu')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    mk.route(torch.randn(4, 4), 2)\n"
        "print(json.dumps([found.fallback, found.backend, found.refused, str(caught[0].message)]))"
    )
    env = {**os.environ, "MOE_KERNELS_STRICT": "0", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fallback, backend, refused, warned = json.loads(done.stdout)
    assert fallback and backend == "reference"
    (alternative, why), *rest = refused
    assert alternative == "cpu kernel" and not rest
    assert why in warned
    assert "not built" in why or "shadows the installed package" in why  # the second beside a package in site-packages


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "sm_90", "sm_80", torch.device("cuda", 0)])
def test_cuda_is_what_the_dispatcher_has(device: str | torch.device) -> None:
    """A GPU runs a kernel exactly where torch's table has one for it; without, the reason names the build."""
    for op in SCHEMAS:
        found = explain(op, T=512, H=64, I=64, E=8, K=2, dtype=torch.bfloat16, device=device)
        assert found.fallback != torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_kernels::{op}", "CUDA")
        if found.fallback:
            assert found.refused[0][0] == f"{device} kernel"
            assert f"no kernel of {op} for cuda" in found.refused[0][1]
            assert ("built for the CPU only" in found.refused[0][1]) == (_build.info()["cuda"] is None)
            if _build.info()["cuda"] is None:
                assert str(_build.info()["cuda_reason"]) in found.refused[0][1]
        else:
            assert found.backend.startswith("cuda ") and f"csrc/cuda/{op.removesuffix('_backward')}.cuh" in found.config


def test_products_of_cuda_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile that the launcher chooses, by architecture, dtype and width, whatever this build has."""
    module = importlib.import_module("moe_kernels.explain")
    monkeypatch.setattr(module, "backend_of", lambda op, device: (f"{device} kernel", ""))

    def ask(op: str = "fused_experts", device: str = "sm_90", **sizes: Any) -> Any:
        call: dict[str, Any] = {"T": 8192, "H": 2048, "I": 768, "E": 128, "K": 8, "dtype": torch.bfloat16}
        return explain(op, device=device, **(call | sizes))

    found = ask()
    assert not found.fallback and found.backend == "cuda sm_90"
    assert re.search(r"x w13: wgmma [\dx]+; h w2: wgmma [\dx]+", found.config)
    assert re.search(r"x w13: mma [\dx]+; h w2: mma [\dx]+", ask(device="sm_80").config)
    assert "mma" in ask("fused_experts_backward").config and "grouped_wgrad" in ask("fused_experts_backward").config
    assert re.search(r"grouped_gemm_sm90.cuh, a b: wgmma [\dx]+$", ask("grouped_gemm").config)
    assert re.search(r"grouped_gemm.cuh, a b: mma [\dx]+$", ask("grouped_gemm", device="sm_89").config)
    assert "decode" in ask(T=64).config and "decode" not in ask(T=65).config
    for sizes in ({"dtype": torch.float64}, {"dtype": torch.float32}, {"H": 2047}, {"device": "sm_75"}):
        found = ask(**sizes)
        assert "x w13: fma; h w2: fma" in found.config and found.refused, sizes
    assert any("tf32" in why for _, why in ask(dtype=torch.float32).refused)
    assert any("16 bytes" in why for _, why in ask(H=2047).refused)


def test_other_devices_fall_back() -> None:
    found = explain("route", T=5, H=64, I=64, E=8, K=2, dtype=torch.float32, device="xpu")
    assert found.fallback and "no kernel of route for xpu" in found.refused[0][1]


def test_the_last_columns_are_told_apart() -> None:
    """Transposed weights are read where they lie, but for a last panel that is not full: 100 = 64 + 36."""
    found = explain("fused_experts", T=4, H=100, I=32, E=1, K=1, dtype=torch.float32, device="cpu", transposed=True)
    assert "h w2: direct, 64 columns, the last 36: packed" in found.config


def test_text() -> None:
    text = str(explain("fused_experts", T=512, H=2048, I=768, E=128, K=8, dtype=torch.bfloat16, device="cpu"))
    assert text.startswith("fused_experts [T=512, H=2048, I=768, E=128, K=8] bfloat16 on cpu: cpu ")
    assert "x w13: packed, 64 columns x 128 deep" in text
    assert "not x w13 dot: at 32 rows an expert: a transposed copy is cheaper" in text
    text = str(explain("route", T=1, H=8, I=8, E=4, K=2, dtype=torch.float32, device="xpu"))
    assert "(a slow fallback)" in text


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        ({"op": "nothing"}, ValueError, "op must be one of route,.*got 'nothing'"),
        ({"T": 0}, ValueError, "T must be 1 or more, got 0"),
        ({"H": 2.5}, TypeError, "H must be an int, got float 2.5"),
        ({"K": 9}, ValueError, "K must be in 1..E=8, got 9"),
        ({"op": "permute", "T": 2**30}, ValueError, r"T\*K must be at most 2147483647"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float64.*got torch.int8"),
        ({"device": "meta"}, ValueError, "device must be one that computes.*got 'meta'"),
        ({"device": "tpu"}, ValueError, "device must be one that computes.*got 'tpu'"),
    ],
)
def test_bad_input(words: dict[str, object], error: type[Exception], match: str) -> None:
    asked = {"op": "route", "T": 4, "H": 8, "I": 8, "E": 8, "K": 2, "dtype": torch.float32, "device": "cpu", **words}
    with pytest.raises(error, match=match):
        explain(asked.pop("op"), **asked)

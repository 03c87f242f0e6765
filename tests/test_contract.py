# SPDX-License-Identifier: Apache-2.0
"""The rules that keep the parts apart: names, the dependency arrow, and kernels that are kernels."""

import ast
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels as mk
from moe_kernels import _build, reference, schemas
from moe_kernels.testing import make_case

ROOT = Path(__file__).resolve().parents[1]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "moe_kernels"
SOURCES = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
needs_sources = pytest.mark.skipif(not CSRC.exists(), reason="an installed package carries no C++ sources")


def code_of(path: Path) -> str:
    """A C++ file without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


def includes(path: Path) -> list[str]:
    return re.findall(r'#include\s+[<"]([^">]+)[">]', path.read_text())


# ---- names


STRUCTS = {"route": "RouteArgs", "route_backward": "RouteBackwardArgs", "permute": "PermuteArgs",
           "limit_capacity": "LimitCapacityArgs", "sum_scores": "SumScoresArgs",
           "sum_scores_backward": "SumScoresBackwardArgs", "expert_cuts": "ExpertCutsArgs", "sinkhorn": "SinkhornArgs",
           "unpermute": "UnpermuteArgs", "unpermute_backward": "UnpermuteBackwardArgs",
           "grouped_gemm": "GroupedGemmArgs",
           "fused_experts": "FusedExpertsArgs", "fused_experts_backward": "FusedExpertsBackwardArgs"}  # fmt: skip
OTHERWISE = {  # word of the schema -> what stands for it in moe.h
    "top_k": "K", "num_experts": "E", "num_expert_group": "G", "groups": "B", "score_groups": "B",  # letters inside
    "count": "C",
    "e_score_correction_bias": "correction_bias", "swiglu_limit": "limit", "swiglu_alpha": "alpha",
    "transposed": "row_stride",  # a transposed weight is one of other strides
    "needs": "grad_x", "save_hidden": "hidden",  # null pointers
    "main_grad": "accumulate", "w13_main_grad": "w13_main", "w2_main_grad": "w2_main",  # an output that is added to
}  # fmt: skip


def struct_fields(header: str) -> dict[str, set[str]]:
    """struct -> every identifier declared in it, fields of member structs included."""
    bodies = dict(re.findall(r"struct (\w+) \{(.*?)\n\};", header, flags=re.S))
    own = {name: set(re.findall(r"(\w+)\s*(?=[;,])", body)) for name, body in bodies.items()}

    def all_of(name: str) -> set[str]:
        found = set(own[name])
        for other in bodies:
            if other != name and re.search(rf"\b{other}\b", bodies[name]):
                found |= all_of(other)
        return found

    return {name: all_of(name) for name in bodies}


@needs_sources
@pytest.mark.parametrize("op", STRUCTS)
def test_the_struct_of_an_op_has_the_words_of_its_schema(op):
    fields = struct_fields(code_of(CSRC / "moe.h"))
    have = fields[STRUCTS[op]] | fields["NarrowIdsArgs"] | fields["PermuteIndexArgs"]
    have |= fields.get(STRUCTS[op].replace("Args", "BackwardArgs"), set())  # a forward hands on what that one needs
    arguments = [a.name for a in getattr(torch.ops.moe_kernels, op).default._schema.arguments]
    missing = [name for name in arguments if OTHERWISE.get(name, name) not in have]
    assert not missing


def test_reference_and_ops_have_the_same_signature():
    for name in ("route", "route_with_sums", "limit_capacity", "permute", "grouped_gemm", "unpermute", "fused_experts"):
        public, spec = inspect.signature(getattr(mk, name)), inspect.signature(getattr(reference, name))
        assert list(public.parameters) == list(spec.parameters), name
        assert [p.default for p in public.parameters.values()] == [p.default for p in spec.parameters.values()], name
        assert [p.kind for p in public.parameters.values()] == [p.kind for p in spec.parameters.values()], name


def test_public_names():
    assert set(mk.__all__) >= {"route", "permute", "grouped_gemm", "unpermute", "fused_experts", "pack_experts",
                               "Routing", "Permuted", "PackedExperts", "reference", "__version__"}  # fmt: skip
    assert mk.Routing._fields == ("topk_weights", "topk_ids", "tokens_per_expert", "lse", "dropped")
    assert mk.Permuted._fields == ("x_rows", "row_to_slot", "slot_to_row", "expert_offsets")
    assert all(getattr(mk, name).__doc__ for name in ("route", "permute", "grouped_gemm", "unpermute", "fused_experts"))


@needs_sources
def test_codes_are_those_of_the_header():
    header = code_of(CSRC / "moe.h")
    for enum, names in (("Scoring", schemas.SCORING), ("Activation", schemas.ACTIVATIONS)):
        body = re.search(rf"enum class {enum} : int32_t \{{(.*?)\}}", header, re.S)[1]
        assert tuple(word.strip() for word in body.split(",")) == names


# ---- the dependency arrow: package -> ops -> bindings -> moe.h -> cpu


@needs_sources
def test_torch_is_seen_by_the_binding_only():
    for path in SOURCES:
        if path.parent.name != "bindings":
            assert not [i for i in includes(path) if i.startswith(("torch", "ATen", "c10", "pybind11", "Python"))], (
                path.name
            )
    assert not [i for i in includes(CSRC / "bindings" / "host.cpp") if i.startswith(("torch", "ATen", "c10"))]


@needs_sources
def test_kernels_include_downwards():
    for path in SOURCES:
        there = {Path(i).name for i in includes(path)}
        if path.name in ("moe.h", "dtype.h", "check.h"):
            assert there <= {"dtype.h", "device.h"} | {i for i in there if "." not in i}, path.name
        if "cpu" in path.relative_to(CSRC).parts:
            assert not [i for i in includes(path) if "cuda" in i or "comm" in i or "bindings" in i], path.name


def imported(path: Path, level: int) -> set[str]:
    """The modules of the package that a file imports, `level` folders up."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_python_imports_go_down():
    below = {  # module -> what of the package it may import
        "schemas": set(), "_version": set(), "main_grad": set(), "reference": {"main_grad", "schemas"},
        "check": {"schemas"}, "cubin_cache": set(), "nvrtc": {"cubin_cache"}, "_build": {"_version", "nvrtc"},
        "fallback": {"_build", "reference", "schemas"}, "fakes": {"fallback", "schemas"}, "autograd": {"schemas"},
        "packed": {"check", "schemas"}, "testing": {"reference", "schemas"},
        "ops": {"check", "fakes", "fallback", "autograd", "packed", "reference", "schemas"},
        "auto_pack": {"_build", "check", "ops", "schemas"},
        "draws": set(), "capacity": {"check", "draws", "ops", "routers"}, "dropout": {"check", "draws", "routers"},
        "losses": {"check", "ops", "reference", "routers", "schemas"}, "presets": {"capacity", "losses", "routers"},
        "watch": {"layers", "losses", "routers"}, "balance": {"check", "draws", "layers", "routers", "watch"},
        "monitor": {"check", "watch"}, "plots": {"check"},
        "placement": {"check"},
        "layers": {"auto_pack", "capacity", "check", "dropout", "losses", "ops", "presets", "reference", "routers",
                   "schemas", "hf"},
    }  # fmt: skip
    for module, allowed in below.items():
        found = imported(PACKAGE / f"{module}.py", level=1)
        assert found <= allowed, f"{module} imports {found - allowed}"
    for path in (PACKAGE / "routers").glob("*.py"):
        found = imported(path, level=2)
        assert found <= {"check", "draws", "ops", "reference", "schemas"}, f"{path.name} imports {found}"
    beside = {  # module of planning/ -> what of the folder it may import
        "traffic": set(), "chances": set(), "flows": {"chances", "traffic"}, "planner": {"chances", "flows", "traffic"},
        "calibrate": {"planner"}, "report": {"planner"}, "__init__": {"planner", "traffic"},
    }  # fmt: skip
    for path in (PACKAGE / "planning").glob("*.py"):
        assert imported(path, level=1) <= beside[path.stem], path.name
        found = imported(path, level=2)
        assert found <= {"check"} | ({"placement", "plots", "presets"} if path.stem == "report" else set()), path.name
    below_parallel = {"capacity", "check", "layers", "nccl", "ops", "planning", "routers", "schemas"}
    for path in (PACKAGE / "expert_parallel").glob("*.py"):
        found = imported(path, level=2)
        assert found <= below_parallel, f"{path.name} imports {found}"


# ---- form


def files() -> list[Path]:
    found = [p for folder in ("csrc", "moe_kernels", "tests", "bench") for p in (ROOT / folder).rglob("*")]
    return [p for p in found if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and p.name != "_build_info.py"]


def test_files_are_small_and_named_for_what_they_hold():
    for path in files():
        text = path.read_text()
        assert "utils" not in path.name.lower(), path.name
        assert text.count("\n") <= 420, f"{path.name} has {text.count(chr(10))} lines"
        assert "SPDX-License-Identifier: Apache-2.0" in text.split("\n", 1)[0], path.name


def test_stages_of_the_reference_are_short():
    for name, function in inspect.getmembers(reference, inspect.isfunction):
        if function.__module__ != reference.__name__:
            continue
        node = ast.parse(inspect.getsource(function)).body[0]
        body = node.body[1:] if ast.get_docstring(node) else node.body
        assert body[-1].end_lineno - body[0].lineno < 20, name


# ---- kernels are kernels


class OnlyOurs(TorchDispatchMode):
    """Records every op that the package calls: its own and allocation, nothing that computes."""

    ALLOCATION = ("aten.empty", "aten.new_empty", "aten.detach", "aten.view", "aten._unsafe_view", "aten.alias")

    def __init__(self) -> None:
        super().__init__()
        self.foreign: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if not name.startswith(("moe_kernels.", *self.ALLOCATION)):
            self.foreign.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inside_our_ops_are_only_our_ops(dtype):
    case = make_case(9, 37, 12, 5, 2, dtype=dtype, bias=True, hidden_mask=True)
    logits = torch.randn(9, 5).to(dtype).requires_grad_()
    leaves = {name: t.requires_grad_() for name, t in case.leaves().items()}
    options = case.options() | {"w13_bias": leaves["w13_bias"], "w2_bias": leaves["w2_bias"]}
    with OnlyOurs() as mode:
        routing = mk.route(logits, 2, num_expert_group=5, topk_group=2)
        y = mk.fused_experts(case.x, case.w13, case.w2, routing.topk_weights, routing.topk_ids, **options)
        packed = mk.pack_experts(case.w13, case.w2)
        with torch.no_grad():
            mk.fused_experts(case.x, packed, None, routing.topk_weights, routing.topk_ids)
        rows = mk.permute(case.x, routing.topk_ids, 5, align=4)
        z = mk.unpermute(rows.x_rows, rows.slot_to_row, routing.topk_weights)
    assert not mode.foreign
    with OnlyOurs() as mode:
        torch.autograd.backward([y, z], [torch.ones_like(y), torch.ones_like(z)])
    assert mode.foreign <= {
        "aten.ones_like.default",
        "aten.add.Tensor",
    }  # torch's own: the cotangents, and sums of gradients


def test_grouped_gemm_is_our_own():
    a, b = torch.randn(9, 6, requires_grad=True), torch.randn(3, 6, 5, requires_grad=True)
    offs = torch.tensor([3, 3, 8], dtype=torch.int32)
    with OnlyOurs() as mode:
        out = mk.grouped_gemm(a, b, offs)
    assert not mode.foreign
    with OnlyOurs() as mode:
        out.backward(torch.ones(9, 5))
    assert mode.foreign <= {"aten.ones.default", "aten.transpose.int"}  # a transposed view


def test_the_library_takes_no_computation_from_torch():
    """Of torch it imports handles, allocation and threads; no matmul, topk, sort or any other operator."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    library = _build.info()["library"]
    assert library
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1].split("@")[0] for line in symbols.splitlines() if line.split()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)
    computing = re.compile(r"matmul|mm_|_mm|bmm|topk|sort|softmax|einsum|gemm|dot|sum|index_add|scatter|gather", re.I)
    assert not [name for name in names if name.startswith(("aoti_torch", "torch_")) and computing.search(name)]
    assert not [name for name in names if re.match(r"_ZN(K)?(2at|3c10|5torch)|Py[A-Z_]|cuda|cblas|mkl|sgemm", name)]

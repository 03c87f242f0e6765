# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  sentences are not cut
"""Every refusal: its type and its sentence (the argument, what was wanted, what came)."""

import math
import subprocess
import sys

import pytest
import torch

import moe_kernels as mk
from moe_kernels import _build, fallback, ops

X, W13, W2 = torch.randn(8, 6), torch.randn(4, 10, 6), torch.randn(4, 6, 5)
WEIGHTS, IDS = torch.rand(8, 2), torch.zeros(8, 2, dtype=torch.int32)
ROWS, SLOTS = torch.randn(16, 6), torch.arange(16, dtype=torch.int32)
OFFS = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
LOGITS = torch.randn(8, 12)
META = torch.empty(8, 6, device="meta")


def experts(*args, **options):
    values = [X, W13, W2, WEIGHTS, IDS]
    values[: len(args)] = args
    return lambda: mk.fused_experts(*values, **options)


def packed(*args, pack=None, **options):
    values = [X, mk.pack_experts(W13, W2, **(pack or {})), None, WEIGHTS, IDS]
    for position, value in args:
        values[position] = value
    return lambda: mk.fused_experts(*values, **options)


CASES = [
    # unpermute
    (lambda: mk.unpermute(ROWS, SLOTS, torch.rand(8, 4)), ValueError,
     "unpermute: topk_weights must be floating [T=8, K=2], got [8, 4]"),
    (lambda: mk.unpermute(ROWS, SLOTS, torch.rand(7, 2)), ValueError,
     "unpermute: topk_weights must be floating [T, K] with T*K = S = 16, got [7, 2]"),
    (lambda: mk.unpermute(ROWS, SLOTS, IDS), TypeError, "unpermute: topk_weights must be floating [T=8, K=2], got int32 [8, 2]"),
    (lambda: mk.unpermute(ROWS, SLOTS.long(), WEIGHTS), TypeError, "unpermute: slot_to_row must be int32 [S], got int64 [16]"),
    (lambda: mk.unpermute(ROWS, WEIGHTS, SLOTS), TypeError, "unpermute: slot_to_row must be int32 [S], got float32 [8, 2]"),
    (lambda: mk.unpermute(ROWS[0], SLOTS, WEIGHTS), ValueError, "unpermute: rows must be floating [P, H], got [6]"),
    (lambda: mk.unpermute(ROWS, SLOTS, [0.5]), TypeError, "unpermute: topk_weights must be floating [T, K], got list"),
    # permute
    (lambda: mk.permute(X, IDS.float(), 4), TypeError, "permute: topk_ids must be int32 or int64 [T=8, K], got float32 [8, 2]"),
    (lambda: mk.permute(X, IDS[:5], 4), ValueError, "permute: topk_ids must be int32 or int64 [T=8, K], got [5, 2]"),
    (lambda: mk.permute(IDS, X, 4), TypeError, "permute: x must be floating [T, H], got int32 [8, 2]"),
    (lambda: mk.permute(X, IDS[:, :0], 4), ValueError, "permute: K, the second size of topk_ids, must be 1 or more, got 0"),
    (lambda: mk.permute(X, IDS, 0), ValueError, "permute: num_experts must be 1 or more, got 0"),
    (lambda: mk.permute(X, IDS, 4.0), TypeError, "permute: num_experts must be an int, got float 4.0"),
    (lambda: mk.permute(X, IDS, 4, align=0), ValueError, "permute: align must be 1 or more, got 0"),
    (lambda: mk.permute(X, IDS, 2**20, align=2**12), ValueError,
     "permute: P = T*K + E*(align - 1) must be at most 2147483647, got 4293918736"),
    (lambda: mk.permute(X, IDS.to("meta"), 4), ValueError, "permute: topk_ids must be on cpu like the other tensors, got meta"),
    # grouped_gemm
    (lambda: mk.grouped_gemm(X, W13.mT, torch.arange(5, dtype=torch.int32)), ValueError,
     "grouped_gemm: offs must be int32 [E=4], the end of each group, got [5]; of exclusive offsets pass expert_offsets[1:]"),
    (lambda: mk.grouped_gemm(X, W13.mT, OFFS.long()), TypeError, "grouped_gemm: offs must be int32 [E=4], got int64 [4]"),
    (lambda: mk.grouped_gemm(X, W13.mT, OFFS[:3]), ValueError, "grouped_gemm: offs must be int32 [E=4], got [3]"),
    (lambda: mk.grouped_gemm(X, W13.mT), TypeError, "grouped_gemm: offs must be int32 [E], the end of each group, got NoneType"),
    (lambda: mk.grouped_gemm(W13, W13.mT, OFFS), TypeError, "grouped_gemm: offs must be None for two 3-D operands, got int32 [4]"),
    (lambda: mk.grouped_gemm(X, W13, OFFS), ValueError, "grouped_gemm: b must be [..., k=6, N] as a is [8, 6], got [4, 10, 6]"),
    (lambda: mk.grouped_gemm(X, W13.mT.double(), OFFS), TypeError,
     "grouped_gemm: b must be of a's dtype float32, got float64 [4, 6, 10]"),
    (lambda: mk.grouped_gemm(X[0], W13.mT, OFFS), ValueError, "grouped_gemm: a must be 2-D or 3-D, got [6]"),
    (lambda: mk.grouped_gemm(IDS, W13, OFFS), TypeError, "grouped_gemm: a must be a floating tensor, got int32 [8, 2]"),
    (lambda: mk.grouped_gemm(X, W13.mT, OFFS, bias=torch.zeros(4, 9)), ValueError,
     "grouped_gemm: bias must be floating [E=4, N=10], got [4, 9]"),
    (lambda: mk.grouped_gemm(W13, X.T, OFFS, bias=torch.zeros(4, 8)), ValueError,
     "grouped_gemm: bias must be None for a 3-D a and a 2-D b, got float32 [4, 8]"),
    (lambda: mk.grouped_gemm(X, W13.mT, OFFS, out_dtype=torch.int32), TypeError,
     "grouped_gemm: out_dtype must be float64, float32, bfloat16, float16 or None, got torch.int32"),
    (lambda: mk.grouped_gemm(W13[:3], W13.mT), ValueError, "grouped_gemm: b must be [E=3, k, N] as a is [3, 10, 6], got [4, 6, 10]"),
    # route
    (lambda: mk.route(LOGITS, 13), ValueError, "route: top_k must be in 1..E=12, got 13"),
    (lambda: mk.route(LOGITS, 0), ValueError, "route: top_k must be in 1..E=12, got 0"),
    (lambda: mk.route(LOGITS, 2.0), TypeError, "route: top_k must be an int, got float 2.0"),
    (lambda: mk.route(LOGITS[0], 2), ValueError, "route: logits must be floating [T, E], got [12]"),
    (lambda: mk.route(LOGITS.long(), 2), TypeError, "route: logits must be floating [T, E], got int64 [8, 12]"),
    (lambda: mk.route(LOGITS, 2, scoring_func="tanh"), ValueError,
     "route: scoring_func must be one of softmax, sigmoid, sqrtsoftplus, got 'tanh'"),
    (lambda: mk.route(LOGITS, 2, num_expert_group=5, topk_group=1), ValueError,
     "route: num_expert_group must be a divisor of E=12, got 5"),
    (lambda: mk.route(LOGITS, 2, num_expert_group=4, topk_group=5), ValueError,
     "route: topk_group must be in 1..num_expert_group=4, got 5"),
    (lambda: mk.route(LOGITS, 2, num_expert_group=4), TypeError, "route: topk_group must be an int, got NoneType"),
    (lambda: mk.route(LOGITS, 4, num_expert_group=4, topk_group=1), ValueError,
     "route: top_k must be at most the experts in reach (1 groups of 3), got 4"),
    (lambda: mk.route(LOGITS, 2, group_top=0), ValueError, "route: group_top must be 1 or more, got 0"),
    (lambda: mk.route(LOGITS, 2, e_score_correction_bias=torch.zeros(11)), ValueError,
     "route: e_score_correction_bias must be floating [E=12], got [11]"),
    (lambda: mk.route(LOGITS, 2, padding_mask=torch.ones(8)), TypeError, "route: padding_mask must be bool [T=8], got float32 [8]"),
    (lambda: mk.route(LOGITS, 2, padding_mask=torch.ones(7, dtype=torch.bool)), ValueError,
     "route: padding_mask must be bool [T=8], got [7]"),
    # fused_experts
    (experts(X, W13, W2, IDS, WEIGHTS), TypeError,
     "fused_experts: topk_weights (4th argument) must be floating [T, K], got int32 [8, 2]: topk_ids are the 5th"),
    (experts(X, W13, W2, WEIGHTS, IDS.float()), TypeError,
     "fused_experts: topk_ids must be int32 or int64 [T=8, K], got float32 [8, 2]"),
    (experts(X, W13, W2, WEIGHTS, IDS.short()), TypeError, "got int16 [8, 2]"),
    (experts(X, W13, W2, WEIGHTS[:, :1]), ValueError, "fused_experts: topk_weights must be floating [T=8, K=2], got [8, 1]"),
    (experts(X, W13, W2, WEIGHTS[:5], IDS[:5]), ValueError, "fused_experts: topk_ids must be int32 or int64 [T=8, K], got [5, 2]"),
    (experts(X, W13, W2, WEIGHTS[:, :0], IDS[:, :0]), ValueError,
     "fused_experts: K, the second size of topk_ids, must be 1 or more, got 0"),
    (experts(X[None]), ValueError, "fused_experts: x must be floating [T, H], got [1, 8, 6]"),
    (experts(X.long()), TypeError, "fused_experts: x must be floating [T, H], got int64 [8, 6]"),
    (experts("x"), TypeError, "fused_experts: x must be floating [T, H], got str 'x'"),
    (experts(X.double()), TypeError, "fused_experts: w13 must be of x's dtype float64, got float32 [4, 10, 6]"),
    (experts(X, W13.double()), TypeError, "fused_experts: w2 must be of w13's dtype float64, got float32 [4, 6, 5]"),
    (experts(X, W13, W2[:3]), ValueError, "fused_experts: w2 must be floating [E=4, H=6, I], got [3, 6, 5]"),
    (experts(X, W13[:, :9]), ValueError,
     "fused_experts: w13 must be [E=4, 2I=10, H=6] (gated) or [E=4, I=5, H=6], as w2 is [4, 6, 5], got [4, 9, 6]"),
    (experts(gated=False), ValueError,
     "fused_experts: w13 must be [E=4, I=5, H=6] (not gated), as w2 is [4, 6, 5], got [4, 10, 6]"),
    (experts(X, W13.mT, W2), ValueError, "got [4, 6, 10]; is transposed=True meant?"),
    (experts(X, W13, W2.mT), ValueError, "fused_experts: w2 must be floating [E=4, H=6, I], got [4, 5, 6]"),
    (experts(X, W2, W13), ValueError, "fused_experts: w2 must be floating [E=4, H=6, I], got [4, 10, 6]"),
    (experts(X, W13[0]), ValueError, "fused_experts: w13 must be 3-D, one matrix an expert, got [10, 6]"),
    (experts(X, W13.to(torch.uint8)), TypeError,
     "fused_experts: w13 must be a plain floating tensor (float64, float32, bfloat16 or float16; dequantise it first), got uint8"),
    (experts(X, W13, W2.to(torch.float8_e4m3fn)), TypeError, "fused_experts: w2 must be a plain floating tensor"),
    (experts(X, W13, None), TypeError, "fused_experts: w2 must be a floating tensor, got NoneType"),
    (experts(activation="swish"), ValueError,
     "fused_experts: activation must be one of silu, gelu, gelu_tanh, relu, relu2, swigluoai, got 'swish'"),
    (experts(X, W13[:, :5], activation="swigluoai"), ValueError, "fused_experts: w13 must be gated for swigluoai"),
    (experts(X, W13[:, :5], interleaved=True), ValueError, "fused_experts: w13 must be gated for interleaved=True"),
    (experts(w13_bias=torch.zeros(4, 5)), ValueError, "fused_experts: w13_bias must be floating [E=4, 2I=10], got [4, 5]"),
    (experts(w2_bias=torch.zeros(3, 6)), ValueError, "fused_experts: w2_bias must be floating [E=4, H=6], got [3, 6]"),
    (experts(expert_map=torch.zeros(4)), TypeError, "fused_experts: expert_map must be int32 or int64 [G], got float32 [4]"),
    (experts(hidden_mask=torch.ones(8, 2, 6)), ValueError, "fused_experts: hidden_mask must be floating [T=8, K=2, I=5]"),
    (experts(hidden_mask=torch.ones(8, 2, 5, dtype=torch.bool)), TypeError, "got bool [8, 2, 5]"),
    (experts(META), ValueError, "fused_experts: w13 must be on meta like x, got cpu"),
    (experts(X, W13, W2, WEIGHTS.to("meta")), ValueError,
     "fused_experts: topk_weights must be on cpu like the other tensors, got meta"),
    # packed
    (packed((2, W2)), TypeError, "fused_experts: w2 must be None with PackedExperts, which hold it, got float32 [4, 6, 5]"),
    (packed(w13_bias=torch.zeros(4, 10)), TypeError, "fused_experts: w13_bias must be None with PackedExperts"),
    (packed(activation="gelu"), ValueError, "fused_experts: activation must be 'silu', as it was packed, got 'gelu'"),
    (packed((0, X[:, :5])), ValueError, "fused_experts: x must be floating [T, H=6], got [8, 5]"),
    (packed((3, IDS)), TypeError, "topk_weights (4th argument) must be floating"),
    (packed((0, X.clone().requires_grad_())), RuntimeError, "PackedExperts are for inference and have no backward"),
    (lambda: mk.pack_experts(W13, W2, dtype=torch.int8), TypeError, "pack_experts: dtype must be float64, float32"),
    (lambda: mk.pack_experts(W13, W2[:3]), ValueError, "pack_experts: w2 must be floating [E=4, H=6, I], got [3, 6, 5]"),
    (lambda: mk.pack_experts(W13, W2, activation="x"), ValueError, "pack_experts: activation must be one of silu"),
    (lambda: ops.backend_of("softmax", "cpu"), ValueError, "backend_of: op must be one of route, "),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_refusals(call, error, text):
    with pytest.raises(Exception) as info:
        call()
    assert type(info.value) is error
    assert text in str(info.value), str(info.value)


def test_quantised_subclass():
    class Packed(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

        @staticmethod
        def __tensor_unflatten__(inner, meta, size, stride):
            raise NotImplementedError

    w = W13.as_subclass(Packed)
    with pytest.raises(TypeError, match=r"w13 must be a plain floating tensor \(dequantise it first\), got Packed"):
        mk.fused_experts(X, w, W2, WEIGHTS, IDS)


def test_dtensor_weights_give_their_local_part(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Partial, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        w13, w2 = distribute_tensor(W13, mesh).requires_grad_(), distribute_tensor(W2, mesh)
        y = mk.fused_experts(X, w13, w2, WEIGHTS, IDS)
        assert torch.equal(y, mk.fused_experts(X, W13, W2, WEIGHTS, IDS))
        y.sum().backward()
        assert w13.grad is not None
        partial = torch.distributed.tensor.DTensor.from_local(W13, mesh, [Partial()])
        with pytest.raises(ValueError, match="w13 must be sharded or replicated"):
            mk.fused_experts(X, partial, w2, WEIGHTS, IDS)
    finally:
        dist.destroy_process_group()


def test_checked_mode(monkeypatch):
    logits = LOGITS.clone()
    logits[3, 4] = math.nan
    wrong = IDS.clone()
    wrong[2, 1] = 4
    calls = [
        (lambda: mk.route(logits, 2), r"route: logits must be free of NaN, got 1 NaN in float32 \[8, 12\]"),
        (lambda: mk.permute(X, wrong, 4), r"permute: topk_ids must be in -1..3 .* got values from 0 to 4"),
        (lambda: mk.fused_experts(X, W13, W2, WEIGHTS, wrong), r"fused_experts: topk_ids must be in -1..3"),
        (packed((4, wrong)), r"fused_experts: topk_ids must be in -1..3"),
        (lambda: mk.unpermute(ROWS[:15], SLOTS, WEIGHTS), r"unpermute: slot_to_row must be in -1..14"),
        (lambda: mk.grouped_gemm(X, W13.mT, OFFS.flip(0)), r"grouped_gemm: offs must be non-decreasing"),
        (lambda: mk.grouped_gemm(X, W13.mT, OFFS + 1), r"grouped_gemm: offs must be in 0..8"),
    ]
    for call, _ in calls[:4]:
        call()
    monkeypatch.setenv("MOE_KERNELS_DEBUG", "1")
    for call, text in calls:
        with pytest.raises(ValueError, match=text):
            call()
    mk.fused_experts(X, W13, W2, WEIGHTS, IDS - 1)  # -1 marks an absent slot in checked mode too


# ---- without compiled kernels


WITHOUT = """
import os, warnings
import torch
def refuse(path):
    raise OSError("no such library")
torch.ops.load_library = refuse
import moe_kernels as mk
from moe_kernels import ops
from moe_kernels.testing import make_case
case = make_case(5, 8, 6, 4, 2)
def call():
    r = mk.route(torch.randn(5, 4, requires_grad=True), 2)
    y = mk.fused_experts(case.x, case.w13.requires_grad_(), case.w2, r.topk_weights, r.topk_ids)
    y.sum().backward()
    p = mk.permute(case.x, r.topk_ids, 4)
    mk.unpermute(mk.grouped_gemm(p.x_rows, case.w13.mT, p.expert_offsets[1:]), p.slot_to_row, r.topk_weights)
    with torch.no_grad():
        mk.fused_experts(case.x, mk.pack_experts(case.w13, case.w2), None, r.topk_weights, r.topk_ids)
os.environ["MOE_KERNELS_STRICT"] = "0"
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    call()
    call()
for w in seen:
    if issubclass(w.category, RuntimeWarning):
        print(w.message)
print(ops.backend_of("route", "cpu"))
os.environ["MOE_KERNELS_STRICT"] = "1"
try:
    call()
except RuntimeError as error:
    print(error)
"""


def test_without_the_library_the_reference_runs_and_says_so():
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    *lines, backend, strict = run.stdout.splitlines()
    used = ["fused_experts", "fused_experts_backward", "fused_experts_packed", "grouped_gemm", "pack_experts", "permute",
            "route", "route_backward", "unpermute"]  # fmt: skip
    assert sorted(line.split()[0] for line in lines) == used  # once an op
    assert all(" runs the slow reference on cpu: " in line for line in lines)
    assert backend.startswith("('reference', ")
    assert strict.startswith("route runs the slow reference on cpu: ")
    assert "MOE_KERNELS_STRICT" in strict


def test_every_op_has_a_compiled_kernel():
    assert _build.ops_loaded, _build.reason
    assert {op: ops.backend_of(op, "cpu") for op in fallback.SCHEMAS} == dict.fromkeys(
        fallback.SCHEMAS, ("cpu kernel", "")
    )
    assert ops.backend_of("route", "mps")[0] == "reference"

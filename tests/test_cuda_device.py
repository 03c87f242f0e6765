# SPDX-License-Identifier: Apache-2.0
"""The ops on CUDA tensors: what needs a device. Streams, graphs, no synchronisation, a second GPU, large tensors.

Without a GPU there is left to test: that a build with the kernels imports, serves CPU tensors, and says what it is;
that launchers do nothing but launch, which is what a graph can capture; and that the sizes here take every kernel.
"""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch

import moe_kernels as mk
from moe_kernels import _build
from moe_kernels.fallback import backend_of
from moe_kernels.schemas import DTYPE_CODE
from moe_kernels.testing import SAFETY, UNIT, check

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; `make gpu` runs these")
BUILT = _build.info()["cuda"] is not None
STAGES = (
    "route", "route_backward", "expert_cuts", "expert_choice", "sinkhorn", "sum_scores", "sum_scores_backward",
    "limit_capacity", "permute", "permute_backward", "unpermute", "unpermute_backward", "grouped_gemm",
    "grouped_gemm_backward", "fused_experts",
    "fused_experts_backward",
)  # fmt: skip


def in_stages(logits, x, w):
    routing = mk.route(logits, 4)
    rows = mk.permute(x, routing.topk_ids, logits.shape[1])
    return mk.unpermute(rows.x_rows * w, rows.slot_to_row, routing.topk_weights)


def fused(logits, x, w13, w2, w13_bias, w2_bias):
    routing = mk.route(logits, 4)
    x, w13, w2 = (t.bfloat16() for t in (x, w13, w2))
    return mk.fused_experts(x, w13, w2, routing.topk_weights, routing.topk_ids, w13_bias=w13_bias, w2_bias=w2_bias)


@pytest.fixture(params=["stages", "experts"])
def layer(request):
    return in_stages if request.param == "stages" else fused


def inputs(layer, T=64, E=16, H=128, device="cuda"):
    g, I = torch.Generator().manual_seed(0), 64
    weights = ((H,),) if layer is in_stages else ((E, 2 * I, H), (E, H, I), (E, 2 * I), (E, H))
    return [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in ((T, E), (T, H), *weights)]


@pytest.mark.skipif(not BUILT, reason="this build has no CUDA kernels (MOE_KERNELS_CUDA=1 makes one without a GPU)")
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_cuda_kernel_beside_the_cpu_one(stage):
    assert backend_of(stage, "cuda") == ("cuda kernel", "")
    assert backend_of(stage, "cpu") == ("cpu kernel", "")


@pytest.mark.skipif(BUILT, reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so():
    backend, reason = backend_of("route", "cuda")
    assert backend == "reference"
    assert "no kernel of route for cuda" in reason


ROOT = Path(__file__).resolve().parents[1]
needs_sources = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="an installed package carries no sources")


@needs_sources
def test_launchers_only_ask_and_launch():
    """No allocation, no copy, no wait, no read of a device value: a graph captures what is left. The emulator has the
    same functions and no others, so that a launcher that called one more would not build for it."""
    harmless = {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute",
                "cudaLaunchKernelEx", "cudaMemsetAsync", "cudaGetErrorString", "cudaDriverGetVersion",
                "cudaGetDriverEntryPoint", "cudaGetDriverEntryPointByVersion"}  # fmt: skip
    launchers = [path for path in (ROOT / "csrc/cuda").iterdir() if path.name != "probe.cuh"]
    bindings = [ROOT / "csrc/bindings" / name for name in ("cuda_backend.h", "queue.h", "cuda_ops.cpp")]
    for path in (*launchers, *bindings):
        called = set(re.findall(r"\b(cuda[A-Z]\w+)\(", re.sub(r"//.*", "", path.read_text())))
        assert called <= harmless, path.name
    for name in ("ops.cpp", "gemm_ops.cpp", "expert_ops.cpp", "cuda_backend.h"):  # what torch would wait for
        text = (ROOT / "csrc/bindings" / name).read_text()
        assert not re.search(r"\bitem\(|\.cpu\(|synchronize", text), name


# ---- every kernel of the grouped products

# E, S, N, K -> the tiles that choose_config takes for it on sm_80 and on sm_90a, 16-bit numbers
PRODUCTS = {
    (8, 40, 512, 256): ("mma 16x128", "mma 16x128"), (4, 1024, 1024, 512): ("mma 64x128", "mma 64x128"),
    (2, 32768, 4096, 512): ("mma 128x128", "wgmma 2x64x256"), (8, 8192, 4096, 7168): ("mma 128x128", "wgmma 2x128x256"),
}  # fmt: skip
# kernel -> the tests of a GPU that launch it
LAUNCHED_BY = {
    "grouped_rows": "test_every_tile", "grouped_fma": "test_multiply_adds", "zero_rows": "test_every_tile",
    "grouped_wgrad": "test_every_tile", "grouped_wgrad_fma": "test_multiply_adds",
    "grouped_wgrad_add": "test_rows_in_parts", "decode_w13": "test_few_tokens", "decode_w2": "test_few_tokens",
    "decode_w13_plain": "test_few_tokens", "decode_w2_plain": "test_few_tokens",
    "expert_sums": "test_runs_are_bitwise_equal", "weight_gradient": "test_runs_are_bitwise_equal",
    "grouped_rows_sm90": "test_every_tile", "grouped_wgrad_sm90": "test_every_tile",
    "decode_w13_sm90": "test_few_tokens", "decode_w2_sm90": "test_few_tokens",
}  # fmt: skip


@needs_sources
def test_every_kernel_has_a_test_on_a_gpu():
    """A kernel that is added needs a line here, and a test below."""
    files = [path for path in (ROOT / "csrc/cuda").iterdir() if re.match("grouped|decode|expert_rows|fused", path.name)]
    found = {name for path in files for name in re.findall(r"MOE_KERNEL[^;{]*?(\w+)_kernel\(", path.read_text())}
    assert found - {"wgmma_mark"} == set(LAUNCHED_BY)  # the mark is only looked at
    assert all(test in globals() for test in LAUNCHED_BY.values())


@pytest.mark.parametrize("arch", [80, 90])
def test_the_sizes_take_every_tile(arch):
    host = importlib.import_module("moe_kernels._host")
    for (E, S, N, K), tiles in PRODUCTS.items():
        assert host.cuda_product(arch, E, S, N, K, DTYPE_CODE[torch.bfloat16], True)[1] == tiles[arch // 90]
    assert host.cuda_wgrad_parts(arch, 2, 32768, 256, 128, DTYPE_CODE[torch.bfloat16], True) > 1


def product(E, S, N, K, dtype, transposed):
    """A grouped product with its gradients on a GPU, against float64."""
    g = torch.Generator("cuda").manual_seed(0)
    a, b, grad = (torch.randn(size, generator=g, device="cuda").to(dtype) for size in ((S, K), (E, K, N), (S, N)))
    b = b.mT.contiguous().mT if transposed else b
    offs = torch.linspace(0, S - 3, E + 1, device="cuda").int()[1:]
    leaves = (a.requires_grad_(), b.requires_grad_())
    out = mk.grouped_gemm(*leaves, offs)
    grads = torch.autograd.grad(out, leaves, grad)
    unit = 2.0**-10 if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else UNIT[torch.float32]
    ends, begin = offs.tolist(), 0
    for e, end in enumerate(ends):
        rows, weight, pull = (t.detach().double() for t in (a[begin:end], b[e], grad[begin:end]))
        for found, left, right in ((out[begin:end], rows, weight), (grads[0][begin:end], pull, weight.mT),
                                   (grads[1][e], rows.mT, pull)):  # fmt: skip
            truth = left @ right
            spread = unit * math.sqrt(left.shape[1]) * (left.abs() @ right.abs()) + UNIT[dtype] * truth.abs()
            check(found, truth, SAFETY * spread)
        begin = end
    assert out[ends[-1] :].eq(0).all()


@gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_every_tile(sizes, dtype, transposed):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        product(*sizes, dtype, transposed)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_multiply_adds(dtype):
    product(3, 70, 37, 21, dtype, False)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_in_parts(dtype):
    product(2, 32768, 256, 128, dtype, False)


@gpu
@pytest.mark.parametrize("T", [1, 8, 9, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_tokens(T, dtype):
    """Decode, against the same tokens among more than it takes."""
    x, w13, w2, logits = (torch.randn(size, device="cuda").to(dtype)
                          for size in ((80, 256), (8, 128, 256), (8, 256, 64), (80, 8)))  # fmt: skip
    routing = mk.route(logits, 2)
    weights, ids = routing.topk_weights, routing.topk_ids
    few = mk.fused_experts(x[:T], w13, w2, weights[:T], ids[:T])
    many = mk.fused_experts(x, w13, w2, weights, ids)[:T]
    error = (few.double() - many.double()).norm() / many.double().norm()
    assert error <= 8 * UNIT[dtype]


@gpu
def test_nothing_waits_for_the_device(layer):
    leaves = inputs(layer)
    layer(*leaves).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*leaves).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_the_current_stream_is_used(layer):
    leaves = inputs(layer, T=4096)
    wanted = layer(*leaves)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream would be done long before
        moved = [leaf.detach() + 0 for leaf in leaves]
        got = layer(*moved)
    stream.synchronize()
    assert torch.equal(got, wanted)


@gpu
def test_a_graph_replays_forward_and_backward(layer):
    leaves = inputs(layer)
    for _ in range(3):
        torch.autograd.grad(layer(*leaves).sum(), leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(*leaves)
        grads = torch.autograd.grad(y.sum(), leaves)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        wanted = layer(*leaves)
        assert torch.equal(y, wanted)
        assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(wanted.sum(), leaves)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensor_is_used(layer):
    first, second = (layer(*inputs(layer, device=f"cuda:{i}")) for i in range(2))
    assert second.device.index == 1
    assert torch.equal(first.cpu(), second.cpu())
    assert torch.cuda.current_device() == 0


@gpu
def test_runs_are_bitwise_equal(layer):
    leaves = inputs(layer, T=20000)
    runs = [torch.autograd.grad(layer(*leaves).sum(), leaves) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


@gpu
def test_more_than_2_31_elements():
    T, H, K = 300_000, 4096, 2
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.zeros(T, H, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    ids = torch.zeros(T, K, dtype=torch.int32, device="cuda")
    ids[:, 1] = 1
    rows = mk.permute(x, ids, 2)
    assert rows.x_rows.numel() > 2**31
    assert rows.x_rows[-1].eq(1).all()
    y = mk.unpermute(rows.x_rows, rows.slot_to_row, torch.ones(T, K, device="cuda"))
    assert y[-1].eq(2).all()
    assert y[:-1].eq(0).all()


@gpu
def test_experts_of_more_than_2_31_elements():
    T, H, I, K = 300_000, 4096, 16, 2
    if torch.cuda.get_device_properties(0).total_memory < 32 * 2**30:
        pytest.skip("needs 32 GiB of GPU memory")
    x = torch.zeros(T, H, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    w13 = torch.full((2, 2 * I, H), 1 / H, dtype=torch.bfloat16, device="cuda")
    w2 = torch.full((2, H, I), 1 / I, dtype=torch.bfloat16, device="cuda")
    ids = torch.tensor([0, 1], dtype=torch.int32, device="cuda").expand(T, K)
    y = mk.fused_experts(x, w13, w2, torch.ones(T, K, device="cuda"), ids)
    torch.testing.assert_close(y[-1].float(), torch.full((H,), 2 * 0.7310586, device="cuda"), rtol=2**-7, atol=0)
    assert y[:-1].eq(0).all()

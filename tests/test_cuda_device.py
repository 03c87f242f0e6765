# SPDX-License-Identifier: Apache-2.0
"""The ops on CUDA tensors: what needs a device. Streams, graphs, no synchronisation, a second GPU, large tensors.

Without a GPU one thing is left to test: that a build with the kernels imports, serves CPU tensors, and says what it is.
"""

import pytest
import torch

import moe_kernels as mk
from moe_kernels import _build
from moe_kernels.fallback import backend_of

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; `make gpu` runs these")
BUILT = _build.info()["cuda"] is not None
STAGES = (
    "route", "route_backward", "expert_cuts", "expert_choice", "sinkhorn", "sum_scores", "sum_scores_backward",
    "limit_capacity", "permute", "permute_backward", "unpermute", "unpermute_backward", "grouped_gemm", "fused_experts",
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

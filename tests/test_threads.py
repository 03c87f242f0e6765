# SPDX-License-Identifier: Apache-2.0
"""The same bits for any number of threads, in every run, from several Python threads, and in a forked child."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

import moe_kernels as mk
from moe_kernels.testing import gradients, make_case


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(dtype: torch.dtype, skew: str = "zipf") -> list[torch.Tensor]:
    """The outputs and gradients of every op on one case."""
    case = make_case(70, 96, 72, 8, 2, dtype=dtype, skew=skew, bias=True)
    logits = torch.randn(70, 8, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    routing = mk.route(logits, 2)
    (grad_logits,) = torch.autograd.grad(routing.topk_weights.square().sum() + routing.lse.sum(), logits)
    leaves = {name: t.detach().requires_grad_() for name, t in case.leaves().items()}
    options = case.options() | {"w13_bias": leaves["w13_bias"], "w2_bias": leaves["w2_bias"]}
    y = mk.fused_experts(leaves["x"], leaves["w13"], leaves["w2"], leaves["topk_weights"], case.topk_ids, **options)
    found = [*routing[:4], grad_logits, y, *gradients(y, case.grad_y, leaves).values()]
    rows = mk.permute(leaves["x"], case.topk_ids, 8, align=4)
    h = mk.grouped_gemm(rows.x_rows, leaves["w13"].mT, rows.expert_offsets[1:], bias=leaves["w13_bias"])
    y = mk.unpermute(h, rows.slot_to_row, leaves["topk_weights"])
    used = {name: leaves[name] for name in ("x", "w13", "topk_weights", "w13_bias")}
    found += [*rows, h, y, *gradients(y, torch.ones_like(y), used).values()]
    with torch.no_grad():
        packed = mk.pack_experts(case.w13, case.w2)
        found.append(mk.fused_experts(case.x, packed, None, case.topk_weights, case.topk_ids))
    return [t.detach() for t in found]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b))


@pytest.mark.parametrize("skew", ["zipf", "one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads(dtype, skew):
    torch.set_num_threads(1)
    first = everything(dtype, skew)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        assert equal(everything(dtype, skew), first), threads


def test_several_python_threads():
    torch.set_num_threads(2)
    first, found = everything(torch.float32), []
    threads = [threading.Thread(target=lambda: found.append(everything(torch.float32))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 3
    assert all(equal(result, first) for result in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_child():
    """After the pool has run, a child has none of its threads: the kernels must not wait for them."""
    torch.set_num_threads(2)
    torch.utils.deterministic.fill_uninitialized_memory = False  # torch fills with its own pool, which hangs in a child
    case = make_case(70, 96, 72, 8, 2)
    args = (case.x, case.w13, case.w2, case.topk_weights, case.topk_ids)
    first = mk.fused_experts(*args)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"equal" if torch.equal(mk.fused_experts(*args), first) else b"differs")
        finally:
            os._exit(0)
    os.close(writer)
    done = threading.Event()
    timer = threading.Timer(60, lambda: done.is_set() or os.kill(child, 9))
    timer.start()
    said = os.read(reader, 16)
    os.waitpid(child, 0)
    done.set()
    timer.cancel()
    assert said == b"equal"

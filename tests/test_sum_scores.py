# SPDX-License-Identifier: Apache-2.0
"""sum_scores, what balance losses are made of: the kernel against the reference in float64, and its gradient."""

import pytest
import torch

from moe_kernels import reference
from moe_kernels.schemas import SCORING, SCORING_CODE
from moe_kernels.testing import UNIT, check


def case(T, E, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(T, E, generator=g, dtype=torch.float64)).to(dtype), torch.rand(T, generator=g) < 0.7


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scoring", SCORING)
@pytest.mark.parametrize(("T", "E", "B"), [(0, 3, 1), (1, 1, 1), (6, 7, 3), (200, 33, 2), (64, 256, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_the_reference(backend, T, E, B, scoring, normalize, masked, dtype):
    logits, mask = case(T, E, dtype)
    mask = mask if masked else None
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    for cap in (0.0, 2.0):
        got = backend.sum_scores(leaf, SCORING_CODE[scoring], normalize, cap, B, mask)
        want = reference.sum_scores(truth, scoring_func=scoring, normalize=normalize, logit_softcap=cap, groups=B,
                                    padding_mask=mask)  # fmt: skip
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        assert got.dtype == acc
        n = T // B + E + 16  # additions in a row, and what exp and the division lose
        check(got, want.detach(), n * UNIT[acc] * want.detach().abs() + 1e-30, "sums")
        weights = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (grad,) = torch.autograd.grad(got, leaf, weights.to(acc))
        (wanted,) = torch.autograd.grad(want, truth, weights.to(acc).double())
        size = weights.abs().max() if weights.numel() else 1.0  # every term of a gradient is below this
        check(grad, wanted, (E + 32) * UNIT[acc] * size * (2 if normalize else 1) + UNIT[dtype] * wanted.abs(), "grad")


def test_the_same_for_any_number_of_threads():
    logits, mask = case(1000, 64)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(torch.ops.moe_kernels.sum_scores(logits, 0, True, 0.0, 4, mask))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_rows_that_hold_nothing_finite(backend):
    logits = torch.tensor([[-torch.inf, -torch.inf], [torch.nan, 1.0], [torch.inf, 0.0]], requires_grad=True)
    for code, name in enumerate(SCORING):
        got = backend.sum_scores(logits, code, True, 0.0, 3, None)
        want = reference.sum_scores(logits.double(), scoring_func=name, groups=3)
        assert torch.allclose(got.double(), want, atol=1e-6)
        (grad,) = torch.autograd.grad(got.sum() + got[:, 0].sum(), logits)
        assert grad.isfinite().all() and not grad[0].any()


def test_groups_have_to_divide_the_tokens():
    with pytest.raises(RuntimeError, match="T=5 must be a multiple of groups=2"):
        torch.ops.moe_kernels.sum_scores(torch.randn(5, 3), 0, True, 0.0, 2, None)

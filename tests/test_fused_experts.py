# SPDX-License-Identifier: Apache-2.0
"""fused_experts: every option, forward and all gradients, against float64 within the bound that the data gives."""

import math

import pytest
import torch

import moe_kernels as mk
from moe_kernels.schemas import ACTIVATIONS
from moe_kernels.testing import Case, check, expert_layer, gradients, make_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "ungated": {"gated": False},
    "bias": {"bias": True},
    "bias_ungated": {"bias": True, "gated": False},
    "interleaved": {"interleaved": True, "bias": True},
    "transposed": {"transposed": True, "bias": True},
    "transposed_ungated": {"transposed": True, "gated": False},
    "swigluoai": {"interleaved": True, "bias": True, "activation": "swigluoai"},
    "gpt_oss": {"interleaved": True, "transposed": True, "bias": True, "activation": "swigluoai"},
    "expert_map": {"expert_map": True, "bias": True},
    "absent": {"absent": True, "bias": True},
    "on_input": {"weight_on_input": True, "bias": True, "absent": True},
    "hidden_mask": {"hidden_mask": True, "bias": True},
    "everything": {"hidden_mask": True, "bias": True, "absent": True, "expert_map": True, "interleaved": True,
                   "transposed": True, "weight_on_input": True},
}  # fmt: skip
SHAPES = [  # T, H, I, E, K
    (1, 1, 1, 1, 1), (7, 37, 12, 3, 2), (5, 12, 37, 3, 3), (13, 64, 48, 8, 2), (3, 8, 5, 128, 4), (4, 6, 3, 2048, 2),
]  # fmt: skip


def run(backend, case: Case, recompute: bool = False) -> dict[str, torch.Tensor]:
    """y and every gradient, by the names of `expert_layer`."""
    leaves = {name: t.detach().requires_grad_() for name, t in case.leaves().items()}
    options = case.options() | {name: leaves[name] for name in ("w13_bias", "w2_bias") if name in leaves}
    y = backend.fused_experts(leaves["x"], leaves["w13"], leaves["w2"], leaves["topk_weights"], case.topk_ids,
                              recompute=recompute, **options)  # fmt: skip
    return {"y": y.detach()} | gradients(y, case.grad_y, leaves)


def compare(backend, case: Case, recompute: bool = False) -> None:
    got = run(backend, case, recompute)
    for name, (truth, bound) in expert_layer(case, slots_stored=backend.name in ("simt", "cuda")).items():
        assert got[name].dtype == (case.x if name == "y" else case.leaves()[name.removeprefix("grad_")]).dtype, name
        check(got[name], truth, bound, name)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(backend, dtype, option):
    for seed, (T, H, I, E, K) in enumerate([(7, 37, 12, 3, 2), (13, 64, 48, 8, 2)]):
        compare(backend, make_case(T, H, I, E, K, dtype=dtype, seed=seed, **OPTIONS[option]), recompute=seed == 1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(backend, dtype, activation, gated):
    if activation == "swigluoai" and not gated:
        gated = True  # it exists gated only; with a limit that cuts often
    case = make_case(9, 40, 21, 4, 2, dtype=dtype, activation=activation, gated=gated, bias=True, seed=5)
    compare(backend, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_swiglu_limits(backend, dtype):
    case = make_case(9, 40, 21, 4, 2, dtype=dtype, activation="swigluoai", seed=6)
    compare(backend, Case(**{**vars(case), "swiglu_limit": 0.5, "swiglu_alpha": 1.1}))


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "empty"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shapes(backend, dtype, skew):
    for seed, (T, H, I, E, K) in enumerate(SHAPES):
        compare(backend, make_case(T, H, I, E, K, dtype=dtype, skew=skew, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_an_expert(backend, dtype):
    """More rows than any tile is high, more columns than any panel is wide, K = E."""
    compare(backend, make_case(150, 70, 100, 2, 2, dtype=dtype, seed=3))


@pytest.mark.parametrize("transposed", [False, True])
def test_more_rows_than_any_block(backend, transposed):
    """2500 tokens on both experts: past the blocks of rows (480), of a weight gradient (1024), of tokens (2048)."""
    compare(backend, make_case(2500, 40, 21, 2, 2, dtype=torch.float64, transposed=transposed, seed=4))


def test_no_tokens(backend):
    for K in (1, 2):
        got = run(backend, make_case(0, 12, 37, 3, K, bias=True))
        assert got["y"].shape == (0, 12)
        assert all(t.eq(0).all() for t in got.values())


def test_all_ids_absent(backend):
    case = make_case(4, 12, 8, 3, 2, bias=True)
    for bad in (-1, 3, 2**31 - 1):
        got = run(backend, Case(**{**vars(case), "topk_ids": torch.full((4, 2), bad)}))
        assert all(t.eq(0).all() for t in got.values())


def test_absent_slots_are_never_multiplied(backend):
    """A weight of an absent slot, the mask of its hidden row and unused experts may hold anything."""
    case = make_case(6, 12, 8, 4, 2, bias=True, hidden_mask=True)
    ids = torch.tensor([[0, -1], [1, 9], [0, 1], [-5, 0], [1, 0], [0, 2**40]])
    gone = (ids < 0) | (ids >= 4)
    clean = Case(**{**vars(case), "topk_ids": ids})
    dirty = Case(**{**vars(clean), "topk_weights": torch.where(gone, math.nan, case.topk_weights),
                    "hidden_mask": torch.where(gone[..., None], math.inf, case.hidden_mask),
                    "w13": torch.where(torch.arange(4)[:, None, None] > 1, math.nan, case.w13)})  # fmt: skip
    a, b = run(backend, clean), run(backend, dirty)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["grad_topk_weights"][gone].eq(0).all()
    assert a["grad_w13"][2:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_strides(backend, dtype, transposed):
    """Views of larger tensors, weights of the other orientation, and a strided output gradient."""
    case = make_case(7, 24, 10, 4, 2, dtype=dtype, transposed=transposed, bias=True)

    def spread(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), math.nan, dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]

    for change in (
        {"x": case.x.T.contiguous().T}, {"x": torch.cat([case.x, case.x], 1)[:, :24]}, {"x": spread(case.x)},
        {"w13": case.w13.mT.contiguous().mT, "w2": case.w2.mT.contiguous().mT}, {"w13": spread(case.w13)},
        {"w2": case.w2.repeat_interleave(2, 0)[::2]}, {"w13_bias": spread(case.w13_bias)},
        {"grad_y": case.grad_y.T.contiguous().T}, {"grad_y": case.grad_y[:1].expand(7, -1)},
        {"topk_weights": spread(case.topk_weights)}, {"topk_ids": case.topk_ids.T.contiguous().T},
    ):  # fmt: skip
        compare(backend, Case(**{**vars(case), **change}))


@pytest.mark.parametrize("weights", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_dtype(backend, weights):
    case = make_case(7, 24, 10, 4, 2)
    compare(
        backend, Case(**{**vars(case), "topk_weights": case.topk_weights.to(weights), "topk_ids": case.topk_ids.long()})
    )


def test_only_the_gradients_asked_for():
    case = make_case(7, 24, 10, 4, 2, bias=True)
    full = run(mk, case)
    for wanted in case.leaves():
        leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in case.leaves().items()}
        options = case.options() | {"w13_bias": leaves["w13_bias"], "w2_bias": leaves["w2_bias"]}
        y = mk.fused_experts(leaves["x"], leaves["w13"], leaves["w2"], leaves["topk_weights"], case.topk_ids, **options)
        y.backward(case.grad_y)
        assert torch.equal(leaves[wanted].grad, full["grad_" + wanted]), wanted
        assert all(t.grad is None for name, t in leaves.items() if name != wanted)


def test_gated_is_inferred():
    case = make_case(3, 8, 5, 2, 1)
    args = (case.x, case.w13, case.w2, case.topk_weights, case.topk_ids)
    assert torch.equal(mk.fused_experts(*args), mk.fused_experts(*args, gated=True))
    args = (case.x, case.w13[:, :5], case.w2, case.topk_weights, case.topk_ids)
    assert torch.equal(mk.fused_experts(*args), mk.fused_experts(*args, gated=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    case = make_case(7, 24, 10, 4, 2, bias=True)
    with torch.autocast("cpu", dtype):
        got = run(mk, Case(**{**vars(case), "grad_y": case.grad_y.to(dtype)}))
        ids = mk.route(torch.randn(3, 8, dtype=dtype), 2)
    assert got["y"].dtype == dtype
    assert ids.topk_weights.dtype == torch.float32
    assert got["grad_w13"].dtype == torch.float32
    low = Case(
        **{
            **vars(case),
            **{name: getattr(case, name).to(dtype) for name in ("x", "w13", "w2", "w13_bias", "w2_bias", "grad_y")},
        }
    )
    plain = run(mk, low)
    assert all(torch.equal(got[name], plain[name].to(got[name].dtype)) for name in got)


@pytest.mark.parametrize(
    "option", ["plain", "ungated", "interleaved", "transposed", "gpt_oss", "expert_map", "hidden_mask", "on_input"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(dtype, option):
    for T, H, I, E, K in ((1, 37, 12, 3, 2), (7, 64, 33, 4, 2), (40, 32, 64, 2, 2)):
        case = make_case(T, H, I, E, K, dtype=dtype, **OPTIONS[option])
        names = ("w13_bias", "w2_bias", "activation", "gated", "interleaved", "transposed")
        packed = mk.pack_experts(case.w13, case.w2, **{name: getattr(case, name) for name in names})
        assert (packed.dtype, tuple(packed.shape)) == (dtype, (E, (2 if case.gated else 1) * I, H))
        assert packed.nbytes >= case.w13.nbytes + case.w2.nbytes
        rest = {"expert_map": case.expert_map, "hidden_mask": case.hidden_mask}
        rest["apply_router_weight_on_input"] = case.weight_on_input
        y = mk.fused_experts(case.x, packed, None, case.topk_weights, case.topk_ids, **rest)
        check(y, *expert_layer(case)["y"], "y")


def test_packed_in_another_dtype():
    case = make_case(5, 24, 10, 4, 2, bias=True)
    packed = mk.pack_experts(case.w13, case.w2, w13_bias=case.w13_bias, w2_bias=case.w2_bias, dtype=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert packed.nbytes < case.w13.nbytes + case.w2.nbytes + 4096 * 8
    stored = {name: getattr(case, name).bfloat16().float() for name in ("w13", "w2", "w13_bias", "w2_bias")}
    y = mk.fused_experts(case.x, packed, None, case.topk_weights, case.topk_ids)
    check(y, *expert_layer(Case(**{**vars(case), **stored}))["y"], "y")


def test_packed_is_a_copy():
    case = make_case(5, 24, 10, 4, 2)
    w13 = case.w13.clone()
    packed = mk.pack_experts(w13, case.w2)
    before = mk.fused_experts(case.x, packed, None, case.topk_weights, case.topk_ids)
    w13.fill_(math.nan)
    assert torch.equal(mk.fused_experts(case.x, packed, None, case.topk_weights, case.topk_ids), before)


def test_the_layer_in_stages_is_the_fused_layer():
    case = make_case(11, 24, 16, 6, 2)
    rows = mk.permute(case.x, case.topk_ids, 6, align=4)
    ends = rows.expert_offsets[1:]
    h = mk.reference.activate(mk.grouped_gemm(rows.x_rows, case.w13.mT, ends))
    y = mk.unpermute(mk.grouped_gemm(h, case.w2.mT, ends), rows.slot_to_row, case.topk_weights)
    check(y, *expert_layer(case)["y"], "y")

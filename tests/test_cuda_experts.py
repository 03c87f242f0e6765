# SPDX-License-Identifier: Apache-2.0
"""fused_experts' CUDA kernels on the emulator, forward and backward, against float64 within the bound of the data.

The bodies are those of tests/test_fused_experts.py, on shapes that the emulator runs in a second; odd widths take the
plain multiply-adds, widths of whole vectors the tensor cores. On a GPU test_fused_experts.py runs as it is.
"""

import math

import pytest
import simt_ops
import test_fused_experts as bodies
import test_layers
import torch
from test_fused_experts import DTYPES, OPTIONS, compare, run

import moe_kernels as mk
from moe_kernels import presets
from moe_kernels.schemas import ACTIVATIONS
from moe_kernels.testing import Case, check, expert_layer, make_case

pytestmark = pytest.mark.skipif(bool(simt_ops.missing()), reason=simt_ops.missing())
SIMT = simt_ops.BACKEND
ODD, WHOLE = (7, 37, 12, 3, 2), (13, 64, 48, 8, 2)  # T, H, I, E, K


@pytest.fixture(autouse=True)
def _first_seed():
    simt_ops.restart()


# ---- every option, dtype, activation


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype, option):
    wide = dtype in (torch.float64, torch.float32)
    shape, other = (ODD, WHOLE) if wide else (WHOLE, ODD)
    compare(SIMT, make_case(*shape, dtype=dtype, **OPTIONS[option]))
    if option in ("plain", "everything"):
        compare(SIMT, make_case(*other, dtype=dtype, seed=1, **OPTIONS[option]), recompute=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_activations(dtype, activation):
    for gated in (True, False) if activation != "swigluoai" else (True,):
        compare(SIMT, make_case(5, 16, 24, 2, 1, dtype=dtype, activation=activation, gated=gated, bias=True, seed=5))


def test_swiglu_limits():
    case = make_case(9, 16, 24, 4, 2, activation="swigluoai", seed=6)
    compare(SIMT, Case(**{**vars(case), "swiglu_limit": 0.5, "swiglu_alpha": 1.1}))


@pytest.mark.parametrize("option", ["plain", "on_input", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_recompute_is_what_was_kept(dtype, option):
    """The first product of the backward is that of the forward, rounded the same way."""
    case = make_case(*WHOLE, dtype=dtype, **OPTIONS[option])
    kept, again = run(SIMT, case), run(SIMT, case, recompute=True)
    assert all(torch.equal(kept[name], again[name]) for name in kept if name != "y")  # that of few tokens is decode's


def forward(case):
    """y where nothing is kept for a backward: what few tokens get is the decode kernel."""
    args = (case.x, case.w13, case.w2, case.topk_weights, case.topk_ids)
    return SIMT.fused_experts(*args, **case.options())


@pytest.mark.parametrize(("T", "option"), [*((4, option) for option in OPTIONS), (65, "plain"), (65, "on_input")])
def test_inference(T, option):
    """4 tokens are decode's; 65 are too many for it."""
    case = make_case(T, 24, 16, 4, 2, dtype=torch.bfloat16, **OPTIONS[option])
    check(forward(case), *expert_layer(case, slots_stored=True)["y"], "y")


# ---- tokens, experts, skew


@pytest.mark.parametrize("skew", ["uniform", "zipf", "one", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skew(dtype, skew):
    compare(SIMT, make_case(37, 24, 16, 8, 2, dtype=dtype, skew=skew))
    compare(SIMT, make_case(1, 24, 16, 8, 2, dtype=dtype, skew=skew))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_an_expert(dtype):
    """More rows than a tile is high and more columns than it is wide, K = E."""
    compare(SIMT, make_case(90, 72, 40, 2, 2, dtype=dtype, seed=3))


def test_rows_in_parts():
    """An expert of more rows than one block should sum, for the gradients of small weights."""
    compare(SIMT, make_case(1030, 8, 8, 1, 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_with_small_widths(name):
    preset = presets.get(name)
    options = {"activation": preset.activation, "gated": preset.gated, "bias": preset.bias, "skew": "zipf"}
    compare(SIMT, make_case(5, 16, 16, preset.num_experts, preset.top_k, dtype=torch.bfloat16, **options))


def test_no_tokens():
    bodies.test_no_tokens(SIMT)


def test_unused_experts_get_exact_zeros():
    case = make_case(9, 16, 16, 6, 2, dtype=torch.bfloat16, skew="empty", bias=True)
    got = run(SIMT, case)
    unused = [e for e in range(6) if not bool((case.topk_ids == e).any())]
    assert unused
    for name in ("grad_w13", "grad_w2", "grad_w13_bias", "grad_w2_bias"):
        assert got[name][unused].eq(0).all(), name


# ---- ids that name no expert


def test_all_ids_absent():
    bodies.test_all_ids_absent(SIMT)


def test_absent_slots_are_never_multiplied():
    bodies.test_absent_slots_are_never_multiplied(SIMT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hostile_ids_are_absent(dtype):
    """The emulator reports an access beside any tensor; ids and maps of any value must cause none."""
    case = make_case(*WHOLE, dtype=dtype, bias=True)
    ids = torch.randint(-(2**62), 2**62, case.topk_ids.shape, generator=torch.Generator().manual_seed(2))
    ids[::3] = case.topk_ids[::3].long()
    compare(SIMT, Case(**{**vars(case), "topk_ids": ids}))
    places = torch.tensor([2**40, -7, 3, 8, 7, -(2**62), 0, 5])
    compare(SIMT, Case(**{**vars(case), "expert_map": places}))


# ---- layouts of memory


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_strides(dtype, transposed):
    bodies.test_strides(SIMT, dtype, transposed)


def test_weights_of_another_dtype():
    for weights in (torch.float64, torch.bfloat16, torch.float16):
        bodies.test_weights_of_another_dtype(SIMT, weights)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_rows_that_are_not_aligned(offset):
    case = make_case(7, 24, 16, 4, 2, dtype=torch.bfloat16)

    def moved(t):
        memory = torch.empty(t.numel() + offset, dtype=t.dtype)
        memory[offset:] = t.flatten()
        return memory[offset:].view(t.shape)

    for name in ("x", "w13", "w2", "grad_y"):
        compare(SIMT, Case(**{**vars(case), name: moved(getattr(case, name))}))


# ---- the same bits, whatever the schedule and whatever is asked for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))  # of the three schedules and three ways of asynchronous copies
def test_every_schedule_gives_the_same_bits(dtype, seed):
    case = make_case(11, 24, 16, 4, 2, dtype=dtype, bias=True, seed=seed)
    found = []
    for first in (seed, 9 + seed, 21 + seed):
        simt_ops.restart(first)
        found.append(run(SIMT, case))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


def test_only_the_gradients_asked_for():
    case = make_case(7, 24, 16, 4, 2, bias=True)
    full = run(SIMT, case)
    for wanted in case.leaves():
        leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in case.leaves().items()}
        options = case.options() | {"w13_bias": leaves["w13_bias"], "w2_bias": leaves["w2_bias"]}
        y = SIMT.fused_experts(leaves["x"], leaves["w13"], leaves["w2"], leaves["topk_weights"], case.topk_ids,
                               **options)  # fmt: skip
        y.backward(case.grad_y)
        assert torch.equal(leaves[wanted].grad, full["grad_" + wanted]), wanted


def test_a_nan_stays_in_its_token_and_its_expert():
    case = make_case(9, 24, 16, 4, 2, dtype=torch.bfloat16)
    dirty = case.x.clone()
    dirty[3, 5] = math.nan
    clean, got = run(SIMT, case), run(SIMT, Case(**{**vars(case), "x": dirty}))
    others = torch.arange(9) != 3
    assert torch.equal(got["y"][others], clean["y"][others]) and got["y"][3].isnan().all()
    assert torch.equal(got["grad_x"][others], clean["grad_x"][others])
    rest = [e for e in range(4) if e not in case.topk_ids[3].tolist()]
    assert rest and all(torch.equal(got[name][rest], clean[name][rest]) for name in ("grad_w13", "grad_w2"))


# ---- the layer, and models of transformers


def test_layer_against_the_truth():
    with simt_ops.patched():
        test_layers.test_against_the_truth()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{"num_shared_experts": 1}, {"bias": True, "activation": "swigluoai", "interleaved": True}], ids=str
)
def test_layer_is_its_parts(options, dtype):
    with simt_ops.patched():
        test_layers.test_is_its_parts(options, dtype)


def test_layer_on_the_emulator_is_the_layer_on_the_cpu():
    """float64, router and shared expert included: equal but for the order of sums."""
    layer = test_layers.layer_of(dtype=torch.float64, router=mk.Router(**test_layers.V3), num_shared_experts=1)
    x, found = test_layers.x_of(3, 5, dtype=torch.float64), []
    for emulated in (False, True):
        with simt_ops.patched() if emulated else torch.enable_grad():
            y = layer(x)
            found.append((y, *test_layers.grads_of(layer, y)))
    for cpu, simt in zip(*found):
        assert (cpu - simt).abs().max() <= 64 * torch.finfo(torch.float64).eps * cpu.abs().max()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_replaced_model(family):
    """Logits, loss and every gradient of a tiny model, within the bound that test_hf_models measures."""
    pytest.importorskip("transformers")
    import test_hf_models

    model = test_hf_models.build(family)
    with simt_ops.patched():
        assert test_hf_models.compare(model, torch.float64) <= 1.0

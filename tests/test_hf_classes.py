# SPDX-License-Identifier: Apache-2.0
"""The experts function on single modules: every class of the installed transformers, every corner of the interface."""

from __future__ import annotations

import functools
import importlib
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from moe_kernels import hf  # noqa: E402

ACT2FN = importlib.import_module("transformers.activations").ACT2FN


class StubConfig:
    """Any number an experts class may ask for, by the words in its name; small limits so that clamps bite."""

    _experts_implementation = "eager"
    moe_latent_size = None

    RULES: tuple[tuple[str, Any], ...] = (
        (r"act", "silu"),
        (r"eps", 1e-6),
        (r"limit|softcap|cap$", 0.75),
        (r"alpha|beta|scale|factor", 1.25),
        (r"per_tok|top_?k", 2),
        (r"num.*expert|expert.*num|n_.*expert", 5),
        (r"intermediate|ffn|inter", 12),
        (r"hidden|dim|size|width", 16),
        (r"dropout|noise", 0.0),
    )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for pattern, value in self.RULES:
            if re.search(pattern, name):
                return value
        return None


def experts_classes() -> list[tuple[str, str]]:
    """(model folder, class) of every class behind the experts interface of the installed transformers."""
    folder = Path(transformers.__file__).parent / "models"
    found = []
    for path in sorted(folder.glob("*/modeling_*.py")):
        for name in re.findall(r"@use_experts_implementation[^\n]*\n(?:@[^\n]*\n)*class (\w+)", path.read_text()):
            found.append((f"{path.parent.name}.{path.stem}", name))
    return found


def build(home: str, name: str) -> Any:
    module = getattr(importlib.import_module(f"transformers.models.{home}"), name)(StubConfig()).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.6)
    return module


def case_for(module: Any, tokens: int = 11, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids and weights; the last expert gets no token."""
    generator = torch.Generator().manual_seed(2)
    down = module.down_proj
    hidden = down.shape[2] if module.is_transposed else down.shape[1]
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    chosen = torch.rand(tokens, module.num_experts - 1, generator=generator, dtype=torch.float64).topk(top_k)
    return x, chosen.indices, chosen.values


def run(module: Any, name: str, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and all gradients, by name."""
    module.config._experts_implementation = name
    module.zero_grad(set_to_none=True)
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = module(x, ids, weights)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y.backward(g.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    found.update({name: p.grad for name, p in module.named_parameters()})
    return {name: value for name, value in found.items() if value is not None}


# Classes whose own eager code drops to float32 on the way: nothing can agree with them beyond that.
SINGLE = {"OpenAIPrivacyFilterExperts", "BeamExperts", "Inkling2Experts", "MuseSparkExperts"}


@pytest.mark.parametrize(("home", "name"), experts_classes(), ids=lambda value: str(value))
def test_every_class_in_float64(home: str, name: str) -> None:
    """Forward and all gradients against the class's own eager code: float64, 300 products a sum at most."""
    module = build(home, name)
    inputs = case_for(module)
    before, after = run(module, "eager", *inputs), run(module, hf.NAME, *inputs)
    eps = torch.finfo(torch.float32 if name in SINGLE else torch.float64).eps
    assert before.keys() == after.keys()
    for key, reference in before.items():
        scale = float(reference.abs().max()) + 1e-300
        assert float((after[key] - reference).abs().max()) <= 64 * eps * scale, (key, scale)


def test_enough_classes_are_found() -> None:
    assert len(experts_classes()) >= 20


def mixtral(act: str = "silu", dtype: torch.dtype = torch.float64) -> Any:
    module = build("mixtral.modeling_mixtral", "MixtralExperts").to(dtype)
    module.act_fn = ACT2FN[act]
    return module


FUSED = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@pytest.mark.parametrize("act", sorted(set(ACT2FN) - {"prelu", "xielu"}))
def test_every_activation(act: str) -> None:
    """The ones we fuse under our name, all others through their own function: always the right numbers."""
    module = mixtral(act)
    assert hf.activation_name(module.act_fn) == FUSED.get(act)
    inputs = case_for(module)
    before, after = run(module, "eager", *inputs), run(module, hf.NAME, *inputs)
    for key, reference in before.items():
        assert float((after[key] - reference).abs().max()) <= 1e-12 * (float(reference.abs().max()) + 1), key


def test_activations_given_as_functions() -> None:
    assert hf.activation_name(F.silu) == "silu"
    assert hf.activation_name(torch.relu) == "relu"
    assert hf.activation_name(functools.partial(F.gelu, approximate="tanh")) == "gelu_tanh"
    assert hf.activation_name(functools.partial(F.gelu, approximate="none")) is None
    assert hf.activation_name(torch.nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert hf.activation_name(torch.nn.GELU()) == "gelu"
    assert hf.activation_name(lambda v: v) is None
    assert hf.activation_name(None) is None

    class SiLU(torch.nn.Module):  # somebody else's class of a name we know
        pass

    assert hf.activation_name(SiLU()) is None


def gate_of(home: str, name: str) -> Any:
    return hf.fused_gate(build(home, name))


def test_which_gates_are_fused() -> None:
    """gpt-oss's gate by its own numbers; no other class with a gate of its own, although some look alike."""
    assert gate_of("mixtral.modeling_mixtral", "MixtralExperts") == ("silu", False, 7.0, 1.702)
    assert gate_of("gpt_oss.modeling_gpt_oss", "GptOssExperts") == ("swigluoai", True, 0.75, 1.25)
    assert gate_of("deepseek_v3.modeling_deepseek_v3", "DeepseekV3Experts") == ("silu", False, 7.0, 1.702)


def test_a_gate_of_its_own_is_called() -> None:
    """An override on the class, on the instance or in a subclass of gpt-oss is run, never replaced by ours."""
    base = type(mixtral())

    class Tanh(base):  # type: ignore[misc, valid-type]
        def _apply_gate(self, rows: torch.Tensor) -> torch.Tensor:
            gate, up = rows.chunk(2, dim=-1)
            return torch.tanh(gate) + up

    module = mixtral()
    module.__class__ = Tanh
    assert hf.fused_gate(module) is None
    x, ids, weights = case_for(module)
    module.config._experts_implementation = hf.NAME
    by_class = module(x, ids, weights)
    want = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            gate, up = (module.gate_up_proj[e] @ x[t]).chunk(2)
            want[t] += weights[t, k] * (module.down_proj[e] @ (torch.tanh(gate) + up))
    torch.testing.assert_close(by_class, want, rtol=1e-12, atol=1e-12)

    plain = mixtral()
    plain._apply_gate = types.MethodType(Tanh._apply_gate, plain)
    assert hf.fused_gate(plain) is None
    plain.config._experts_implementation = hf.NAME
    assert torch.equal(plain(x, ids, weights), by_class)


def test_interleaved_rows_with_the_default_gate_are_not_fused() -> None:
    """The default gate splits in halves whatever the flag says; what the flag means there is the module's business."""
    module = mixtral()
    module.is_concatenated = False
    assert hf.fused_gate(module) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    module = mixtral()
    x, ids, weights = case_for(module)
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(module.gate_up_proj.shape, dtype=dtype), requires_grad=False)
    module.config._experts_implementation = hf.NAME
    with pytest.raises(TypeError, match=r"MixtralExperts.gate_up_proj is .*quantised.*grouped_mm"):
        module(x, ids, weights)


def test_fp8_models_are_refused_by_name() -> None:
    fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
    with pytest.raises(TypeError, match="FP8 experts.*dequantize=True"):
        fp8.ALL_FP8_EXPERTS_FUNCTIONS[hf.NAME](types.SimpleNamespace(), None, None, None)


def test_missing_and_sharded_weights_are_named() -> None:
    module = mixtral()
    x, ids, weights = case_for(module)
    module.config._experts_implementation = hf.NAME
    module.num_experts = 7
    with pytest.raises(ValueError, match=r"num_experts=7, but the local weights hold 5"):
        module(x, ids, weights)
    module.num_experts = 5
    del module.down_proj
    with pytest.raises(TypeError, match=r"MixtralExperts has no down_proj"):
        module(x, ids, weights)


@pytest.mark.parametrize("act", ["silu", "tanh"])  # fused and unfused
def test_expert_parallel_sentinels(act: str) -> None:
    """Ids >= num_experts are absent: no output and no gradient, even with NaN around."""
    module = mixtral(act)
    module._is_expert_parallel = True
    x, ids, weights = case_for(module)
    gone = torch.zeros_like(ids, dtype=torch.bool)
    gone[::2, 1] = True
    gone[3] = True
    marked = ids.masked_fill(gone, module.num_experts)
    before = run(module, "eager", x, ids, weights.masked_fill(gone, 0.0))
    after = run(module, hf.NAME, x, marked, weights)
    before["weights"] = before["weights"].masked_fill(gone, 0.0)
    for key, reference in before.items():
        torch.testing.assert_close(after[key], reference, rtol=1e-12, atol=1e-12, msg=key)
    assert not after["y"][3].any()
    assert not after["weights"][gone].any()


@pytest.mark.parametrize("act", ["silu", "tanh"])
def test_dummy_row_and_no_rows(act: str) -> None:
    """Expert parallelism may pass one row that belongs to nobody, or none at all."""
    module = mixtral(act)
    module.config._experts_implementation = hf.NAME
    hidden = module.down_proj.shape[1]
    one = module(torch.ones(1, hidden, dtype=torch.float64), torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.float64))
    assert one.shape == (1, hidden) and not one.any()
    empty = torch.ones(0, 2, dtype=torch.float64)
    none = module(torch.ones(0, hidden, dtype=torch.float64), empty.long(), empty)
    assert none.shape == (0, hidden)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "tanh"])
def test_bfloat16_against_float64(weights_dtype: torch.dtype, act: str) -> None:
    """Routing weights in float32 (Mixtral) or bfloat16 (Qwen3): output dtype kept, error of a few roundings."""
    module = mixtral(act, torch.bfloat16)
    x, ids, weights = case_for(module)
    x, weights = x.bfloat16(), weights.to(weights_dtype)
    module.config._experts_implementation = hf.NAME
    y = module(x, ids, weights).detach()
    truth = run(mixtral_of(module, act), "eager", x.double(), ids, weights.double())["y"]
    assert y.dtype == torch.bfloat16
    u = torch.finfo(torch.bfloat16).eps / 2
    assert float((y.double() - truth).norm()) <= 8 * u * float(truth.norm())


def mixtral_of(module: Any, act: str) -> Any:
    double = mixtral(act)
    double.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    return double


@pytest.mark.parametrize("act", ["silu", "tanh"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast(weight_dtype: torch.dtype, input_dtype: torch.dtype, act: str) -> None:
    """Under autocast activations and weights may differ in dtype; the layer runs in that of its weights."""
    module = mixtral(act, weight_dtype)
    x, ids, weights = case_for(module)
    x = x.to(input_dtype).requires_grad_()
    weights = weights.float().requires_grad_()
    module.config._experts_implementation = hf.NAME
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x, ids, weights)
        y.float().sum().backward()
    assert y.dtype == input_dtype
    assert x.grad is not None and x.grad.dtype == input_dtype
    assert weights.grad is not None and bool(weights.grad.isfinite().all())
    truth = run(mixtral_of(module, act), "eager", x.detach().double(), ids, weights.detach().double())["y"]
    assert float((y.detach().double() - truth).norm()) <= 8 * torch.finfo(torch.bfloat16).eps / 2 * float(truth.norm())


def test_dtensor_weights_use_the_local_part() -> None:
    """A weight that is a DTensor is unwrapped: the kernels work on this rank's experts."""

    class Local(torch.Tensor):  # what a DTensor offers, without a process group
        @staticmethod
        def __new__(cls: Any, value: torch.Tensor) -> Any:
            return torch.Tensor._make_subclass(cls, value)

        def to_local(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    module = mixtral()
    x, ids, weights = case_for(module)
    module.config._experts_implementation = hf.NAME
    want = module(x, ids, weights)
    for name in ("gate_up_proj", "down_proj"):
        value = getattr(module, name).detach()
        delattr(module, name)
        setattr(module, name, Local(value))
    got = hf.experts_forward(module, x, ids, weights)
    assert type(got) is torch.Tensor and torch.equal(got, want.detach())


def test_a_stand_in_without_any_flag() -> None:
    """Only weights and an activation: every flag has its default, as in older versions of transformers."""
    module = mixtral()
    x, ids, weights = case_for(module)
    bare = types.SimpleNamespace(gate_up_proj=module.gate_up_proj, down_proj=module.down_proj, act_fn=F.silu)
    want = run(module, "eager", x, ids, weights)["y"]
    torch.testing.assert_close(hf.experts_forward(bare, x, ids, weights), want, rtol=1e-12, atol=1e-12)
    bare.act_fn = torch.tanh  # not one we fuse
    module.act_fn = torch.nn.Tanh()
    want = run(module, "eager", x, ids, weights)["y"]
    torch.testing.assert_close(hf.experts_forward(bare, x, ids, weights), want, rtol=1e-12, atol=1e-12)

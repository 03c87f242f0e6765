# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's switch on whole models: what a user sees before is what they see after."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from moe_kernels import hf  # noqa: E402
from moe_kernels.demo import families, tolerance  # noqa: E402


def ids_of(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_family_is_unchanged(name: str) -> None:
    """Logits, loss, every gradient and greedy generation, inside the measured rounding of the model itself."""
    found = families.compare(name, ids_of(), new_tokens=8)
    assert found["ok"], found


def test_the_check_sees_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: routing weights rounded to bfloat16, a typical slip, must be noticed."""
    right = hf.experts_forward

    def wrong(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return right(module, x, ids, weights.bfloat16().to(weights.dtype))

    monkeypatch.setattr(hf, "experts_forward", wrong)
    found = families.compare("mixtral", ids_of(), new_tokens=2)
    assert found["worst_share_of_bound"] > 4


# Sizes and activation of transformers' own model tests: torch's grouped_mm refuses them on the CPU.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [12, 37])
def test_their_own_criterion_on_odd_sizes(width: int, dtype: torch.dtype) -> None:
    """Logits close to eager by the criterion of transformers' own tests, 1e-4 (16 bit: a few of its eps)."""
    layers = 2 if dtype == torch.float32 else 1  # in 16 bits a last digit of layer 1 may change the choice of layer 2
    model = families.tiny_model(
        "mixtral", hidden=32, width=width, experts=4, layers=layers, hidden_act="gelu", dtype=dtype
    )
    ids = ids_of(13, 7)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        before = model(input_ids=ids).logits.float()
        model.set_experts_implementation(hf.NAME)
        with families.count_calls() as calls:
            after = model(input_ids=ids).logits.float()
    assert calls[0] == len(tolerance.experts_modules(model))
    close = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(after, before, rtol=close, atol=close)


def both(model: Any, call: Any) -> tuple[Any, Any]:
    model.set_experts_implementation("eager")
    before = call(model)
    model.set_experts_implementation(hf.NAME)
    with families.count_calls() as calls:
        after = call(model)
    assert calls[0] > 0
    return before, after


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_router_logits_and_balance_loss(name: str) -> None:
    model = families.tiny_model(name)

    def call(m: Any) -> Any:
        return m(input_ids=ids_of(), labels=ids_of(), output_router_logits=True)

    before, after = both(model, call)
    assert len(after.router_logits) == len(before.router_logits) > 0
    torch.testing.assert_close(after.aux_loss, before.aux_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing() -> None:
    """Recomputed layers give the same bits as kept ones, and our function runs again in the backward."""
    model = families.tiny_model("mixtral").train()
    model.set_experts_implementation(hf.NAME)
    kept = families.outputs_and_gradients(model, ids_of())
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    with families.count_calls() as calls:
        again = families.outputs_and_gradients(model, ids_of())
    assert calls[0] == 2 * len(tolerance.experts_modules(model))
    for key, value in kept.items():
        assert torch.equal(value, again[key]), key


def test_jitter_is_theirs() -> None:
    """Mixtral multiplies its input by noise in training: with the same seed both see the same noise."""
    model = families.tiny_model("mixtral", router_jitter_noise=0.1).train()

    def call(m: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return m(input_ids=ids_of()).logits.detach()

    before, after = both(model, call)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_generation_with_cache_and_sampling() -> None:
    model = families.tiny_model("qwen3_moe")

    def call(m: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return m.generate(ids_of(3, 5), max_new_tokens=12, do_sample=True, top_k=20)

    before, after = both(model, call)
    assert torch.equal(before, after)


def test_save_and_load(tmp_path: Path) -> None:
    """Keys, values and the choice by name at loading are those of transformers."""
    model = families.tiny_model("mixtral")
    keys = list(model.state_dict())
    model.set_experts_implementation(hf.NAME)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=hf.NAME).eval()
    assert loaded.config._experts_implementation == hf.NAME
    assert list(loaded.state_dict()) == keys
    with torch.no_grad(), families.count_calls() as calls:
        assert torch.equal(loaded(input_ids=ids_of()).logits, model(input_ids=ids_of()).logits)
    assert calls[0] == 4


def test_weights_are_read_at_every_call() -> None:
    """An update in place, as an optimiser or a LoRA merge makes it, is seen by the next forward."""
    model = families.tiny_model("mixtral")
    model.set_experts_implementation(hf.NAME)
    with torch.no_grad():
        first = model(input_ids=ids_of()).logits
        for module in tolerance.experts_modules(model):
            module.down_proj.data += 0.05
        second = model(input_ids=ids_of()).logits
    fresh = copy.deepcopy(model)
    fresh.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(second, fresh(input_ids=ids_of()).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_compile_fullgraph(name: str) -> None:
    """torch.compile takes the whole model in one graph with one op of ours a layer; outputs and gradients stay."""
    model = families.tiny_model(name)
    model.set_experts_implementation(hf.NAME)
    plain = families.outputs_and_gradients(model, ids_of())
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    torch._dynamo.reset()
    model.zero_grad(set_to_none=True)
    result = torch.compile(model, fullgraph=True, backend=backend)(input_ids=ids_of(), labels=ids_of(), use_cache=False)
    result.loss.backward()
    assert seen.count("moe_kernels.fused_experts.default") == len(tolerance.experts_modules(model))
    torch.testing.assert_close(result.logits.detach(), plain["logits"], rtol=1e-4, atol=1e-5)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[key], rtol=1e-3, atol=1e-6, msg=key)


def test_compile_fullgraph_unfused() -> None:
    """The path with the module's own activation is taken in one graph too."""
    model = families.tiny_model("mixtral", hidden_act="tanh")
    model.set_experts_implementation(hf.NAME)
    torch._dynamo.reset()
    with torch.no_grad():
        plain = model(input_ids=ids_of(), use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids_of(), use_cache=False).logits
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["moe_kernels", "transformers"])
def test_both_import_orders(first: str) -> None:
    """The name is known whichever is imported first, and importing us does not import transformers."""
    second = "transformers" if first == "moe_kernels" else "moe_kernels"
    load = "transformers.MixtralForCausalLM" if first == "moe_kernels" else "import transformers.integrations.moe"
    lines = [f"import {first}", "import sys"]
    if first == "moe_kernels":
        lines.append("assert 'transformers' not in sys.modules, 'we imported transformers'")
    lines += [
        f"import {second}",
        "import transformers",
        load,
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as functions",
        "from moe_kernels import hf",
        "assert functions['moe_kernels'] is hf.experts_forward and hf.is_registered()",
        "assert 'registered' in hf.hook_state()",
        "from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS as fp8",
        "assert fp8['moe_kernels'] is hf.fp8_experts_forward",
        "assert not [f for f in sys.meta_path if type(f).__module__ == 'moe_kernels.hf.hook']",
        "module = sys.modules['transformers.integrations.moe']",
        "assert type(module.__loader__).__module__ != 'moe_kernels.hf.hook'",
        "import inspect; assert 'class ExpertsInterface' in inspect.getsource(module)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_overhead_of_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading flags, weights and activation from the module costs less than 20 us over the op itself."""
    module = tolerance.experts_modules(families.tiny_model("gpt_oss", hidden=32, width=32))[0]
    x, ids, weights = torch.randn(1, 32), torch.tensor([[0, 1]]), torch.rand(1, 2)
    said: list[Any] = []
    op = hf.experts.ops.fused_experts
    monkeypatch.setattr(hf.experts.ops, "fused_experts", lambda *a, **o: said.append((a, o)) or op(*a, **o))
    hf.experts_forward(module, x, ids, weights)
    monkeypatch.undo()
    (arguments, options), best = said[0], [1.0, 1.0]
    with torch.no_grad():
        for _ in range(2000):
            for way, call in enumerate(
                (lambda: op(*arguments, **options), lambda: hf.experts_forward(module, x, ids, weights))
            ):
                start = time.perf_counter()
                call()
                best[way] = min(best[way], time.perf_counter() - start)
    assert best[1] - best[0] < 20e-6


def test_register_twice_and_unknown_name() -> None:
    assert hf.register() and hf.register()
    model = families.tiny_model("mixtral")
    with pytest.raises(ValueError, match="moe_kernels"):  # transformers lists the valid names, ours among them
        model.set_experts_implementation("no_such_thing")

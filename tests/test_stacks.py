# SPDX-License-Identifier: Apache-2.0
"""The stacks people put around a model keep working: PEFT, FSDP2, expert parallelism, accelerate, autocast, compile.

Results are compared with the model's own code ("eager") in float64, inside the measured effect of a rounding-sized
change of its experts (moe_kernels/demo/tolerance.py), or bit by bit where nothing may change.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

transformers = pytest.importorskip("transformers")

from moe_kernels import hf  # noqa: E402
from moe_kernels.demo import families, tolerance  # noqa: E402

Tensors = dict[str, torch.Tensor]


def ids_of(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


class Expected:
    """What eager gives, and how far a correct result may be from it."""

    def __init__(self, model: Any, ids: torch.Tensor, dtype: torch.dtype = torch.float64, run: Any = None) -> None:
        run = run or families.outputs_and_gradients
        width = getattr(model.config, "intermediate_size", 37)
        self.delta = tolerance.layer_delta(model.config.hidden_size, width, model.config.num_experts_per_tok, dtype)
        self.values: Tensors = run(model, ids)
        self.nudges: list[Tensors] = []
        for seed in (1, 2):
            with tolerance.nudged(model, self.delta, seed):
                self.nudges.append(run(model, ids))

    def check(self, found: Tensors, worst_allowed: float = 1.0) -> None:
        assert found.keys() == self.values.keys()
        for key in self.values:
            assert self.share(found, key) <= worst_allowed, key

    def share(self, found: Tensors, key: str) -> float:
        """The error as a share of its bound."""
        limit = tolerance.bound(self.values[key], [nudge[key] for nudge in self.nudges], self.delta)
        error = tolerance.distance(self.values[key], found[key])
        return error / limit if limit else (0.0 if error == 0 else float("inf"))


def perturbed(found: Tensors) -> Tensors:
    """The twin of every comparison: one expert gradient (or the logits) off by a millionth has to be noticed."""
    key = next((k for k in found if "down_proj" in k), "logits")
    return {**found, key: found[key] * (1 + 1e-6)}


def must_differ(expected: Expected, found: Tensors) -> None:
    with pytest.raises(AssertionError):
        expected.check(perturbed(found))


class Through:
    """A model whose calls go through something: a compiled or a prepared version of it."""

    def __init__(self, model: Any, call: Any) -> None:
        self.model, self.call = model, call

    def __call__(self, **words: Any) -> Any:
        return self.call(**words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def layers_of(model: Any) -> int:
    return len(tolerance.experts_modules(model))


# ---- several processes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    """A tiny Mixtral in float64 on disk, four sequences, and what one process computes from them."""
    folder = tmp_path_factory.mktemp("ranks")
    model = families.tiny_model("mixtral", dtype=torch.float64)
    model.save_pretrained(folder / "model")
    torch.save(ids_of(4), folder / "ids.pt")
    return folder, Expected(model, ids_of(4))


def test_fsdp2(checkpoint: tuple[Path, Expected]) -> None:
    """fully_shard on two ranks: the mean of their losses and their averaged gradients are those of the whole batch."""
    folder, expected = checkpoint
    (first, calls), (second, _) = processes.run("stack_workers:fsdp", folder)
    assert calls == 2
    found = {**first, "logits": torch.cat([first["logits"], second["logits"]])}
    found["loss"] = (first["loss"] + second["loss"]) / 2
    expected.check(found)
    must_differ(expected, found)


@pytest.mark.parametrize("how", ["all_reduce", "all_to_all", "moe_kernels"])
def test_expert_parallelism_of_hugging_face(checkpoint: tuple[Path, Expected], how: str) -> None:
    """DistributedConfig(ep_size=2): each rank holds half of the experts; inference and training are those of one."""
    folder, expected = checkpoint
    ranks = processes.run(f"stack_workers:expert_parallel_{how}", folder)
    for found, calls in ranks:
        assert calls == 2
        expected.check(found)
    must_differ(expected, ranks[0][0])


def test_a_failing_rank_shows_its_traceback(tmp_path: Path) -> None:
    """The harness above: the others are ended at once and the reason is printed."""
    with pytest.raises(AssertionError, match="rank 1 has had enough"):
        processes.run("stack_workers:fails_on_one_rank", tmp_path)


# ---- PEFT


def lora(model: Any) -> Any:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    return peft.get_peft_model(model, config)


def test_lora_on_expert_parameters() -> None:
    """The adapters' gradients are eager's; merged into the weights, the model gives the same without PEFT."""
    with torch.random.fork_rng():
        model = lora(families.tiny_model("mixtral", dtype=torch.float64))
    model.set_experts_implementation("eager")
    expected = Expected(model, ids_of())
    adapters = [key for key in expected.values if "lora_" in key]
    assert len([key for key in adapters if "experts" in key]) == 2 * 2 * 2  # layers, parameters, A and B
    model.set_experts_implementation(hf.NAME)
    with families.count_calls() as calls:
        found = families.outputs_and_gradients(model, ids_of())
    assert calls[0] == 2
    expected.check(found)
    with pytest.raises(AssertionError):
        expected.check({**found, adapters[-1]: found[adapters[-1]] * (1 + 1e-6)})

    plain = model.merge_and_unload()
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    with torch.no_grad(), families.count_calls() as calls:
        merged = plain(input_ids=ids_of(), use_cache=False).logits
    assert calls[0] == 2
    assert expected.share({"logits": merged}, "logits") <= 1.0


def test_lora_learns() -> None:
    """Three steps of an optimiser on the adapters alone: the loss of every step is eager's."""

    def losses(name: str) -> Tensors:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = lora(families.tiny_model("mixtral", dtype=torch.float64))
        model.set_experts_implementation(name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        return {f"loss {step}": loss for step, loss in enumerate(steps(model, optimizer, 3))}

    before, after = losses("eager"), losses(hf.NAME)
    assert before["loss 2"] < before["loss 0"]
    for key, loss in before.items():  # three steps of a smooth function; rounding of float64
        assert abs(float(after[key] - loss)) <= 1e3 * torch.finfo(torch.float64).eps * float(loss), key


def steps(model: Any, optimizer: Any, count: int) -> list[torch.Tensor]:
    found = []
    for _ in range(count):
        loss = model(input_ids=ids_of(), labels=ids_of(), use_cache=False).loss
        found.append(loss.detach().clone())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


# ---- accelerate


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str) -> None:
    """A prepared model, optimiser and loader train as the bare ones under the same autocast, bit by bit."""
    accelerate = importlib.import_module("accelerate")

    def build() -> tuple[Any, Any]:
        model = families.tiny_model("qwen3_moe").train()
        model.set_experts_implementation(hf.NAME)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    model, optimizer = build()
    context = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

    def in_context(**words: Any) -> Any:
        with context:
            return model(**words)

    bare = steps(Through(model, in_context), optimizer, 3)

    accelerate.state.AcceleratorState._reset_state(True)  # it is one a process, and a case changes its precision
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids_of()], batch_size=2)
    prepared, optimizer, loader = accelerator.prepare(*build(), loader)
    with families.count_calls() as calls:
        found = []
        for _ in range(3):
            for batch in loader:
                loss = prepared(**batch, use_cache=False).loss
                found.append(loss.detach().clone())
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
    assert calls[0] == 3 * 2
    assert [float(loss) for loss in found] == [float(loss) for loss in bare]
    assert found[2] < found[0]
    unwrapped = accelerator.unwrap_model(prepared)
    for key, value in model.state_dict().items():
        assert torch.equal(unwrapped.state_dict()[key], value), key


# ---- one process, torch alone


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """Recomputed layers give the bits of kept ones, and our function runs again in the backward."""
    model = families.tiny_model(name).train()
    model.set_experts_implementation(hf.NAME)
    kept = families.outputs_and_gradients(model, ids_of())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # the reentrant kind needs an input with a gradient
    with families.count_calls() as calls:
        again = families.outputs_and_gradients(model, ids_of())
    assert calls[0] == 2 * layers_of(model)
    assert kept.keys() == again.keys()
    for key, value in kept.items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_autocast(name: str) -> None:
    """bfloat16 autocast over float32 weights: as near to float64 as eager's own autocast is.

    Every expert is chosen, so that no rounding changes the choice and outputs stay comparable.
    """
    model = families.tiny_model(name, experts=4, top_k=4)
    exact = families.outputs_and_gradients(copy.deepcopy(model).double(), ids_of())

    def run(implementation: str) -> Tensors:
        model.set_experts_implementation(implementation)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return families.outputs_and_gradients(model, ids_of())

    eager = run("eager")
    with families.count_calls() as calls:
        ours = run(hf.NAME)
    assert calls[0] == layers_of(model)
    assert ours.keys() == exact.keys()
    for key, truth in exact.items():
        assert ours[key].dtype == eager[key].dtype, key
        floor = torch.finfo(torch.bfloat16).eps * float(truth.norm()) / 8
        assert tolerance.distance(truth, ours[key]) <= 2 * tolerance.distance(truth, eager[key]) + floor, key


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_compile_fullgraph_train_and_infer(name: str) -> None:
    """One graph each for training and for inference, one op of ours a layer, eager's results."""
    model = families.tiny_model(name, dtype=torch.float64)
    expected = Expected(model, ids_of())
    model.set_experts_implementation(hf.NAME)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return importlib.import_module("torch._dynamo.backends.debugging").aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected.check(families.outputs_and_gradients(Through(model, compiled), ids_of()))
    with torch.no_grad():
        logits = compiled(input_ids=ids_of(), use_cache=False).logits
    assert expected.share({"logits": logits}, "logits") <= 1.0
    assert len(graphs) == 2
    assert all(graph.count("moe_kernels.fused_experts.default") == layers_of(model) for graph in graphs)


# ---- files


def test_safetensors(tmp_path: Path) -> None:
    """Sharded save_pretrained and back: per-expert names on disk, the same bits in memory, nothing of ours in it."""
    safetensors = importlib.import_module("safetensors")
    model = families.tiny_model("mixtral")
    model.set_experts_implementation(hf.NAME)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    names = [name for file in files for name in safetensors.safe_open(file, "pt").keys()]  # noqa: SIM118  no dict
    assert any("experts.0.w1.weight" in name for name in names)
    assert "moe_kernels" not in (tmp_path / "config.json").read_text()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(plain.state_dict()[key], value), key

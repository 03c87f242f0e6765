# SPDX-License-Identifier: Apache-2.0
"""MoELayer in the stacks people use: compile, export, checkpointing, copies and files, PEFT, DDP and FSDP2.

Where torch may order sums otherwise, results agree within what a rounding-sized change of the weights does to them;
where nothing may change they are the same bits.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import processes
import pytest
import stack_workers
import torch
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from moe_kernels.demo import tolerance

Tensors = dict[str, torch.Tensor]
H, I, E = 16, 12, 8

V3 = mk.Router(
    scoring_func="sigmoid", correction_bias=True, num_expert_group=2, topk_group=1, routed_scaling_factor=2.5
)
SWITCH = {"router": mk.Router(renormalize=False), "activation": "relu", "gated": False, "losses": "switch"}
LAYERS: dict[str, dict[str, Any]] = {
    "mixtral": {"top_k": 2},
    "deepseek-v3": {"top_k": 2, "router": V3, "num_shared_experts": 1, "losses": "deepseek_v3"},
    "switch": {"top_k": 1, "capacity": mk.Capacity(1.0, group="sequence"), **SWITCH},
    "switch, attached": {"top_k": 1, "capacity": mk.Capacity(1.0), "attach_losses": True, **SWITCH},
    "gpt-oss": {
        "top_k": 2,
        "router": mk.Router(bias=True),
        "activation": "swigluoai",
        "bias": True,
        "interleaved": True,
    },
    "qwen2": {"top_k": 2, "shared_intermediate_size": 20, "shared_gate": True, "losses": ("switch", "z_loss")},
    "llama4": {"top_k": 1, "router": mk.Router(scoring_func="sigmoid", renormalize=False, weight_on_input=True)},
}
names = pytest.mark.parametrize("name", LAYERS)


def build(name: str, **more: Any) -> mk.MoELayer:
    torch.manual_seed(0)
    words = {"dtype": torch.float64, **LAYERS[name], **more}
    layer = mk.MoELayer(H, I, E, words.pop("top_k"), **words)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.3)
    return layer


def x_of(sequences: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randn(sequences, length, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(call: Any, layer: mk.MoELayer, x: torch.Tensor) -> Tensors:
    """Output, loss of the layer, and the gradients of x and every parameter."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = call(x)
    aux = layer.aux_loss.detach()
    total = (y * torch.linspace(-1, 1, H, dtype=y.dtype)).sum()
    (total if layer.attach_losses else total + layer.aux_loss).backward()
    found = {"y": y.detach(), "aux": aux, "x": x.grad}
    found.update({n: p.grad for n, p in layer.named_parameters() if p.grad is not None})
    return {key: value.clone() for key, value in found.items()}


class Expected:
    """The plain layer, and how far a rounding-sized change of all its weights moves each result."""

    def __init__(self, layer: mk.MoELayer, x: torch.Tensor) -> None:
        self.delta = tolerance.layer_delta(H, I, 2, torch.float64)
        self.values = run(layer, layer, x)
        moved = copy.deepcopy(layer)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter *= 1 + self.delta * (torch.randint(0, 2, parameter.shape, dtype=parameter.dtype) * 2 - 1)
        self.moved = run(moved, moved, x)

    def check(self, found: Tensors) -> None:
        assert found.keys() == self.values.keys()
        for key, value in self.values.items():
            limit = tolerance.bound(value, [self.moved[key]], self.delta)
            assert tolerance.distance(value, found[key]) <= limit, key

    def check_with_twin(self, found: Tensors) -> None:
        """Right as it is, and noticed where one gradient is off by a millionth of a millionth."""
        self.check(found)
        with pytest.raises(AssertionError):
            self.check({**found, "experts.w2": found["experts.w2"] * (1 + 1e-12)})


# ---- compile and export


@names
def test_compile_train_and_infer(name: str) -> None:
    """One graph for training and one for inference, of any number of sequences, with one expert op of ours."""
    layer = build(name)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return importlib.import_module("torch._dynamo.backends.debugging").aot_eager(graph, inputs)

    expected = {sequences: Expected(copy.deepcopy(layer), x_of(sequences)) for sequences in (3, 5)}
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    expected[3].check_with_twin(run(compiled, layer, x_of(3)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        expected[5].check_with_twin(run(compiled, layer, x_of(5)))
    with torch.no_grad():
        y = compiled(x_of(3))
    limit = tolerance.bound(expected[3].values["y"], [expected[3].moved["y"]], expected[3].delta)
    assert tolerance.distance(y, expected[3].values["y"]) <= limit
    assert len(graphs) >= 2  # more where dynamo starts again with a float of the settings as a constant
    assert all(graph.count("moe_kernels.fused_experts.default") == 1 for graph in graphs)
    assert all("moe_kernels.route.default" in graph for graph in graphs)


def test_compile_with_inductor() -> None:
    """The default compiler, forward and backward."""
    layer = build("deepseek-v3")
    expected = Expected(layer, x_of())
    torch._dynamo.reset()
    expected.check_with_twin(run(torch.compile(layer, fullgraph=True), layer, x_of()))


def test_what_a_compiled_layer_leaves_behind() -> None:
    """last_routing and aux_loss are those of the last call, compiled or not."""
    layer = build("switch")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x_of())
    routing, aux = layer.last_routing, layer.aux_loss
    layer(x_of())
    assert routing is not None and routing.dropped is not None and bool(routing.dropped.any())
    assert torch.equal(routing.topk_ids, layer.last_routing.topk_ids)
    assert torch.equal(routing.dropped, layer.last_routing.dropped)
    assert abs(float(aux.detach() - layer.aux_loss.detach())) <= 1e-15 * float(aux.detach())


@names
def test_export(name: str) -> None:
    """torch.export with a free number of sequences, through a file and back, gives the bits of the layer."""
    layer = build(name).eval()
    shapes = ({0: torch.export.Dim("sequences", min=2, max=64)},)
    program = torch.export.export(layer, (x_of(),), dynamic_shapes=shapes)
    loaded = program
    if name != "switch, attached":  # a capacity of the whole batch is a ceil of its size, which torch cannot write
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
    assert str(loaded.graph).count("torch.ops.moe_kernels.fused_experts.default") == 1
    for sequences in (2, 7):
        with torch.no_grad():
            assert torch.equal(loaded.module()(x_of(sequences)), layer(x_of(sequences)))


# ---- memory


@pytest.mark.parametrize("reentrant", [False, True])
@names
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """A recomputed layer gives the bits of a kept one, losses included."""
    layer = build(name, attach_losses=True)  # what is inside a checkpoint must come out through y
    kept = run(layer, layer, x_of())
    again = run(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x_of())
    assert kept.keys() == again.keys()
    for key, value in kept.items():
        assert torch.equal(value, again[key]), key


@names
def test_recompute_is_the_same(name: str) -> None:
    """recompute=True keeps no hidden rows, and changes no bit."""
    kept, thrifty = build(name), build(name, recompute=True)
    a, b = run(kept, kept, x_of()), run(thrifty, thrifty, x_of())
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


# ---- copies and files


def through_pickle(layer: mk.MoELayer, folder: Path) -> mk.MoELayer:
    return pickle.loads(pickle.dumps(layer))  # type: ignore[no-any-return]


def through_torch_save(layer: mk.MoELayer, folder: Path) -> mk.MoELayer:
    torch.save(layer, folder / "layer.pt")
    return torch.load(folder / "layer.pt", weights_only=False)  # type: ignore[no-any-return]


def through_safetensors(layer: mk.MoELayer, folder: Path) -> mk.MoELayer:
    safetensors = importlib.import_module("safetensors.torch")
    safetensors.save_model(layer, folder / "layer.safetensors")
    fresh = copy.deepcopy(layer)
    fresh.reset_parameters()
    safetensors.load_model(fresh, folder / "layer.safetensors")
    return fresh


def through_meta(layer: mk.MoELayer, folder: Path) -> mk.MoELayer:
    fresh = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    fresh.reset_parameters()
    fresh.load_state_dict(layer.state_dict())
    return fresh


WAYS = (copy.deepcopy, through_pickle, through_torch_save, through_safetensors, through_meta)


@names
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_copies(name: str, way: Any, tmp_path: Path) -> None:
    """After a step, and through every way a layer travels: the same bits, nothing shared, nothing lost."""
    layer = build(name)
    before = run(layer, layer, x_of())
    twin = way(layer) if way is copy.deepcopy else way(layer, tmp_path)
    assert list(twin.state_dict()) == list(layer.state_dict())
    mine = {p.data_ptr() for p in layer.parameters()}
    assert not mine & {p.data_ptr() for p in twin.parameters()}
    after = run(twin, twin, x_of())
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_functional_call() -> None:
    """The layer as a function of its parameters, as torch.func wants it."""
    layer = build("deepseek-v3")
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    doubled = {key: value * 2 if key == "experts.w2" else value for key, value in state.items()}
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.experts.w2 *= 2
    assert torch.equal(torch.func.functional_call(layer, doubled, (x_of(),)), other(x_of()))


# ---- mixed precision, adapters


@names
def test_autocast_trains(name: str) -> None:
    """bfloat16 autocast over float32 weights: the error of y against float64 is that of bfloat16 products."""
    exact = build(name, losses=())
    layer = copy.deepcopy(exact).float()
    x = x_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.float())
    y.float().sum().backward()
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)
    truth = exact(x)
    routing, want = layer.last_routing, exact.last_routing
    same = (routing.topk_ids == want.topk_ids).all(-1).reshape(x.shape[:-1])  # a near tie may choose otherwise
    assert float(same.double().mean()) > 0.8
    error = float((y.double() - truth)[same].norm()) / float(truth[same].norm())
    # x, both weights, h, a, y and the router's operands are rounded; a swiglu multiplies two rounded halves
    assert error <= 8 * torch.finfo(torch.bfloat16).eps / 2


def test_lora_on_a_layer() -> None:
    """PEFT adapts the expert weights by name; merged, the plain layer gives the same."""
    peft = importlib.import_module("peft")
    model = torch.nn.Sequential(build("mixtral"))
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["0.experts.w13", "0.experts.w2"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    y = adapted(x_of())
    y.square().sum().backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all(g is not None and bool(g.any()) for g in trained.values())
    merged = adapted.merge_and_unload()
    assert sorted(n for n, _ in merged.named_parameters()) == ["0.experts.w13", "0.experts.w2", "0.router.weight"]
    plain = merged(x_of())
    assert tolerance.distance(y, plain) <= 64 * torch.finfo(torch.float64).eps * float(plain.norm())


# ---- several processes


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, Tensors, float]:
    """A folder with the input, what one process computes, and what it computes with slightly other weights."""
    folder = tmp_path_factory.mktemp("layers")
    torch.save(x_of(4), folder / "x.pt")
    delta = tolerance.layer_delta(H, I, 2, torch.float64)
    moved = stack_workers.small_model()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter *= 1 + delta * (torch.randint(0, 2, parameter.shape, dtype=parameter.dtype) * 2 - 1)
    return folder, stack_workers.step(stack_workers.small_model(), x_of(4)), stack_workers.step(moved, x_of(4)), delta


@pytest.mark.parametrize("worker", ["layer_fsdp", "layer_ddp"])
def test_two_ranks(worker: str, two_layers: tuple[Path, Tensors, Tensors, float]) -> None:
    """Each rank takes half of the batch: outputs, the mean loss and every gradient are those of one process."""
    folder, expected, moved, delta = two_layers
    first, second = processes.run(f"stack_workers:{worker}", folder)
    found = {**first, "y": torch.cat([first["y"], second["y"]]), "loss": (first["loss"] + second["loss"]) / 2}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        limit = tolerance.bound(value, [moved[key]], delta)
        assert tolerance.distance(value, found[key]) <= limit, key
        assert tolerance.distance(value, value * (1 + 1e-10)) > limit, f"{key}: the bound notices nothing"

# SPDX-License-Identifier: Apache-2.0
"""Layers that pack by themselves: the same bits as without, whatever happens to the weights; the rule; the switch."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels import auto_pack
from moe_kernels.layers import Experts

H, I, E, K, T = 48, 40, 4, 2, 80  # about 40 rows an expert
PLENTY = (1 << 40, 1 << 40)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Room for everything, and packing at the third call; no copies left from elsewhere."""
    gc.collect()
    monkeypatch.delenv(auto_pack.VARIABLE, raising=False)
    monkeypatch.setattr(auto_pack, "AFTER", 2)
    monkeypatch.setattr(auto_pack, "free_memory", lambda: PLENTY)
    auto_pack.enable(False)
    auto_pack.enable()
    yield
    auto_pack.enable(False)
    auto_pack.enable()


def layer_and_x(dtype: torch.dtype = torch.float32, tokens: int = T, **options) -> tuple[mk.MoELayer, torch.Tensor]:
    torch.manual_seed(1)
    layer = mk.MoELayer(H, I, E, K, dtype=dtype, init="fan_in", **options)
    with torch.no_grad():  # larger than "fan_in" draws, so that the experts decide the answer
        layer.experts.w13.mul_(10), layer.experts.w2.mul_(10)
    return layer, torch.randn(tokens, H, dtype=dtype)


@torch.no_grad()
def called(module: nn.Module, *args) -> torch.Tensor:
    return module(*args)


def without(module: nn.Module, *args) -> torch.Tensor:
    """The answer of the parameters, the copies left alone."""
    was, auto_pack._on = auto_pack._on, False
    try:
        return called(module, *args)
    finally:
        auto_pack._on = was


def warm(module: nn.Module, *args, layers: int = 1) -> torch.Tensor:
    for _ in range(auto_pack.AFTER):
        called(module, *args)
    assert auto_pack.packed() == (0, 0), "too early"
    y = called(module, *args)
    assert auto_pack.packed()[0] == layers
    return y


# ---- the bits


def test_bits() -> None:
    """Every dtype, odd sizes, biases, experts of many, few and no rows: packed is what the parameters give."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for h, i, gated, bias, on_input in ((48, 40, True, False, False), (33, 70, False, True, True),
                                            (130, 65, True, True, False), (31, 1, True, False, True)):  # fmt: skip
            for t in (13, 40, 211):
                torch.manual_seed(t)
                experts = Experts(h, i, 6, gated=gated, bias=bias, activation="silu", dtype=dtype)
                for p in experts.parameters():
                    nn.init.normal_(p, std=0.3)
                # expert 0 has every token, 1 the first 12, 2 eleven, 3 the rest, 4 none; one slot is absent
                ids = torch.full((t, 3), 3)
                ids[:, 0], ids[:12, 1], ids[:11, 2] = 0, 1, 2
                ids[5, 2] = -1
                x, weights = torch.randn(t, h, dtype=dtype), torch.rand(t, 3, dtype=dtype)
                want = without(experts, x, weights, ids, on_input)
                assert torch.equal(warm(experts, x, weights, ids, on_input), want), (dtype, h, i, t)
                used = called(experts, x, weights, ids, on_input)  # the copy that is there already
                assert torch.equal(used, want) and auto_pack.packed()[0] == 1
                auto_pack.repack(experts)
                assert torch.equal(called(experts, x, weights, ids, on_input), want)
                assert want.abs().max() > 0
                del experts


@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_bits_of_every_instruction_set(level: str) -> None:
    in_a_new_process("t.test_bits()", MOE_KERNELS_ISA=level)


def test_the_panels_are_what_runs(monkeypatch) -> None:
    """Damaged panels change the answer of experts with many rows, and only of those."""
    layer, x = layer_and_x()
    want = warm(layer, x)
    found = auto_pack._slots[layer.experts].copy
    found.packed13.mul_(2)
    assert not torch.equal(called(layer, x), want)
    found.packed13.div_(2)
    assert torch.equal(called(layer, x), want)
    found.packed13.fill_(float("nan"))
    few = x[:11]
    assert torch.equal(called(layer, few), without(layer, few))


# ---- weights that change


def _load(layer: mk.MoELayer) -> None:
    layer.load_state_dict({name: t * 1.5 for name, t in layer.state_dict().items()})


def _in_place(layer: mk.MoELayer) -> None:
    with torch.no_grad():
        layer.experts.w2.add_(0.25)


def _data_add(layer: mk.MoELayer) -> None:
    layer.experts.w13.data += 0.125


def _data_one_expert(layer: mk.MoELayer) -> None:
    layer.experts.w2.data[1] *= 2


def _data_rows(layer: mk.MoELayer) -> None:
    layer.experts.w13.data[:, 7:14] = 0


def _data_new(layer: mk.MoELayer) -> None:
    layer.experts.w13.data = layer.experts.w13.data.flip(1).contiguous()


def _low_rank(layer: mk.MoELayer) -> None:
    a, b = torch.randn(E, 2 * I, 2), torch.randn(E, 2, H)
    layer.experts.w13.data += 0.05 * (a @ b)


def _new_parameter(layer: mk.MoELayer) -> None:
    layer.experts.w2 = nn.Parameter(layer.experts.w2.detach() * 3)


def _optimizer(layer: mk.MoELayer) -> None:
    layer(torch.randn(9, H)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()


def _numpy(layer: mk.MoELayer) -> None:
    layer.experts.w2.detach().numpy()[...] += 0.5


CHANGES = [_load, _in_place, _data_add, _data_one_expert, _data_rows, _data_new, _low_rank, _new_parameter, _optimizer,
           _numpy]  # fmt: skip
SILENT = [_data_add, _data_one_expert, _data_rows, _low_rank, _numpy]  # neither address nor version counter tells


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights(change) -> None:
    layer, x = layer_and_x()
    before = warm(layer, x)
    change(layer)
    want = without(layer, x)
    assert not torch.equal(want, before), "the change changes nothing"
    assert torch.equal(called(layer, x), want)
    assert auto_pack.packed() == (0, 0), "a stale copy is freed"
    assert torch.equal(warm_from_second(layer, x), want)  # and made anew in its time


@pytest.mark.parametrize("change", SILENT)
def test_twin_without_samples(change, monkeypatch) -> None:
    """The same changes with the comparison of samples disabled: the answer is stale, so the tests above see it."""
    layer, x = layer_and_x()
    monkeypatch.setattr(auto_pack, "_samples", lambda w: torch.zeros(w.shape[0], 1, dtype=torch.int32))
    before = warm(layer, x)
    change(layer)
    assert torch.equal(called(layer, x), before) and not torch.equal(without(layer, x), before)


def test_repack_after_an_invisible_write() -> None:
    """One element through .data is beyond the samples, as documented; repack says so to the layer."""
    layer, x = layer_and_x()
    warm(layer, x)
    w2, seen = layer.experts.w2, torch.zeros(E, H, I)
    auto_pack._samples(nn.Parameter(seen)).fill_(1)
    views = seen.view(torch.int32)
    e, h, i = (views == 0).nonzero()[0].tolist()
    w2.data[e, h, i] += 100
    want = without(layer, x)
    assert not torch.equal(called(layer, x), want), "then the head of auto_pack.py is out of date"
    assert mk.repack(layer) == 1 and auto_pack.packed() == (0, 0)
    assert torch.equal(called(layer, x), want)
    assert auto_pack.packed()[0] == 1, "repack does not count calls again"
    assert mk.repack(nn.Linear(2, 2)) == 0


def test_samples_lie_in_all_rows_and_columns() -> None:
    """They are distinct, in place, and reach a good part of the rows and columns of every shape."""
    for rows, columns in ((1536, 2048), (2048, 768), (7, 5), (256, 256), (1, 4096), (300, 1), (40, 96)):
        w = torch.zeros(2, rows, columns, dtype=torch.bfloat16)
        auto_pack._samples(w).fill_(1)
        hit = w != 0
        count = int(hit[0].sum())
        assert count == int(hit[1].sum()) == min(auto_pack.SAMPLES, rows * columns)
        assert int(hit[0].any(1).sum()) >= min(rows, count) // 2
        assert int(hit[0].any(0).sum()) >= min(columns, count) // 2


def test_another_dtype() -> None:
    layer, x = layer_and_x()
    warm(layer, x)
    layer.double()
    assert torch.equal(called(layer, x.double()), without(layer, x.double()))
    assert auto_pack.packed() == (0, 0)


def test_nan_weights_stay_packed() -> None:
    """NaN is not equal to itself, but its bits are: no packing at every call."""
    layer, x = layer_and_x()
    with torch.no_grad():
        layer.experts.w13.fill_(float("nan"))
    warm(layer, x)
    found = auto_pack._slots[layer.experts].copy
    called(layer, x)
    assert auto_pack._slots[layer.experts].copy is found


# ---- Hugging Face


def mixtral() -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moe_kernels").eval()
    return model, torch.randint(64, (4, 30))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits


def test_hugging_face() -> None:
    model, ids = mixtral()
    logits = Logits(model)
    want = without(logits, ids)
    keys = list(model.state_dict())
    assert torch.equal(warm(logits, ids, layers=2), want)
    assert torch.equal(called(logits, ids), want) and list(model.state_dict()) == keys
    next(p for n, p in model.named_parameters() if n.endswith("layers.1.mlp.experts.down_proj")).data *= 2
    want = without(logits, ids)
    assert torch.equal(called(logits, ids), want) and auto_pack.packed()[0] == 1  # the other layer keeps its copy


def test_merged_adapter() -> None:
    """A real LoRA on the experts: merged into packed weights, taken out again, merged for good."""
    peft = pytest.importorskip("peft")
    model, ids = mixtral()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
                             init_lora_weights=False)  # fmt: skip
    model = peft.get_peft_model(model, config).eval()
    logits = Logits(model)
    with model.disable_adapter():
        base = without(logits, ids)
    model.merge_adapter()
    merged = warm(logits, ids, layers=2)
    assert torch.equal(merged, without(logits, ids)) and not torch.equal(merged, base)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(called(logits, ids), without(logits, ids))
        mk.repack(model)
        assert torch.equal(called(logits, ids), without(logits, ids))
        assert auto_pack.packed()[0] == 2
    model.merge_adapter()
    assert torch.equal(called(logits, ids), without(logits, ids))
    assert not torch.equal(called(logits, ids), base)


# ---- where the copies live


def test_copies_belong_to_no_module() -> None:
    layer, x = layer_and_x()
    called(layer, x)
    before = [sorted(vars(module)) for module in layer.modules()]
    y = warm_from_second(layer, x)
    assert [sorted(vars(module)) for module in layer.modules()] == before
    assert set(layer.state_dict()) == {"router.weight", "experts.w13", "experts.w2"}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.experts not in auto_pack._slots
        other.experts.w13.data.zero_()
        assert torch.equal(called(other, x), without(other, x))
    assert torch.equal(called(layer, x), y) and auto_pack.packed()[0] == 1


def warm_from_second(layer: nn.Module, *args) -> torch.Tensor:
    for _ in range(auto_pack.AFTER):
        y = called(layer, *args)
    assert auto_pack.packed()[0] == 1
    return y


def test_freed_with_its_module() -> None:
    layer, x = layer_and_x()
    warm(layer, x)
    panel = weakref.ref(auto_pack._slots[layer.experts].copy.packed13)
    del layer
    gc.collect()
    assert panel() is None and auto_pack.packed() == (0, 0)


def test_old_weights_are_not_kept() -> None:
    """The copy holds no reference to the parameter or its storage."""
    layer, x = layer_and_x()
    warm(layer, x)
    storage = weakref.ref(layer.experts.w13)
    layer.experts.w13 = nn.Parameter(torch.zeros_like(layer.experts.w13))
    gc.collect()
    assert storage() is None


def in_a_new_process(code: str, **env: str) -> None:
    """Runs `code` here, with packing at the third call and room for everything."""
    start = "import test_auto_pack as t; from moe_kernels import auto_pack as a; a.AFTER = 2; "
    start += "a.free_memory = lambda: t.PLENTY; "
    path = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", start + code], env={**os.environ, "PYTHONPATH": path, **env},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr


def fork_drill() -> None:
    """The experts alone: torch's own pool of threads hangs in a forked child, our kernels run serially there."""
    layer, x = layer_and_x()
    called(layer, x)
    args = (x, layer.last_routing.topk_weights, layer.last_routing.topk_ids)
    experts = layer.experts
    want = warm_from_second(experts, *args)
    child = os.fork()
    if child == 0:
        same = torch.equal(called(experts, *args), want)
        experts.w13.data += 1
        fresh = torch.equal(called(experts, *args), without(experts, *args))
        os._exit(0 if same and fresh else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(called(experts, *args), want) and auto_pack.packed()[0] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork() -> None:
    in_a_new_process("t.fork_drill()")


def test_threads() -> None:
    """Calls from four threads while a fifth drops the copy again and again: always the same bits."""
    layer, x = layer_and_x()
    want, wrong, stop = without(layer, x).clone(), [], threading.Event()

    def serve() -> None:
        for _ in range(60):
            if not torch.equal(called(layer.experts, x, weights, ids), experts_want):
                wrong.append(1)

    called(layer, x)
    weights, ids = layer.last_routing.topk_weights, layer.last_routing.topk_ids
    experts_want = without(layer.experts, x, weights, ids)

    def disturb() -> None:
        while not stop.wait(0.002):
            mk.repack(layer)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    other = threading.Thread(target=disturb)
    for thread in (*threads, other):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set(), other.join()
    assert not wrong and torch.equal(called(layer, x), want)

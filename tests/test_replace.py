# SPDX-License-Identifier: Apache-2.0
"""replace, restore and the report: what is taken and what not, nothing half done, everything as it was afterwards."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from block_models import build, run, same, tokens  # noqa: E402

import moe_kernels as mk  # noqa: E402
from moe_kernels import hf  # noqa: E402
from moe_kernels.demo import families  # noqa: E402

EPS = 2.0**-52


def mixtral(dtype: torch.dtype = torch.float64, **words: Any) -> Any:
    return families.tiny_model("mixtral", dtype=dtype, **words)


def experts_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "is_transposed")]


def fingerprint(model: nn.Module) -> list[Any]:
    """Every module by identity with its class, own attributes and parameters, and every config's choice."""
    found: list[Any] = []
    for name, m in model.named_modules():
        plain = {k: id(v) for k, v in vars(m).items() if not k.startswith("_")}
        parameters = [(n, id(p)) for n, p in m.named_parameters(recurse=False)]
        choice = getattr(getattr(m, "config", None), "_experts_implementation", None)
        found.append((name, id(m), type(m), plain, parameters, sorted(vars(m)), choice))
    return found


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# ---- the interface


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_interface_model(name: str) -> None:
    """Every MoE layer and no dense one is taken, and is really called; logits and gradients stay."""
    model = families.tiny_model(name, dtype=torch.float64)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    before = families.outputs_and_gradients(model, ids)
    report = mk.replace(model, strict=True)
    assert report.ok and len(report.taken) == len(experts_of(model)) and not report.skipped
    assert [m for n, m in model.named_modules() if n in {e.name for e in report.taken}] == experts_of(model)
    with families.count_calls() as calls:
        after = families.outputs_and_gradients(model, ids)
    assert calls[0] == len(report.taken)
    same(
        {k if "." not in k else "grad " + k: v for k, v in before.items()},
        {k if "." not in k else "grad " + k: v for k, v in after.items()},
        2.0**-23,
    )  # fmt: skip  routers are float32


@pytest.mark.parametrize("earlier", ["eager", "grouped_mm", "batched_mm"])
def test_restore_puts_the_earlier_choice_back(earlier: str) -> None:
    model = mixtral()
    model.set_experts_implementation(earlier)
    before = fingerprint(model)
    mk.replace(model)
    assert model.config._experts_implementation == "moe_kernels"
    assert mk.restore(model) == 2
    assert fingerprint(model) == before
    assert mk.restore(model) == 0


def test_replace_twice() -> None:
    model = mixtral()
    first, state = mk.replace(model), None
    state = fingerprint(model)
    second = mk.replace(model, strict=True)
    assert fingerprint(model) == state
    assert [e.name for e in second.taken] == [e.name for e in first.taken]
    assert all(e.how.startswith("already on the experts interface") for e in second.taken)
    assert mk.restore(model) == 2 and model.config._experts_implementation == "eager"


def test_a_choice_of_the_users_is_theirs() -> None:
    """Chosen by name before: nothing to restore. Chosen otherwise after replace: restore leaves it."""
    model = mixtral()
    model.set_experts_implementation("moe_kernels")
    assert mk.replace(model).taken[0].how.startswith("already") and mk.restore(model) == 0
    assert model.config._experts_implementation == "moe_kernels"
    model = mixtral()
    mk.replace(model)
    model.set_experts_implementation("grouped_mm")
    assert mk.restore(model) == 0 and model.config._experts_implementation == "grouped_mm"
    mk.replace(model)
    assert mk.restore(model) == 2 and model.config._experts_implementation == "grouped_mm"


def vision_language() -> Any:
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 21, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0], "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1,
        "num_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    return transformers.Qwen3VLMoeForConditionalGeneration(config).eval()


def test_sub_configs() -> None:
    """Only the config of the experts is switched, and each gets its own earlier choice back."""
    model = vision_language()
    model.set_experts_implementation({"": "eager", "text_config": "batched_mm", "vision_config": "grouped_mm"})
    before = model.get_experts_implementation()
    report = mk.replace(model, strict=True)
    assert [e.name for e in report.taken] == [f"model.language_model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert model.get_experts_implementation() == before | {"text_config": "moe_kernels"}
    assert mk.restore(model) == 2 and model.get_experts_implementation() == before


def test_a_model_that_shares_the_config_is_left_alone() -> None:
    config = families.tiny_config("mixtral")
    ours, other = transformers.MixtralForCausalLM(config), transformers.MixtralForCausalLM(config)
    report = mk.replace(ours, strict=True)
    assert all("on a copy of a config that other layers share" in e.how for e in report.taken)
    assert [m.config._experts_implementation for m in experts_of(ours)] == ["moe_kernels"] * 2
    assert [m.config._experts_implementation for m in experts_of(other)] == ["eager"] * 2
    with families.count_calls() as calls, torch.no_grad():
        ours(input_ids=tokens())
        other(input_ids=tokens())
    assert calls[0] == 2
    assert mk.restore(ours) == 2 and all(m.config is config for m in experts_of(ours))
    del other
    gc.collect()
    assert "copy" not in str(mk.replace(ours)) and config._experts_implementation == "moe_kernels"


def test_part_of_a_model() -> None:
    """One layer given, one layer taken."""
    model = mixtral()
    report = mk.replace(model.model.layers[1])
    assert [e.name for e in report.taken] == ["mlp.experts"]
    assert [m.config._experts_implementation for m in experts_of(model)] == ["eager", "moe_kernels"]
    report = mk.replace(experts_of(model)[0])
    assert [e.name for e in report.taken] == [""] and "the model itself" in str(report)
    assert mk.restore(model) == 2 and all(m.config is model.config for m in experts_of(model))


# ---- the report


def test_report_words() -> None:
    report = mk.replace(mixtral())
    assert str(report).splitlines() == [
        "moe_kernels.replace: 2 of 2 MoE layers taken",
        "  taken   model.layers.*.mlp.experts (2 layers): MixtralExperts: experts interface, fused_experts (silu)",
    ]
    entry = report.taken[0]
    assert (entry.name, entry.kind, entry.how, entry.reason) == (
        "model.layers.0.mlp.experts", "MixtralExperts", "experts interface, fused_experts (silu)", "",
    )  # fmt: skip


def test_unfused_is_said() -> None:
    assert "unfused path (Tanh is no activation that we fuse)" in str(mk.replace(mixtral(hidden_act="tanh")))
    model = mixtral()
    experts_of(model)[0].has_post_expert_norm = True
    experts_of(model)[1].down_proj.data = experts_of(model)[1].down_proj.data.float()
    hows = [e.how for e in mk.replace(model).taken]
    assert "a norm behind each expert" in hows[0] and "differ in dtype" in hows[1]


def quantise(model: Any, layer: int = 0) -> None:
    experts_of(model)[layer].down_proj = nn.Parameter(torch.zeros(8, 64, 37, dtype=torch.uint8), requires_grad=False)


class FP8Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 2))


class ForeignMoE(nn.Module):
    """An MoE layer of somebody else, experts one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


def test_what_is_skipped_and_why() -> None:
    model = mixtral()
    quantise(model)
    report = mk.replace(model)
    assert [e.name for e in report.skipped] == ["model.layers.0.mlp.experts"] and not report.ok
    assert "is torch.uint8: quantised experts are not supported" in report.skipped[0].reason
    assert "1 of 2 MoE layers taken" in str(report) and "on a copy of a config" in report.taken[0].how
    with families.count_calls() as calls, pytest.raises(RuntimeError):  # the quantised layer is still theirs to run
        model(input_ids=tokens())
    assert calls[0] == 0

    with torch.device("meta"):
        empty = transformers.MixtralForCausalLM(families.tiny_config("mixtral"))
    assert {e.reason for e in mk.replace(empty).skipped} == {"its weights are on the meta device: load them first"}

    zoo = nn.ModuleDict({"fp8": FP8Experts(), "foreign": ForeignMoE(), "ours": mk.MoELayer(8, 8, 4, 2)})
    report = mk.replace(zoo)
    assert [(e.name, e.kind) for e in report.taken] == [("ours", "MoELayer")]
    reasons = {e.name: e.reason for e in report.skipped}
    assert "FP8" in reasons["fp8"] and reasons["foreign"] == "no adapter knows this class" and len(reasons) == 2


def test_doge_is_refused() -> None:
    config = transformers.DogeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, is_moe=True, num_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    report = mk.replace(transformers.DogeForCausalLM(config))
    assert "one hidden unit wide" in report.skipped[0].reason and not report.taken


def test_blocks_that_cannot_be_taken() -> None:
    """A hook inside, a LoRA-like layer, a forward of somebody else, meta and quantised weights."""

    class Adapted(nn.Linear):
        pass

    def reason(spoil: Any) -> str:
        model = build("switch_transformers")
        experts = model.encoder.block[1].layer[1].mlp.experts
        spoil(experts)
        state = fingerprint(model.encoder)
        with pytest.raises(ValueError, match="has changed nothing"):
            mk.replace(model, strict=True)
        assert fingerprint(model.encoder) == state
        assert not [m for m in model.decoder.modules() if type(m).__name__ == "SwitchTransformersExperts"
                    and "forward" in vars(m)]  # fmt: skip
        (skipped,) = mk.replace(model).skipped
        return skipped.reason

    assert "a hook sits on Linear" in reason(lambda x: x["expert_1"].wi.register_forward_hook(lambda *a: None))
    assert "expert 2 holds a Adapted" in reason(lambda x: setattr(x["expert_2"], "wo", Adapted(21, 32).double()))
    assert "something else has put a forward" in reason(lambda x: setattr(x, "forward", x.forward))
    assert "on the meta device" in reason(lambda x: x["expert_0"].to("meta"))
    assert "quantised (int8 [32, 21])" in reason(
        lambda x: setattr(x["expert_0"].wo, "weight", nn.Parameter(torch.zeros(32, 21).to(torch.int8), False))
    )


def test_a_subclass_with_its_own_forward() -> None:
    model = build("dbrx")
    experts = model.transformer.blocks[0].ffn.experts
    kind = type(experts)
    experts.__class__ = type("MyExperts", (kind,), {"forward": lambda self, x, ids, weights: x})
    assert "MyExperts overrides the forward of DbrxExperts" in mk.replace(model).skipped[0].reason
    experts.__class__ = type("MyExperts", (kind,), {})
    assert mk.replace(model, strict=True).taken[0].kind == "MyExperts"


def test_lora_after_the_replacement_is_not_dropped() -> None:
    """An adapter put on an expert later raises a sentence, and does not vanish from the result."""
    model = build("switch_transformers")
    mk.replace(model)
    model.encoder.block[1].layer[1].mlp.experts["expert_0"].wi = nn.Sequential(nn.Linear(32, 21))
    with pytest.raises(TypeError, match="expert 0 holds a Sequential where a plain nn.Linear is wanted"):
        run(model)


# ---- bad input, strict


def test_strict_changes_nothing() -> None:
    model = mixtral()
    quantise(model, 1)
    state = fingerprint(model)
    with pytest.raises(
        ValueError, match=r"(?s)has changed nothing.*1 of 2 MoE layers.*skipped model.layers.1"
    ) as error:
        mk.replace(model, strict=True)
    assert "quantised" in str(error.value) and fingerprint(model) == state


def test_no_moe_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.TransformerEncoderLayer(8, 2))
    report = mk.replace(model)
    assert not report.ok and not report.taken and not report.skipped and "no MoE layer found" in str(report)
    assert mk.restore(model) == 0
    with pytest.raises(ValueError, match="no MoE layer found"):
        mk.replace(model, strict=True)
    dense = transformers.SwitchTransformersConfig(
        d_model=32, d_ff=16, d_kv=8, num_heads=4, num_layers=1, num_decoder_layers=1, num_sparse_encoder_layers=0,
        num_sparse_decoder_layers=0, vocab_size=64,
    )  # fmt: skip
    assert not mk.replace(transformers.SwitchTransformersForConditionalGeneration(dense)).skipped


@pytest.mark.parametrize("what", [None, "model", [nn.Linear(2, 2)], nn.Linear])
def test_not_a_module(what: Any) -> None:
    with pytest.raises(TypeError, match=r"replace: model must be a torch.nn.Module, got"):
        mk.replace(what)
    with pytest.raises(TypeError, match=r"restore: model must be a torch.nn.Module, got"):
        mk.restore(what)


# ---- blocks: identity, copies, wrappers


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe", "dbrx", "jetmoe", "llama4", "longcat_flash"])
def test_blocks_are_restored_as_they_were(family: str) -> None:
    """The very same modules, parameters and attributes; twice in a row is once."""
    model = build(family)
    result, before = run(model), fingerprint(model)  # in this order: their routers note things in the first forward
    report = mk.replace(model, strict=True)
    state = fingerprint(model)
    again = mk.replace(model, strict=True)
    assert fingerprint(model) == state and [e.name for e in again.taken] == [e.name for e in report.taken]
    assert all(e.how.startswith("already on a forward of our own") for e in again.taken)
    assert mk.restore(model) == len(report.taken)
    assert fingerprint(model) == before and mk.restore(model) == 0
    after = run(model)
    assert all(torch.equal(after[name], result[name]) for name in result)


def test_hooks_and_training_mode_stay() -> None:
    """A hook on the replaced module itself still runs; train() and eval() reach what is inside."""
    model = build("switch_transformers", dropout_rate=0.3)
    experts = model.encoder.block[1].layer[1].mlp.experts
    seen: list[int] = []
    experts.register_forward_hook(lambda module, args, y: seen.append(y.shape[0]))
    mk.replace(model)
    with torch.no_grad():
        first, second = (model.eval()(input_ids=tokens(), labels=tokens()).loss for _ in range(2))
        assert float(first) == float(second)
        first, second = (model.train()(input_ids=tokens(), labels=tokens()).loss for _ in range(2))
    assert float(first) != float(second) and seen == [22] * 4


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_replaced_model(how: str) -> None:
    """A copy is replaced as well, works on its own weights, and can be restored on its own."""
    for model in (build("switch_transformers"), mixtral()):
        count = len(mk.replace(model).taken)
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        before, after = run(model), run(other)
        same(before, after, EPS)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        assert all(torch.equal(after[name], value) for name, value in run(other).items())
        assert mk.restore(other) == count and mk.restore(model) == count
        if "Mixtral" in type(other).__name__:
            assert other.config._experts_implementation == "eager"


@pytest.mark.parametrize("family", ["switch_transformers", "mixtral"])
def test_inside_ddp(family: str, process_group: None) -> None:
    """Before or after wrapping; names without prefix; gradients as without."""
    model = mixtral() if family == "mixtral" else build(family)
    before = run(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    report = mk.replace(wrapped, strict=True)
    assert len(report.taken) == 2 and not any(e.name.startswith("module.") for e in report.taken)

    def call() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        result = wrapped(input_ids=tokens(), labels=tokens(), use_cache=False)
        result.loss.backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        grads = {"grad " + n: g for n, g in grads.items()}  # none: an expert without tokens, in their own code
        return {"logits": result.logits.detach(), "loss": result.loss.detach(), **grads}

    after = call()
    same({name: before[name] for name in after}, after, 2.0**-23 if family == "mixtral" else EPS)
    first = next(model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = call()
    assert float(moved["loss"]) < float(after["loss"]) and next(model.parameters()) is first
    assert mk.restore(wrapped) == 2
    same(moved, call(), 2.0**-23 if family == "mixtral" else EPS)


def test_sharded_by_fsdp2(process_group: None) -> None:
    """Replaced first, sharded afterwards; the other way round the report says what to do."""
    from torch.distributed.fsdp import fully_shard

    model = build("switch_transformers", torch.float32)  # their router makes itself float32, and FSDP wants one dtype
    before = run(model)
    mk.replace(model, strict=True)
    for block in (*model.encoder.block, *model.decoder.block):
        fully_shard(block)
    fully_shard(model)
    result = model(input_ids=tokens(), labels=tokens(), use_cache=False)
    result.loss.backward()
    found = {"grad " + n: p.grad.full_tensor() for n, p in model.named_parameters()}
    found["loss"] = result.loss.detach()
    same({name: before[name] for name in found}, found, 4 * 2.0**-23)

    late = build("switch_transformers", torch.float32)
    fully_shard(late)
    assert all("call replace before the model is sharded" in e.reason for e in mk.replace(late).skipped)


@pytest.mark.parametrize("family", ["switch_transformers", "dbrx", "mixtral"])
def test_compiled_first_replaced_later(family: str) -> None:
    """A model that was compiled and has run is traced anew: after replace, and after restore."""
    model = mixtral(torch.float32) if family == "mixtral" else build(family, torch.float32)
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=backend)

    def call() -> torch.Tensor:
        seen.clear()
        with torch.no_grad():
            return compiled(
                input_ids=tokens(), **({} if family != "switch_transformers" else {"labels": tokens()})
            ).logits

    before = call()
    assert not any("moe_kernels" in target for target in seen)
    report = mk.replace(compiled, strict=True)
    assert not any("_orig_mod" in e.name for e in report.taken)
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-5)
    assert any("moe_kernels" in target for target in seen)
    mk.restore(compiled)
    assert torch.equal(call(), before)
    assert not any("moe_kernels" in target for target in seen)


def test_gradient_checkpointing_of_a_block() -> None:
    model = build("llama4").train()
    mk.replace(model)
    kept = run(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    again = run(model)
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_autocast() -> None:
    """Under bfloat16 autocast a replaced block differs from its own code by roundings to bfloat16 only."""
    model = build("dbrx", torch.float32)
    experts = model.transformer.blocks[0].ffn.experts
    x = torch.randn(2, 9, 32)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(18)])
    share = torch.rand(18, 2)
    with torch.autocast("cpu", torch.bfloat16):
        before = experts(x, ids, share)
        mk.replace(experts, strict=True)
        after = experts(x, ids, share)
    close = 8 * 2.0**-8 * float(before.detach().abs().max())  # three products and an activation, each rounded
    torch.testing.assert_close(after.float(), before.float(), rtol=0, atol=close)


def test_report_is_public() -> None:
    report = mk.replace(nn.Linear(2, 2))
    assert isinstance(report, mk.ReplaceReport) and isinstance(hf.Entry("a", "b", how="c"), hf.Entry)

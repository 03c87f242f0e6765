# SPDX-License-Identifier: Apache-2.0
"""`inspect`: what it says of a checkpoint is what the loaded model turns out to be."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import test_hf_models  # noqa: E402

import moe_kernels as mk  # noqa: E402
from moe_kernels import cli, presets  # noqa: E402
from moe_kernels import inspect as tool  # noqa: E402
from moe_kernels.demo import families, tolerance  # noqa: E402


def save_config(model: Any, folder: Path) -> Path:
    model.config.save_pretrained(folder)
    return folder


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def report_lines(model: Any) -> tuple[list[str], list[str]]:
    return tool._lines(mk.replace(model))


def test_a_checkpoint(tmp_path: Path) -> None:
    """Sizes, memory, what lies on disk, who serves it, by which kernels."""
    model = families.tiny_model("mixtral", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = tool.inspect(tmp_path)
    (row,) = found.layers
    E, K, H, I = row.num_experts, row.top_k, row.hidden_size, row.intermediate_size
    assert (row.layers, row.count, E, K, H, I) == ("layers 0-1", 2, 8, 2, 64, 37)
    experts = tolerance.experts_modules(model)
    assert row.expert_params == count(experts[0])
    assert (found.model, found.dtype, found.total_params) == ("MixtralForCausalLM", "bfloat16", count(model))
    assert found.active_params == count(model) - 2 * (E - K) * 3 * H * I
    size = sum(p.numel() * p.element_size() for m in experts for p in m.parameters())
    assert found.experts_bytes["bfloat16"] == size == found.experts_bytes["float32"] // 2
    assert found.stored_bytes == {"BF16": size}
    assert (found.taken, found.skipped) == report_lines(model)
    sizes = {"H": H, "I": I, "E": E, "K": K, "dtype": torch.bfloat16, "device": "cpu"}
    assert found.kernels == [str(mk.explain("fused_experts", T=T, **sizes)) for T in (1, 512)]
    assert found.notes == []


# A dense first layer; biases and transposed weights; a gated shared expert; no gate; a norm of its own; Mamba between.
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "qwen2_moe", "nemotron_h", "minimax_m3_vl_text", "jamba"])
def test_families(name: str, tmp_path: Path) -> None:
    """From the config alone: the parameters of the real model, and the report of replace() on it."""
    model = test_hf_models.build(name)
    found = tool.inspect(save_config(model, tmp_path))
    experts = tolerance.experts_modules(model)
    assert found.total_params == count(model)
    assert sum(row.count for row in found.layers) == len(experts)
    assert sum(row.count * row.expert_params for row in found.layers) == sum(count(m) for m in experts)
    assert found.active_params is not None and found.active_params < found.total_params
    assert (found.taken, found.skipped) == report_lines(model)
    fused = any("fused_experts" in line for line in found.taken)
    assert all(row.fused == fused for row in found.layers)
    transposed = bool(experts[0].is_transposed)
    laid_out = "x w13 dot: at 1 rows an expert: the weight does not run along the contraction"
    assert any(laid_out in text for text in found.kernels) == transposed


def test_encoder_and_decoder(tmp_path: Path) -> None:
    config = transformers.SwitchTransformersConfig(
        num_layers=4, num_decoder_layers=6, num_sparse_encoder_layers=2, num_sparse_decoder_layers=3, d_model=32,
        d_ff=48, d_kv=8, num_heads=4, num_experts=4, vocab_size=64,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    found = tool.inspect(save_config(model, tmp_path))
    assert [row.count for row in found.layers] == [2, 3]
    assert [row.layers.split()[0] for row in found.layers] == ["encoder", "decoder"]
    assert found.total_params == count(model)
    assert found.active_params == count(model) - 5 * 3 * 2 * 32 * 48
    assert (found.taken, found.skipped) == report_lines(model)


def test_full_size_without_weights(tmp_path: Path) -> None:
    """DeepSeek-V3 of 671 B parameters on any machine: the published total, and the preset's."""
    transformers.DeepseekV3Config().save_pretrained(tmp_path)
    found = tool.inspect(tmp_path, device="sm_90")
    preset = presets.get("deepseek-v3")
    assert abs(found.total_params - preset.total_params()) <= 61 * 256  # their correction bias is a buffer
    assert found.layers[0].layers == "layers 3-60"
    assert all("on sm_90: " in text for text in found.kernels)


@pytest.mark.parametrize("name", presets.names())
def test_presets(name: str) -> None:
    preset, found = presets.get(name), tool.inspect(name)
    (row,) = found.layers
    assert (row.count, row.num_experts) == (preset.num_moe_layers, preset.num_experts)
    assert (found.total_params, found.active_params) == (preset.total_params(), preset.active_params())
    assert name in str(found)


def test_the_kernels_follow_device_and_dtype() -> None:
    for text in tool.inspect("olmoe-1b-7b", dtype=torch.float32, device="sm_90").kernels:
        fallback = mk.explain(
            "fused_experts", T=1, H=2048, I=1024, E=64, K=8, dtype=torch.float32, device="sm_90"
        ).fallback
        assert "float32 on sm_90" in text and ("fallback" in text) == fallback


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers from the config alone, parameters from the heads of the files; the rest is said to be unknown."""
    model = families.tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    with_it = tool.inspect(tmp_path)
    monkeypatch.setattr(tool, "_transformers", lambda: None)
    found = tool.inspect(tmp_path / "config.json")
    assert found.layers == with_it.layers and found.total_params == count(model)
    assert found.taken == [] and "transformers is not installed" in found.notes[0]


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    importlib.import_module("safetensors.torch").save_file(tensors, path)


def test_quantised_experts(tmp_path: Path) -> None:
    save_config(families.tiny_model("mixtral"), tmp_path)
    weight = torch.zeros(37, 64).to(torch.float8_e4m3fn)
    write_safetensors(tmp_path / "a.safetensors", {"model.layers.0.mlp.experts.0.w1.weight": weight})
    found = tool.inspect(tmp_path)
    assert found.stored_bytes == {"F8_E4M3": 37 * 64}
    assert "the experts are stored as F8_E4M3: quantised experts are not supported" in found.skipped[-1]


def test_a_quantised_config(tmp_path: Path) -> None:
    save_config(families.tiny_model("mixtral"), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "mxfp4"}}))
    assert "stored as mxfp4" in tool.inspect(tmp_path).skipped[-1]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.tiny_model("mixtral").save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for words in ("layers 0-1 (2): 8 experts", "Memory of all experts: ", "Experts on disk: F32", "Parameters: ",
                  "Taken over:", "fused_experts [T=512"):  # fmt: skip
        assert words in text
    assert cli.main(["inspect", str(tmp_path), "--json", "--dtype", "float64", "--device", "sm_80"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "float64" and found["layers"][0]["num_experts"] == 8
    assert cli.main(["inspect", "no-such-model"]) == 1
    assert "no preset: switch-base-128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is no JSON"),
        ("[]", "must be a config with a model_type, got nothing"),
        ('{"a": 1}', r"must be a config with a model_type, got \['a'\]"),
        ('{"model_type": "llama"}', "is no Mixture of Experts"),
        ('{"model_type": "unheard_of", "num_experts": 8}', "is not in the table"),
    ],
)
def test_bad_configs(content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        tool.inspect(tmp_path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no file, and .* no preset: switch-base-128"):
        tool.inspect(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"{", b"\x02" + b"\x00" * 7 + b"{]"])
def test_damaged_safetensors(content: bytes, tmp_path: Path) -> None:
    save_config(families.tiny_model("mixtral"), tmp_path)
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors is no safetensors file"):
        tool.inspect(tmp_path)

# SPDX-License-Identifier: Apache-2.0
"""Presets: published totals, the totals of transformers to the last parameter, and layers that run."""

import pytest
import torch

import moe_kernels as mk
from moe_kernels import presets

PUBLISHED = {  # total and active parameters in 10^9, to the digits that are printed
    "switch-base-128": ("7.4", "0.22"), "switch-large-128": ("26.3", "0.74"), "switch-xxl": ("394.7", "11.1"),
    "switch-c": ("1571.4", "1.8"), "mixtral-8x7b": ("46.70", "12.88"), "deepseek-v2": ("235.7", "21.4"),
    "deepseek-v2-lite": ("15.7", "2.7"), "deepseek-v3": ("671.0", "37.6"), "grok-1": ("315.7", "83.8"),
    "qwen3-30b-a3b": ("30.53", "3.35"), "olmoe-1b-7b": ("6.92", "1.28"), "gpt-oss-20b": ("20.9", "4.19"),
}  # fmt: skip
WITHOUT_EMBEDDING = {"deepseek-v3": "36.63", "gpt-oss-20b": "3.6", "deepseek-v2-lite": "2.5"}


def printed(params, like):
    return f"{params / 1e9:.{len(like.split('.')[1])}f}"


def test_names():
    assert presets.names() == tuple(PUBLISHED)
    with pytest.raises(
        ValueError, match=r"presets.get: name must be one of switch-base-128, .*gpt-oss-20b, got 'grok'"
    ):
        presets.get("grok")
    with pytest.raises(ValueError, match="mixtral-8x7b"):
        mk.MoELayer.from_preset("mixtral")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    preset, (total, active) = presets.get(name), PUBLISHED[name]
    assert printed(preset.total_params(), total) == total
    assert printed(preset.active_params(), active) == active
    if name in WITHOUT_EMBEDDING:
        assert printed(preset.active_params(embedding=False), WITHOUT_EMBEDDING[name]) == WITHOUT_EMBEDDING[name]
    table = preset.active_params() - preset.active_params(embedding=False)
    assert table == (0 if preset.tied_embeddings else preset.vocab_size * preset.hidden_size)


def their_configs():
    """The same models as transformers has them."""
    tf = pytest.importorskip("transformers", reason="compares with the models of transformers")
    v2 = {"kv_lora_rank": 512, "first_k_dense_replace": 1, "vocab_size": 102400, "n_shared_experts": 2}
    return {
        "mixtral-8x7b": tf.MixtralConfig(num_local_experts=8, num_experts_per_tok=2),
        "olmoe-1b-7b": tf.OlmoeConfig(intermediate_size=1024),
        "qwen3-30b-a3b": tf.Qwen3MoeConfig(
            num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, hidden_size=2048,
            moe_intermediate_size=768, num_experts=128,
        ),
        "gpt-oss-20b": tf.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
        "deepseek-v3": tf.DeepseekV3Config(),
        "deepseek-v2": tf.DeepseekV2Config(
            num_hidden_layers=60, hidden_size=5120, intermediate_size=12288, moe_intermediate_size=1536,
            n_routed_experts=160, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, **v2,
        ),
        "deepseek-v2-lite": tf.DeepseekV2Config(
            num_hidden_layers=27, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
            n_routed_experts=64, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None, **v2,
        ),
        "switch-base-128": tf.SwitchTransformersConfig(
            vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=12, num_decoder_layers=12,
            num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=128,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3",
                                  "deepseek-v2", "deepseek-v2-lite", "switch-base-128"])  # fmt: skip
def test_totals_are_those_of_transformers(name):
    config = their_configs()[name]
    import transformers as tf

    kind = tf.SwitchTransformersForConditionalGeneration if name.startswith("switch") else tf.AutoModelForCausalLM
    with torch.device("meta"):
        model = kind(config) if name.startswith("switch") else kind.from_config(config)
    bias = [b for key, b in model.named_buffers() if key.endswith("e_score_correction_bias")]
    mine = [p for key, p in model.named_parameters() if "relative_attention_bias" not in key]  # 768 numbers of T5
    theirs = sum(t.numel() for t in mine + bias)
    assert presets.get(name).total_params() == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_of_full_size_on_meta(name):
    preset = presets.get(name)
    layer = mk.MoELayer.from_preset(name, device="meta", dtype=torch.bfloat16)
    H, I, E = preset.hidden_size, preset.intermediate_size, preset.num_experts
    assert layer.experts.w13.shape == (E, 2 * I if preset.gated else I, H) and layer.experts.w13.is_meta
    assert layer.router.weight.dtype == torch.bfloat16
    y = layer(torch.empty(2, 5, H, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, H), torch.bfloat16, "meta")
    count = sum(t.numel() for t in layer.state_dict().values())
    dense = preset._params(preset.num_experts) - preset.num_moe_layers * count
    other = (
        (preset.num_layers - preset.num_moe_layers) * (3 if preset.gated else 2) * H * preset.dense_intermediate_size
    )
    attention = preset.num_layers * preset.attention.params(H) + int(preset.num_layers * preset.norms) * H
    embeddings = (1 if preset.tied_embeddings else 2) * preset.vocab_size * H + preset.final_norms * H
    assert dense == other + attention + embeddings  # what is left without the MoE layers


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_runs_and_trains(name):
    """Every preset with its own router, capacity and losses, at small widths."""
    preset = presets.get(name)
    layer = mk.MoELayer.from_preset(name, hidden_size=16, intermediate_size=8)
    x = torch.randn(2, 11, 16, requires_grad=True)
    y = layer(x)
    assert (layer.aux_loss > 0) == bool(preset.losses)
    (y.sum() + layer.aux_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    routing = layer.last_routing
    assert routing.topk_ids.shape == (22, preset.top_k)
    assert (routing.dropped is not None) == (preset.capacity is not None)
    if preset.capacity is not None:  # Switch: the probability itself is the weight, C = ceil(22 / E * 1.25)
        assert int(routing.tokens_per_expert.max()) <= preset.capacity.slots(22, 1, preset.num_experts)
        assert (routing.topk_weights < 1).all()


def test_rules_of_the_presets():
    v3, grok = presets.get("deepseek-v3").router, presets.get("grok-1")
    assert (v3.scoring_func, v3.num_expert_group, v3.topk_group, v3.routed_scaling_factor) == ("sigmoid", 8, 4, 2.5)
    assert v3.correction_bias and v3.renormalize
    assert grok.activation == "gelu_tanh" and not grok.router.renormalize and not grok.losses
    layer = mk.MoELayer.from_preset("grok-1", hidden_size=16, intermediate_size=8)
    assert not layer.router.weight.any() and layer.experts.w13.any()
    for name in ("switch-base-128", "switch-c", "switch-xxl"):
        preset = presets.get(name)
        assert (preset.capacity.factor, preset.router.input_jitter, preset.init) == (1.25, 0.01, "fan_in")
        assert preset.losses == (mk.losses.Switch(0.01),) and not preset.router.renormalize
    assert presets.get("switch-xxl").capacity.eval_factor == 4.0 and presets.get("switch-xxl").gated
    v2 = presets.get("deepseek-v2")
    assert [type(loss).__name__ for loss in v2.losses] == ["DeepSeekV2Expert", "DeepSeekV2Device", "DeepSeekV2Comm"]
    assert [loss.coef for loss in v2.losses] == [0.003, 0.05, 0.02]
    oss = mk.MoELayer.from_preset("gpt-oss-20b", hidden_size=16, intermediate_size=8)
    assert oss.router.bias is not None and oss.experts.w13_bias is not None


def test_overrides_win():
    layer = mk.MoELayer.from_preset("mixtral-8x7b", hidden_size=16, intermediate_size=8, losses=(), capacity=1.0)
    assert layer.losses == () and layer.capacity == mk.Capacity(1.0)
    with pytest.raises(TypeError, match="num_expert"):
        mk.MoELayer.from_preset("mixtral-8x7b", num_expert=4)

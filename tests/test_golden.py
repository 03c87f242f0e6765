# SPDX-License-Identifier: Apache-2.0
"""Golden vectors (tests/golden/README.md): ids exactly, values within each file's own tolerance, with gradients.

`pytest tests/test_golden.py --golden DIR` takes any other folder of the same format: the stem of a file says what it
holds (`hf_mixtral`, `hf_mixtral_large`, ...), its metadata the sizes, and noise, masks and capacities come with it.
"""

import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_folder
from golden_files import Vector, compare_loss
from golden_routers import (
    ref_base_layer,
    ref_bias_update,
    ref_expert_choice,
    ref_gshard_top2,
    ref_hash,
    ref_hierarchical,
    ref_noisy_topk,
    ref_sinkhorn,
)

from moe_kernels import losses
from moe_kernels.capacity import Capacity
from moe_kernels.routers import (
    Router,
    SparseMixer,
)
from moe_kernels.routers.token_choice import as_routing


def kind_of(stem: str) -> str:
    """The longest known kind that the stem begins with."""
    fits = [kind for kind in KINDS if stem == kind or stem.startswith(kind + "_")]
    return max(fits, key=len, default="")


# ---- hf_*: whole layers, written out from our ops

SOFTMAX_RENORM = {"renormalize": True}
SOFTMAX = {"renormalize": False}


def renorm_flag(config):
    return {"renormalize": config["norm_topk_prob"]}


def deepseek_v2(config):
    groups = (
        {"num_expert_group": config["n_group"], "topk_group": config["topk_group"]} if config["n_group"] > 1 else {}
    )
    return {"renormalize": config["norm_topk_prob"], "scale_when_renormalized": False,
            "routed_scaling_factor": config["routed_scaling_factor"], **groups}  # fmt: skip


def deepseek_v3(config):
    groups = (
        {"num_expert_group": config["n_group"], "topk_group": config["topk_group"]} if config["n_group"] > 1 else {}
    )
    return {"scoring_func": "sigmoid", "renormalize": config["norm_topk_prob"],
            "routed_scaling_factor": config["routed_scaling_factor"], **groups}  # fmt: skip


ROUTERS = {  # kind -> options of route from the config of the file
    "hf_mixtral": lambda c: SOFTMAX_RENORM, "hf_qwen3_moe": renorm_flag, "hf_qwen2_moe": renorm_flag,
    "hf_olmoe": renorm_flag, "hf_gpt_oss": lambda c: SOFTMAX_RENORM, "hf_granitemoe": lambda c: SOFTMAX_RENORM,
    "hf_jamba": lambda c: SOFTMAX, "hf_deepseek_v2": deepseek_v2, "hf_deepseek_v3": deepseek_v3,
    "hf_glm4_moe": deepseek_v3, "hf_minimax_m2": lambda c: {"scoring_func": "sigmoid"},
    "hf_llama4": lambda c: {"scoring_func": "sigmoid", "renormalize": False}, "hf_dbrx": lambda c: SOFTMAX_RENORM,
}  # fmt: skip
ROUTER_WEIGHT = ("gate.weight", "router.weight", "router.layer.weight", "router.classifier.weight")


def mlp(v, x, prefix):
    """A shared expert: one SwiGLU MLP."""
    gate, up, down = (v.param(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def start(v):
    v.leaves = {}
    return v["x"].reshape(-1, v["x"].shape[-1]).clone().requires_grad_()


def finish(v, x, y):
    """Compares y, the gradient of x and of every parameter that was used."""
    v.close(y.reshape(v["y"].shape).detach(), "y")
    grads = torch.autograd.grad(y, [x, *v.leaves.values()], v["gy"].reshape(y.shape))
    v.close(grads[0].reshape(v["x"].shape), "grad_x")
    for name, grad in zip(v.leaves, grads[1:]):
        v.close(grad.reshape(v["grad." + name].shape), "grad." + name)


def routed(v, backend, x, kind):
    logits = F.linear(x, v.param(*ROUTER_WEIGHT), v.param("router.bias") if "param.router.bias" in v else None)
    options = ROUTERS[kind](v.config) | {"e_score_correction_bias": selection_bias(v)}
    routing = backend.route(logits, v["topk_ids"].shape[1], **options)
    v.close(logits.detach(), "logits")
    v.same(routing.topk_ids, "topk_ids")
    v.close(routing.topk_weights.detach(), "topk_weights")
    if "tokens_per_expert" in v:
        v.same(routing.tokens_per_expert, "tokens_per_expert")
    return routing


def hf_layer(v, backend, kind):
    x = start(v)
    routing = routed(v, backend, x, kind)
    if kind == "hf_gpt_oss":
        options = {"w13_bias": v.param("experts.gate_up_proj_bias"), "w2_bias": v.param("experts.down_proj_bias"),
                   "interleaved": True, "transposed": True, "activation": "swigluoai"}  # fmt: skip
    else:
        options = {"transposed": True, "apply_router_weight_on_input": True} if kind == "hf_llama4" else {}
    if kind == "hf_dbrx":
        E, H = v["logits"].shape[1], x.shape[1]
        w1, v1, w2 = (v.param(f"experts.mlp.{name}").reshape(E, -1, H) for name in ("w1", "v1", "w2"))
        w13, w2 = torch.cat([w1, v1], 1), w2.mT
    else:
        w13, w2 = v.param("experts.gate_up_proj"), v.param("experts.down_proj")
    y = backend.fused_experts(x, w13, w2, routing.topk_weights, routing.topk_ids, **options)
    if "param.shared_experts.gate_proj.weight" in v:
        y = y + mlp(v, x, "shared_experts")
    if kind == "hf_llama4":
        y = y + mlp(v, x, "shared_expert")
    if kind == "hf_qwen2_moe":
        y = y + torch.sigmoid(x @ v.param("shared_expert_gate.weight").T) * mlp(v, x, "shared_expert")
    finish(v, x, y)
    balance(v, backend, kind)


LOSSES = {  # tensor of a file -> the loss it holds
    "aux_loss": losses.Switch(1.0, scope="sequence"), "z_loss": losses.ZLoss(1.0),
    "aux_loss_hf": losses.Switch(1.0, divide_by_k=False), "loss_expert": losses.DeepSeekV2Expert(0.003),
    "loss_device": losses.DeepSeekV2Device(0.05), "loss_comm": losses.DeepSeekV2Comm(0.02),
    "loss_seq_paper": losses.DeepSeekV3(1e-4), "loss_seq_selected": losses.DeepSeekV3(1e-4, count="selected"),
}  # fmt: skip


def balance(v, backend, kind):
    """Every balance loss of the file, and its gradient by the logits."""
    for name in (name for name in LOSSES if name in v):
        logits = v["logits"].flatten(0, -2).clone().requires_grad_()
        options = ROUTERS[kind](v.config) if kind in ROUTERS else SOFTMAX
        K = v["topk_ids"].shape[1] if "topk_ids" in v else 1
        routing = backend.route(logits, K, e_score_correction_bias=selection_bias(v), **options)
        inputs = losses.LossInputs(logits, routing, Router(**options), v.config["S"])
        compare_loss(v, LOSSES[name], inputs, name)


def selection_bias(v):
    names = ("buffer.gate.e_score_correction_bias", "buffer.e_score_correction_bias")
    return next((v[name] for name in names if name in v), None)


def hf_switch(v, backend, kind):
    """Top-1 with the probability as weight, and a fixed capacity a sequence."""
    x = start(v)
    logits = x @ v.param("router.classifier.weight").T
    routing = backend.route(logits, 1, renormalize=False)
    v.same(routing.topk_ids, "expert_index")
    v.close(routing.topk_weights.detach().reshape(v["expert_prob"].shape), "expert_prob")
    E = v["logits"].shape[-1]
    up, down = (torch.stack([v.param(f"experts.expert_{e}.{name}.weight") for e in range(E)]) for name in ("wi", "wo"))
    late = backend.limit_capacity(routing.topk_ids, E, v.config["expert_capacity"], group_size=v.config["S"])
    v.same(~late, "kept")
    ids = torch.where(late, -1, routing.topk_ids)
    y = backend.fused_experts(x, up, down, routing.topk_weights, ids, activation="relu", gated=False)
    finish(v, x, y)
    balance(v, backend, kind)


def hf_phimoe_eval(v, backend, kind):
    x = start(v)
    logits = F.linear(x, v.param(*ROUTER_WEIGHT))
    v.close(logits.detach(), "logits")
    weights, ids = SparseMixer(v.config["router_jitter_noise"]).eval()(x, logits, v["topk_ids"].shape[1])
    v.same(ids, "topk_ids")
    v.close(weights.detach(), "topk_weights")
    finish(v, x, backend.fused_experts(x, v.param("experts.gate_up_proj"), v.param("experts.down_proj"), weights, ids))


# ---- ref_*


def ref_dispatch(v, backend, kind):
    x, E, K = v["x"], v.config["E"], v.config["k"]
    got = backend.permute(x, v["topk_ids"], E)
    v.same(got.row_to_slot, "sorted_pair")
    v.same(got.row_to_slot // K, "sorted_token")
    v.same(got.slot_to_row, "inverse")
    v.same(got.expert_offsets, "offsets")
    v.same(got.expert_offsets.diff(), "counts")
    v.same(v["topk_ids"].flatten()[got.row_to_slot.long()], "sorted_expert")
    assert torch.equal(got.x_rows, v["x_permuted"])


def ref_ties(v, backend, kind):
    for renormalize, name in ((False, "weights_raw"), (True, "weights_renormalised")):
        got = backend.route(v["logits"], v.config["k"], renormalize=renormalize)
        v.same(got.topk_ids, "topk_ids")
        v.close(got.topk_weights, name)


def ref_capacity(v, backend, kind):
    """Which slots stay by every policy; a slot's place in the buffer is how many capacities drop it."""
    (T, K), E = v["topk_ids"].shape, v.config["E"]
    routing = backend.route(v["x"] @ v["router_weight"].T, K, renormalize=False)
    v.same(routing.topk_ids, "topk_ids")
    v.close(routing.topk_weights, "topk_weights")
    assert Capacity(v.config["capacity_factor"]).slots(T, K, E) == v["capacity_ceil"]
    assert Capacity(v.config["capacity_factor"], rounding="floor").slots(T, K, E) == v["capacity_floor"]
    late = backend.limit_capacity(routing.topk_ids, E, int(v["capacity_ceil"]))
    v.same(~late, "kept_position")
    v.same(sum(backend.limit_capacity(routing.topk_ids, E, c).int() for c in range(1, T * K + 1)), "position_position")
    ids = torch.where(late, -1, routing.topk_ids)
    y = backend.fused_experts(
        v["x"], v["w_up"], v["w_down"], routing.topk_weights, ids, activation=v.config["act"], gated=False
    )
    v.close(y, "y_position")
    for policy in ("bpr", "probs"):

        def keep(factor, policy=policy):
            return Capacity(factor, drop_policy=policy).limit(
                as_routing(routing.topk_weights, routing.topk_ids, None, E)
            )

        kept = keep(v.config["capacity_factor"])
        v.same(~kept.dropped, "kept_" + policy)
        y = backend.fused_experts(v["x"], v["w_up"], v["w_down"], kept.topk_weights, kept.topk_ids,
                                  activation=v.config["act"], gated=False)  # fmt: skip
        v.close(y, "y_" + policy)
        if policy == "bpr":
            places = sum(keep(c * E / (T * K)).dropped.int() for c in range(1, T + 1))
            v.same(places, "position_bpr")


def ref_losses(v, backend, kind):
    def inputs(K):
        logits = v["logits"].clone().requires_grad_()
        return losses.LossInputs(logits, backend.route(logits, K))

    K = v.config["k"]
    v.same(inputs(1).routing.topk_ids, "top1_ids")
    v.same(inputs(K).routing.topk_ids, "topk_ids")
    for name, loss, k in (
        ("switch_aux_unit", losses.Switch(1.0), 1), ("switch_aux", losses.Switch(), 1),
        ("gshard_aux", losses.GShard(1.0), K), ("topk_aux_sum_hf", losses.Switch(1.0, divide_by_k=False), K),
        ("topk_aux_div_k", losses.Switch(1.0), K), ("z_loss_unit", losses.ZLoss(1.0), K), ("z_loss", losses.ZLoss(), K),
        ("importance_cv2", losses.Importance(1.0), K),
    ):  # fmt: skip
        compare_loss(v, loss, inputs(k), name)


def ref_grok1(v, backend, kind):
    names = ("x", "router_weight", "w_gate", "w_up", "w_down")
    leaves = [v[name].clone().requires_grad_() for name in names]
    x, router, gate, up, down = leaves
    routing = backend.route(x @ router.T, v.config["k"], renormalize=v.config["renormalise"])
    v.same(routing.topk_ids, "topk_ids")
    v.close(routing.topk_weights.detach(), "topk_weights")
    y = backend.fused_experts(
        x, torch.cat([gate, up], 1), down, routing.topk_weights, routing.topk_ids, activation=v.config["act"]
    )
    v.close(y.detach(), "y")
    for name, grad in zip(names, torch.autograd.grad(y, leaves, v["gy"])):
        v.close(grad, "grad_" + name)


def ref_jitter_dropout(v, backend, kind):
    w13, w2, act = torch.cat([v["w_gate"], v["w_up"]], 1), v["w_down"], v.config["act"]

    def layer(logits, name, **options):
        routing = backend.route(logits, v.config["k"], renormalize=v.config["renormalise"])
        if name + "_ids" in v:
            v.same(routing.topk_ids, name + "_ids")
            v.close(routing.topk_weights, name + "_weights")
        ids = torch.where(options.pop("keep"), routing.topk_ids, -1) if "keep" in options else routing.topk_ids
        y = backend.fused_experts(v["x"], w13, w2, routing.topk_weights, ids, activation=act, **options)
        v.close(y, name + "_y")

    clean = v["x"] @ v["router_weight"].T
    layer((v["x"] * v["jitter"]) @ v["router_weight"].T, "jitter")
    layer(torch.where(v["expert_alive"], clean, -math.inf), "expert_dropout")
    layer(clean, "clean")
    layer(clean, "output_mask", keep=v["output_keep"])
    layer(clean, "inner_dropout", hidden_mask=v["inner_keep_scaled"])


def ref_token_table(v, backend, kind):
    """Ids from the table, weights learned: route over the k logits of the given experts weighs them."""
    ids = v["table"][v["token_ids"]]
    v.same(ids, "topk_ids")
    logits = (v["x"] @ v["router_weight"].T).gather(1, ids)
    routing = backend.route(
        logits, v.config["k"], scoring_func=v.config["score"], routed_scaling_factor=v.config["scaling"]
    )
    v.close(torch.zeros_like(logits).scatter(1, routing.topk_ids.long(), routing.topk_weights), "topk_weights")


KINDS = {
    **dict.fromkeys(ROUTERS, hf_layer), "hf_switch": hf_switch, "hf_phimoe_eval": hf_phimoe_eval,
    "ref_dispatch": ref_dispatch, "ref_ties": ref_ties, "ref_grok1": ref_grok1,
    "ref_jitter_dropout": ref_jitter_dropout, "ref_token_table": ref_token_table, "ref_capacity": ref_capacity,
    "ref_losses": ref_losses, "ref_gshard_top2": ref_gshard_top2, "ref_noisy_topk": ref_noisy_topk,
    "ref_hierarchical": ref_hierarchical, "ref_expert_choice": ref_expert_choice, "ref_hash": ref_hash,
    "ref_base_layer": ref_base_layer, "ref_sinkhorn": ref_sinkhorn, "ref_bias_update": ref_bias_update,
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        paths = sorted(golden_folder(metafunc.config).glob("*.safetensors"))
        metafunc.parametrize("path", paths, ids=lambda p: p.stem)


def test_vector(backend, path):
    kind = kind_of(path.stem)
    assert kind, f"{path.name}: unknown kind; known are {', '.join(KINDS)}"
    KINDS[kind](Vector(path), backend, kind)


def test_every_vector_is_run_and_every_kind_has_one():
    stems = {path.stem for path in Path(__file__).with_name("golden").glob("*.safetensors")}
    assert {kind_of(stem) for stem in stems} == set(KINDS)


def test_the_readme_of_the_vectors_names_each():
    folder = Path(__file__).with_name("golden")
    text = (folder / "README.md").read_text()
    assert all(f"## {path.name}" in text for path in folder.glob("*.safetensors"))


def test_another_folder(tmp_path, pytestconfig):
    """Stems with a suffix, as a second set of vectors has."""
    shutil.copy(
        Path(__file__).with_name("golden") / "hf_mixtral.safetensors", tmp_path / "hf_mixtral_large.safetensors"
    )
    assert kind_of("hf_mixtral_large") == "hf_mixtral"
    assert kind_of("hf_deepseek_v3_a") == "hf_deepseek_v3"
    assert kind_of("hf_unknown") == ""
    assert Vector(tmp_path / "hf_mixtral_large.safetensors").config["num_experts_per_tok"] == 2

# SPDX-License-Identifier: Apache-2.0
"""Golden vectors (tests/golden/README.md): ids exactly, values within each file's own tolerance, with gradients.

`pytest tests/test_golden.py --golden DIR` takes any other folder of the same format: the stem of a file says what it
holds (`hf_mixtral`, `hf_mixtral_large`, ...), its metadata the sizes, and noise, masks and capacities come with it.
"""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_folder
from safetensors import safe_open

from moe_kernels import losses
from moe_kernels.balance import max_violation, updated_bias
from moe_kernels.capacity import Capacity
from moe_kernels.routers import (
    Router,
    SparseMixer,
    assignment,
    expert_choice,
    hashed,
    hierarchical,
    noisy,
    sample_second,
)
from moe_kernels.routers.token_choice import as_routing


class Vector:
    """One file: tensors by name, `config`, and its tolerance."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
        self.stem, self.config = path.stem, json.loads(meta.get("config", "{}"))
        text = meta.get("tolerance", "")
        self.atol = float(m[1]) if (m := re.search(r"atol ([\d.e+-]+)", text)) else 1e-5
        self.rtol = float(m[1]) if (m := re.search(r"rtol ([\d.e+-]+)", text)) else 1e-4

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def param(self, *names: str) -> torch.Tensor:
        """The first of these parameters that is there, as a leaf that its gradient will be compared for."""
        name = next(n for n in names if "param." + n in self)
        leaf = self["param." + name].clone().requires_grad_()
        self.leaves[name] = leaf
        return leaf

    leaves: dict[str, torch.Tensor]

    def close(self, actual: torch.Tensor, name: str) -> None:
        wanted = self[name]
        assert actual.shape == wanted.shape, name
        assert torch.allclose(actual, wanted, rtol=self.rtol, atol=self.atol), (
            f"{self.stem}: {name} differs by {float((actual - wanted).abs().max()):.3g}"
        )
        if wanted.numel():  # the twin: the same comparison does notice four times its tolerance
            moved = actual.detach().contiguous().clone()
            at = int(wanted.abs().argmax())
            moved.view(-1)[at] = wanted.reshape(-1)[at] + 4 * (self.atol + self.rtol * wanted.reshape(-1)[at].abs())
            assert not torch.allclose(moved, wanted, rtol=self.rtol, atol=self.atol), name

    def same(self, actual: torch.Tensor, name: str) -> None:
        assert torch.equal(actual.long(), self[name].long().reshape(actual.shape)), f"{self.stem}: {name} differs"


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


def compare_loss(v, loss, inputs, name):
    value = loss(inputs)
    v.close(value.detach().reshape(1), name)
    (grad,) = torch.autograd.grad(value, inputs.logits)
    v.close(grad.reshape(v["grad_logits_" + name].shape), "grad_logits_" + name)


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


def ref_gshard_top2(v, backend, kind):
    logits = v["logits"].clone().requires_grad_()
    whole = backend.route(logits, 2, renormalize_eps=1e-9)
    v.same(whole.topk_ids, "topk_ids")
    v.close(whole.topk_weights.detach(), "gates_normalised")
    taken = sample_second(whole, v["uniform"])
    kept = Capacity(fixed=v.config["capacity"]).limit(taken)
    v.same((kept.topk_ids >= 0), "kept")
    v.close(kept.topk_weights.detach(), "combine_weights")
    v.close(losses.GShard(1.0)(losses.LossInputs(logits, whole)).detach().reshape(1), "aux_loss")


def ref_noisy_topk(v, backend, kind):
    x, gate, noise = (v[name].clone().requires_grad_() for name in ("x", "w_gate", "w_noise"))
    clean = x @ gate
    found = noisy.add_noise(clean, x @ noise, v["normal_noise"], v.config["noise_eps"])
    v.close(clean.detach(), "clean_logits")
    v.close(found.std.detach(), "noise_std")
    v.close(found.noisy_logits.detach(), "noisy_logits")
    routing = backend.route(found.noisy_logits, v.config["k"])
    v.same(routing.topk_ids, "topk_ids")
    gates = torch.zeros_like(clean).scatter(1, routing.topk_ids.long(), routing.topk_weights)
    v.close(gates.detach(), "gates")
    inputs = losses.LossInputs(clean, routing, noise_std=found.std, noisy_logits=found.noisy_logits)
    v.close(gates.sum(0).detach(), "importance")
    v.close(losses.smooth_load(inputs).detach(), "load")
    loss = losses.Importance(v.config["w_importance"])(inputs) + losses.Load(v.config["w_load"])(inputs)
    v.close(loss.detach().reshape(1), "loss")
    for name, grad in zip(("grad_x", "grad_w_gate", "grad_w_noise"), torch.autograd.grad(loss, (x, gate, noise))):
        v.close(grad, name)


def ref_hierarchical(v, backend, kind):
    A, B, ka, kb = (v.config[n] for n in ("groups", "experts_per_group", "k_primary", "k_secondary"))
    rule = hierarchical.TwoLevel(groups=A, top_groups=ka)
    gate = rule.gate(v["x"].shape[1], A * B, ka * kb)
    gate.load_state_dict({"group_weight": v["w_primary"], "weight": v["w_secondary"].flatten(0, 1)})
    logits, routing = gate(v["x"])
    v.same(routing.topk_ids, "ids_flat")
    v.close(routing.topk_weights.detach(), "weights")
    dense = torch.zeros_like(logits).scatter(1, routing.topk_ids.long(), routing.topk_weights)
    v.close(dense.sum(0).detach(), "importance")
    y = backend.fused_experts(v["x"], v["w_up"], v["w_down"], routing.topk_weights.detach(), routing.topk_ids,
                              activation=v.config["act"], gated=False)  # fmt: skip
    v.close(y, "y")


def ref_expert_choice(v, backend, kind):
    c, E, b = v.config["c"], v.config["E"], v.config["cap_b"]
    leaves = [v[name].clone().requires_grad_() for name in ("x", "router_weight", "w_up", "w_down")]
    x, router, up, down = leaves
    gate = expert_choice.ExpertChoice(capacity_factor=c).gate(x.shape[1], E, 1)
    logits, routing = torch.func.functional_call(gate, {"weight": router}, (x,))
    v.close(logits.softmax(1).detach(), "probs")
    wanted = torch.full_like(logits, -1.0).scatter(0, v["token_ids"].T, v["gates"].T)
    ids = torch.where(routing.topk_ids < 0, E, routing.topk_ids).long()
    dense = torch.full((len(x), E + 1), -1.0).scatter(1, ids, routing.topk_weights.detach())[:, :E]
    assert torch.equal(dense >= 0, wanted >= 0) and torch.allclose(dense, wanted, atol=v.atol, rtol=v.rtol)
    v.same((routing.topk_ids >= 0).sum(1), "experts_per_token")
    assert (routing.tokens_per_expert == v.config["k"]).all()
    y = backend.fused_experts(x, up, down, routing.topk_weights, routing.topk_ids, activation=v.config["act"],
                              gated=False)  # fmt: skip
    v.close(y.detach(), "y")
    names = ("grad_x", "grad_router_weight", "grad_w_up", "grad_w_down")
    for name, grad in zip(names, torch.autograd.grad(y, leaves, v["gy"])):
        v.close(grad, name)
    v.atol = 1e-3
    s, lam = v["probs"].double(), v.config["cap_lambda"]
    plan = expert_choice.capped_plan(s[None], v.config["k"], b, lam, 1000)[0]
    v.close(plan.T.float(), "capped_A")
    v.close(plan.sum(1).float(), "capped_colsum")
    v.close((((s * plan).sum() - lam * torch.special.xlogy(plan, plan).sum()).float().reshape(1)), "capped_objective")


def ref_hash(v, backend, kind):
    E, V, seed, step = (v.config[n] for n in ("E", "vocab", "seed", "step"))
    x, tokens = torch.zeros(v["token_ids"].numel(), 4), v["token_ids"].flatten()

    def ids(rule, **inputs):
        gate = rule.gate(4, E, 1)
        gate.draws.step = torch.tensor(step)
        routing = gate(x, token_ids=tokens, **inputs)[1]
        assert torch.equal(routing.topk_weights, torch.ones(len(x), 1))
        return routing.topk_ids, gate.table

    v.same(ids(hashed.Modular(), position_ids=v["position_ids"].flatten())[0], "modular_position")
    v.same(ids(hashed.Modular(), sequence_length=v["token_ids"].shape[1])[0], "modular_position")
    found, table = ids(hashed.Hash(V, seed))
    v.same(found, "hash_experts")
    v.same(table, "hash_table")
    found, table = ids(hashed.BalancedHash(v["token_frequency"]))
    v.same(found, "balanced_experts")
    v.same(table, "balanced_table")
    v.same(torch.zeros(E, dtype=torch.int64).index_add(0, table[:, 0], v["token_frequency"]), "balanced_load")
    v.same(ids(hashed.RandomHash(seed))[0], "random_experts")


def ref_base_layer(v, backend, kind):
    gate = assignment.Base().gate(v["x"].shape[1], v.config["E"], 1)
    gate.load_state_dict({"weight": v["centroids"]})
    for training, ids_name, y_name in ((True, "assignment", "y_train"), (False, "greedy", "y_eval")):
        logits, routing = gate.train(training)(v["x"])
        v.close(logits.detach(), "scores")
        v.same(routing.topk_ids, ids_name)
        y = backend.fused_experts(v["x"], v["w_up"], v["w_down"], routing.topk_weights.detach(), routing.topk_ids,
                                  activation=v.config["act"], gated=False)  # fmt: skip
        v.close(v["x"] + y, y_name)
        if training:
            v.same(routing.tokens_per_expert, "quota")
            v.close(logits.detach().gather(1, routing.topk_ids.long()).sum().reshape(1), "objective")


def ref_sinkhorn(v, backend, kind):
    plan, iterations = assignment.sinkhorn(v["logits"], v.config["tol"])
    v.close(plan, "plan")
    assert abs(iterations - int(v["iterations"])) <= 1
    E = v.config["E"]
    for K in (1, 2):
        gate = assignment.Sinkhorn(v.config["tol"]).gate(E, E, K)
        gate.load_state_dict({"weight": torch.eye(E)})
        routing = gate(v["logits"])[1]
        v.same(routing.topk_ids, f"ids_k{K}")
        v.close(routing.topk_weights.detach(), f"weights_k{K}")


def ref_bias_update(v, backend, kind):
    bias = torch.zeros(v["scores"].shape[2])
    for step, s in enumerate(v["scores"]):
        logits = torch.logit(s.double())
        ids = backend.route(logits, v.config["k"], scoring_func="sigmoid", e_score_correction_bias=bias,
                            group_top=1).topk_ids  # fmt: skip
        counts = torch.bincount(ids.flatten(), minlength=len(bias))
        assert torch.equal(counts, v["counts_each_step"][step]), step
        bias = updated_bias(bias, counts, v.config["gamma"])
        assert torch.allclose(bias, v["bias_after_each_step"][step], atol=1e-7, rtol=0), step
        assert torch.allclose(max_violation(counts), v["maxvio_each_step"][step], atol=1e-6)


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

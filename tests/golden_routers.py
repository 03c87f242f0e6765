# SPDX-License-Identifier: Apache-2.0
"""What the golden vectors say of the routers beside plain token choice, one function a kind of file."""

import torch

from moe_kernels import losses
from moe_kernels.balance import max_violation, updated_bias
from moe_kernels.capacity import Capacity
from moe_kernels.routers import assignment, expert_choice, hashed, hierarchical, noisy, sample_second


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

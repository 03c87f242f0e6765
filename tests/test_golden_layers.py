# SPDX-License-Identifier: Apache-2.0
"""Golden vectors through MoELayer: output, ids, weights, drops, losses, and the gradients of x and every parameter."""

import torch
from conftest import golden_folder
from test_golden import ROUTER_WEIGHT, ROUTERS, Vector, kind_of, selection_bias

import moe_kernels as mk
from moe_kernels.routers import SparseMixer

# kind -> arguments of MoELayer beyond the sizes and the router
OPTIONS = {
    "hf_gpt_oss": {"activation": "swigluoai", "bias": True, "interleaved": True},
    "hf_qwen2_moe": {"shared_gate": True},
    "hf_switch": {"activation": "relu", "gated": False},
    "ref_grok1": {"activation": "gelu_tanh"},
    "ref_capacity": {"activation": "relu", "gated": False},
}
KINDS = (*ROUTERS, "hf_phimoe_eval", "ref_grok1")


def router(v, kind):
    c = v.config
    if kind == "hf_phimoe_eval":
        return SparseMixer(c["router_jitter_noise"])
    if kind in ("hf_switch", "ref_grok1", "ref_capacity"):
        return mk.Router(renormalize=False)
    extra = {"bias": "param.router.bias" in v, "correction_bias": selection_bias(v) is not None}
    return mk.Router(**ROUTERS[kind](c), weight_on_input=kind == "hf_llama4", **extra)


def weights(v, kind, which):
    """The tensors of the file that begin with which, "param." or "grad.", by the names and layouts of MoELayer."""

    def get(*names):
        return next((v[which + name] for name in names if which + name in v), None)

    found = {"router.weight": get(*ROUTER_WEIGHT), "router.bias": get("router.bias")}
    if kind == "hf_switch":
        for name, theirs in (("w13", "wi"), ("w2", "wo")):
            found[f"experts.{name}"] = torch.stack([get(f"experts.expert_{e}.{theirs}.weight") for e in range(E_of(v))])
    elif kind == "hf_dbrx":
        w1, v1, w2 = (get(f"experts.mlp.{name}").unflatten(0, (E_of(v), -1)) for name in ("w1", "v1", "w2"))
        found |= {"experts.w13": torch.cat([w1, v1], 1), "experts.w2": w2.mT}
    else:
        w13, w2 = get("experts.gate_up_proj"), get("experts.down_proj")
        transposed = kind in ("hf_gpt_oss", "hf_llama4")
        found |= {"experts.w13": w13.mT, "experts.w2": w2.mT} if transposed else {"experts.w13": w13, "experts.w2": w2}
        found |= {
            "experts.w13_bias": get("experts.gate_up_proj_bias"),
            "experts.w2_bias": get("experts.down_proj_bias"),
        }
    parts = [
        get(*(f"{prefix}.{name}_proj.weight" for prefix in ("shared_experts", "shared_expert")))
        for name in ("gate", "up", "down")
    ]
    if parts[0] is not None:
        found |= {"shared_experts.w13": torch.cat(parts[:2]), "shared_experts.w2": parts[2]}
    found["shared_expert_gate.weight"] = get("shared_expert_gate.weight")
    return {name: t for name, t in found.items() if t is not None}


def ref_weights(v, kind, which):
    up = v[which + "w_up"]
    w13 = torch.cat([v[which + "w_gate"], up], 1) if kind == "ref_grok1" else up
    return {"router.weight": v[which + "router_weight"], "experts.w13": w13, "experts.w2": v[which + "w_down"]}


def E_of(v):
    return v["logits"].shape[-1]


def layer_of(v, kind, **more):
    read = weights if kind.startswith("hf_") else ref_weights
    state = read(v, kind, "param." if kind.startswith("hf_") else "")
    I, H = state["experts.w2"].shape[2], v["x"].shape[-1]
    shared = state["shared_experts.w2"].shape[1] if "shared_experts.w2" in state else None
    K = v["topk_ids"].shape[1] if "topk_ids" in v else 1
    options = OPTIONS.get(kind, {}) | {"shared_intermediate_size": shared} | more
    layer = mk.MoELayer(H, I, E_of(v), K, router=router(v, kind), **options)
    bias = {} if selection_bias(v) is None else {"router.e_score_correction_bias": selection_bias(v)}
    layer.load_state_dict(state | bias)
    return layer.eval(), lambda which: read(v, kind, which)


def pytest_generate_tests(metafunc):
    kinds = {"path": KINDS, "switch": ("hf_switch",), "capped": ("ref_capacity",), "table": ("ref_token_table",)}
    paths = sorted(golden_folder(metafunc.config).glob("*.safetensors"))
    for name in kinds.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, [p for p in paths if kind_of(p.stem) in kinds[name]], ids=lambda p: p.stem)


def close(v, actual, wanted, name):
    assert torch.allclose(actual, wanted, rtol=v.rtol, atol=v.atol), (
        f"{v.stem}: {name} differs by {float((actual - wanted).abs().max()):.3g}"
    )
    moved = actual.detach().clone()
    at = int(wanted.abs().argmax())
    moved.view(-1)[at] += 4 * (v.atol + v.rtol * wanted.abs().max())
    assert not torch.allclose(moved, wanted, rtol=v.rtol, atol=v.atol), name


def compare(v, layer, wanted_grads):
    x = v["x"].clone().requires_grad_()
    y = layer(x)
    v.close(y.detach(), "y")
    y.backward(v["gy"])
    v.close(x.grad, "grad_x")
    assert wanted_grads.keys() == dict(layer.named_parameters()).keys()
    for name, wanted in wanted_grads.items():
        close(v, layer.get_parameter(name).grad, wanted, name)


def test_layer(path):
    v, kind = Vector(path), kind_of(path.stem)
    layer, read = layer_of(v, kind)
    compare(v, layer, read("grad." if kind.startswith("hf_") else "grad_"))
    routing = layer.last_routing
    assert routing.dropped is None and float(layer.aux_loss) == 0
    v.same(routing.topk_ids, "topk_ids")
    v.close(routing.topk_weights, "topk_weights")
    if "tokens_per_expert" in v:
        v.same(routing.tokens_per_expert, "tokens_per_expert")


def test_switch(switch):
    v = Vector(switch)
    capacity = mk.Capacity(fixed=v.config["expert_capacity"], group="sequence")
    layer, read = layer_of(v, "hf_switch", capacity=capacity, losses=mk.losses.Switch(1.0, scope="sequence"))
    compare(v, layer, read("grad."))
    kept, routing = v["kept"].flatten(), layer.last_routing
    v.close(layer.aux_loss.detach().reshape(1), "aux_loss")
    v.same(~routing.dropped, "kept")
    assert torch.equal(routing.topk_ids.flatten().long(), torch.where(kept, v["expert_index"].flatten(), -1))
    assert torch.equal(routing.topk_weights.flatten() > 0, kept)
    assert torch.equal(routing.tokens_per_expert.long(), v["expert_index"].flatten()[kept].bincount(minlength=E_of(v)))


def test_capacity(capped):
    v = Vector(capped)
    layer, _ = layer_of(v, "ref_capacity", capacity=v.config["capacity_factor"])
    v.close(layer(v["x"]).detach(), "y_position")
    v.same(~layer.last_routing.dropped, "kept_position")


def test_token_table(table):
    v = Vector(table)
    router = mk.Router(
        scoring_func=v.config["score"], routed_scaling_factor=v.config["scaling"], token_table=v["table"]
    )
    layer = mk.MoELayer(v["x"].shape[1], 4, v["router_weight"].shape[0], v.config["k"], router=router)
    with torch.no_grad():
        layer.router.weight.copy_(v["router_weight"])
    layer(v["x"], token_ids=v["token_ids"])
    v.same(layer.last_routing.topk_ids, "topk_ids")
    v.close(layer.last_routing.topk_weights, "topk_weights")

# SPDX-License-Identifier: Apache-2.0
"""What happens once a step: the bias update, counts of the global batch, dead experts; and dropout."""

import copy

import processes
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_kernels as mk
from moe_kernels import draws, losses, reference, routers
from moe_kernels.balance import Reinit, max_violation, updated_bias

V3 = routers.Router(scoring_func="sigmoid", correction_bias=True)
E, K, H = 6, 2, 8


def layer(router=V3, **options):
    torch.manual_seed(0)
    moe = mk.MoELayer(H, 5, E, K, router=router, **options)
    nn.init.normal_(moe.router.weight)
    return moe


def chosen(moe, x):
    with torch.no_grad():
        return moe.router(x)[1].tokens_per_expert


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_the_bias_moves_once_a_step_by_all_micro_batches(rule):
    moe = layer()
    balance = mk.Balance(moe, rate=0.01, rule=rule)
    a, b = torch.randn(2, 20, H).unbind()
    counts = chosen(moe, a) + chosen(moe, b)  # counted by hand: the gate alone is in no forward of the layer
    balance.pending.clear()
    for x in (a, b):
        moe(x).sum().backward()
    assert torch.equal(balance.pending[""], counts.long())
    before = moe.router.e_score_correction_bias.clone()
    assert balance.step() == {}
    wanted = counts.float().mean() - counts
    wanted = before + 0.01 * (wanted.sign() if rule == "sign" else wanted)
    assert torch.allclose(moe.router.e_score_correction_bias, wanted) and wanted.any()
    balance.step()  # nothing was counted since: no move
    assert torch.allclose(moe.router.e_score_correction_bias, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_and_evaluation_are_not_counted(reentrant):
    moe = layer()
    balance, x = mk.Balance(moe), torch.randn(20, H, requires_grad=True)
    moe.eval()(x)
    assert not balance.pending
    moe.train()
    checkpoint(moe, x, use_reentrant=reentrant).sum().backward()
    assert int(balance.pending[""].sum()) == 20 * K
    balance.close()
    moe(x)
    assert int(balance.pending[""].sum()) == 20 * K


def test_counts_are_before_the_drop():
    moe = layer(capacity=0.5)
    balance = mk.Balance(moe)
    moe(torch.randn(30, H))
    assert int(balance.pending[""].sum()) == 30 * K > int(moe.last_routing.tokens_per_expert.sum())


def test_a_saved_run_goes_on_as_if_it_had_not_stopped():
    def train(balance, moe, steps):
        for step in steps:
            torch.manual_seed(step)
            moe(torch.randn(20, H)).sum().backward()
            balance.step()

    whole = layer()
    train(mk.Balance(whole, rate=0.1, reinit=Reinit(period=50), seed=1), whole, range(6))
    first = layer()
    balance = mk.Balance(first, rate=0.1, reinit=Reinit(period=50), seed=1)
    train(balance, first, range(3))
    second = layer()
    second.load_state_dict(first.state_dict())
    again = mk.Balance(second, rate=0.1, reinit=Reinit(period=50), seed=1)
    again.load_state_dict(copy.deepcopy(balance.state_dict()))
    train(again, second, range(3, 6))
    assert torch.equal(second.router.e_score_correction_bias, whole.router.e_score_correction_bias)
    assert again.steps == 6 and int(second.router.draws.step) == 6


def test_the_update_evens_the_load():
    moe = layer()
    with torch.no_grad():
        moe.router.weight[0] += 1.0
    balance, worst = mk.Balance(moe, rate=0.02), []
    x = torch.randn(200, H) + 0.5
    for _ in range(60):
        moe(x)
        worst.append(float(max_violation(balance.pending[""])))
        balance.step()
    assert worst[-1] < 0.3 < 1.0 < worst[0]


def test_hugging_face_biases_move_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, vocab_size=32,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).train()
    balance = mk.Balance(model, rate=0.5)
    (name,) = balance._watch.names
    model(torch.randint(0, 32, (2, 8))).logits.sum().backward()
    counts = balance.pending[name].clone()
    assert int(counts.sum()) == 2 * 8 * 2
    balance.step()
    bias = next(b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert torch.equal(bias, 0.5 * (counts.double().mean() - counts).sign().float())


def test_global_batch_counts_add_up_over_micro_batches():
    loss = losses.Switch(1.0, scope="global_batch")
    moe = layer(routers.Router(), losses=loss)
    balance, seen = mk.Balance(moe), torch.zeros(E)
    for n, x in enumerate(torch.randn(3, 20, H), 1):
        seen = seen + chosen(moe, x)
        moe(x)
        P = (x @ moe.router.weight.T).softmax(1).mean(0)
        assert moe.aux_loss.item() == pytest.approx((E * (seen / (20 * n * K) * P).sum()).item(), rel=1e-5)
    balance.step()
    moe(x)
    assert moe.aux_loss.item() == pytest.approx((E * (chosen(moe, x) / (20 * K) * P).sum()).item(), rel=1e-5)
    moe.eval()(x)  # alone in evaluation
    assert moe.global_counts.total is not None
    kept = moe.global_counts.total.clone()
    moe.train()
    checkpoint(moe, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert float(moe.global_counts.total[-1]) == float(kept[-1]) + 20  # once, not again on recomputation


def two_ranks(rank, _folder):
    """What each of two processes does: the bias, the counts of the loss and the monitor's record."""
    moe = layer(losses=losses.Switch(1.0, scope="global_batch"))
    balance, monitor = mk.Balance(moe, rate=0.1), mk.Monitor(moe)
    moe(torch.randn(2, 20, H, generator=torch.Generator().manual_seed(3))[rank])
    shared = moe.global_counts.total.clone()
    balance.step()
    return moe.router.e_score_correction_bias, shared, monitor.step()[0]["counts"]


def test_two_ranks_move_by_the_sum_of_their_counts(tmp_path):
    first, second = processes.run("test_balance:two_ranks", tmp_path)
    moe = layer()
    x = torch.randn(2, 20, H, generator=torch.Generator().manual_seed(3))
    counts = chosen(moe, x[0]) + chosen(moe, x[1])
    wanted = updated_bias(torch.zeros(E), counts, 0.1)
    for bias, shared, record in (first, second):
        assert torch.equal(bias, wanted) and record == counts.tolist()
        assert shared.tolist() == [*counts.tolist(), 40.0]


# ---- dead experts


@pytest.mark.parametrize("mode", ["copy", "redraw"])
def test_dead_experts_start_anew(mode):
    moe = layer(V3 if mode == "copy" else routers.Router())
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)
    told = []
    balance = mk.Balance(moe, rate=0.0, optimizer=optimizer, on_reset=lambda p, e: told.append(e),
                         reinit=Reinit(period=3, threshold=0.1, decay=0.1, mode=mode, sigma=0.01))  # fmt: skip
    with torch.no_grad():
        moe.router.weight[2:4] = 0
        moe.router.weight[2:4, 0] = -100  # experts 2 and 3 get nothing
        if mode == "copy":
            moe.router.e_score_correction_bias.copy_(torch.arange(E) / 100)
    x = torch.randn(40, H)
    x[:, 0] = 5
    for step in range(3):
        moe(x).square().sum().backward()
        optimizer.step()
        before = {n: p.detach().clone() for n, p in moe.named_parameters()}
        bias = None if mode == "redraw" else moe.router.e_score_correction_bias.clone()
        states = {n: optimizer.state[p]["exp_avg"].clone() for n, p in moe.named_parameters()}
        revived = balance.step()
        assert revived == ({"": [2, 3]} if step == 2 else {})
        optimizer.zero_grad()
    share = balance.share[""]
    assert share[2] == share[3] == 1 / E and set(told) == {2, 3}
    order = [e for e in share.argsort(descending=True, stable=True).tolist() if e not in (2, 3)]
    for n, p in moe.named_parameters():
        state = optimizer.state[p]["exp_avg"]
        assert not state[2:4].any() and torch.equal(state[[0, 1, 4, 5]], states[n][[0, 1, 4, 5]])
        assert torch.equal(p[[0, 1, 4, 5]], before[n][[0, 1, 4, 5]])
        for e, donor in ((2, order[0]), (3, order[1])):
            off = p[e].detach() - before[n][donor]
            if mode == "copy" or n == "router.weight":
                assert float(off.std()) == pytest.approx(0.01 * float(before[n][donor].std()), rel=0.6)
            else:
                assert float(p[e].std()) == pytest.approx(0.02, rel=0.5) and not torch.equal(p[e], before[n][e])
            if mode == "copy":
                assert moe.router.e_score_correction_bias[e] == bias[donor]


def test_two_runs_of_one_seed_revive_alike():
    made = []
    for _ in range(2):
        moe = layer()
        balance = mk.Balance(moe, reinit=Reinit(period=1, threshold=0.9, decay=0.0, mode="redraw", seed=3))
        torch.manual_seed(len(made))  # torch's own generator plays no part
        moe(torch.ones(4, H))
        assert balance.step()
        made.append(moe.state_dict())
    assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])


def test_refusals():
    with pytest.raises(ValueError, match="model must be a model with MoE layers, got Linear"):
        mk.Balance(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rule must be one of sign, proportional"):
        mk.Balance(layer(), rule="half")
    with pytest.raises(ValueError, match="rate must be 0 or positive, got -1"):
        mk.Balance(layer(), rate=-1)
    for options in ({"mode": "drop"}, {"decay": 1.0}, {"threshold": -1.0}, {"period": 0}):
        with pytest.raises(ValueError, match=f"Reinit: {next(iter(options))} must be"):
            Reinit(**options)
    for name in ("inner", "expert", "output"):
        with pytest.raises(ValueError, match=f"Dropout: {name} must be in 0..1, 1 excluded, got 1"):
            mk.Dropout(**{name: 1.0})


# ---- dropout


def test_inner_dropout_scales_what_it_keeps():
    moe = layer(routers.Router(), dropout=mk.Dropout(inner=0.4)).double()
    draws.set_step(moe, 1)
    x = torch.randn(30, H, dtype=torch.float64)
    y, r = moe(x), moe.last_routing
    mask = moe.dropout.hidden_mask(moe.router.draws, r.topk_ids, 5, torch.float64)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.6} and abs(float((mask > 0).double().mean()) - 0.6) < 0.12
    wanted = reference.fused_experts(x, moe.experts.w13, moe.experts.w2, r.topk_weights, r.topk_ids, hidden_mask=mask)
    assert torch.allclose(y, wanted)
    moe.eval()
    assert torch.allclose(moe(x), layer(routers.Router()).double().eval()(x))


@pytest.mark.parametrize("router", [routers.Router(), V3, routers.Router(num_expert_group=3, topk_group=2)])
def test_expert_dropout_is_one_draw_a_step(router):
    moe = layer(router, dropout=mk.Dropout(expert=0.5))
    seen = set()
    for step in range(8):
        draws.set_step(moe, step)
        moe(torch.randn(200, H))
        used = moe.last_routing.tokens_per_expert > 0
        moe(torch.randn(200, H))
        assert torch.equal(moe.last_routing.tokens_per_expert > 0, used)  # the same for all tokens of the step
        assert int(used.sum()) >= K and torch.allclose(moe.last_routing.topk_weights.sum(1), torch.ones(200))
        seen.add(tuple(used.tolist()))
    assert len(seen) > 2
    moe.eval()(torch.randn(400, H))
    assert (moe.last_routing.tokens_per_expert > 0).all()


def test_the_lowest_dropped_experts_are_revived():
    assert routers.revive(torch.tensor([False, True, False, False]), 2).tolist() == [True, True, False, False]
    assert routers.revive(torch.tensor([False, False, False, True]), 1, 2).tolist() == [True, False, False, True]
    assert routers.revive(torch.tensor([True, True, False, True]), 2).tolist() == [True, True, False, True]


def test_output_mask_leaves_weights_alone():
    moe = layer(routers.Router(), dropout=mk.Dropout(output=0.3)).double()
    draws.set_step(moe, 1)
    x = torch.randn(60, H, dtype=torch.float64)
    y, r = moe(x), moe.last_routing
    ids = moe.dropout.output_ids(moe.router.draws, r.topk_ids)
    assert (r.topk_ids >= 0).all() and 0.15 < float((ids < 0).double().mean()) < 0.45
    assert torch.allclose(y, reference.fused_experts(x, moe.experts.w13, moe.experts.w2, r.topk_weights, ids))

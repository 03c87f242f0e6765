# SPDX-License-Identifier: Apache-2.0
"""Monitor and plots: records against counts by hand, on a MoELayer, a plain and a replaced Hugging Face model."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import moe_kernels as mk
from moe_kernels import plots
from moe_kernels.monitor import RECORD, SCALARS

E, K, H = 6, 2, 8


def layer(**options):
    torch.manual_seed(0)
    moe = mk.MoELayer(H, 5, E, K, **options)
    nn.init.normal_(moe.router.weight)
    return moe


def test_a_record_is_what_was_chosen():
    moe = layer(capacity=0.8)
    monitor = mk.Monitor(moe, co_activation=True)
    x = torch.randn(2, 30, H)
    ids, drops, first = [], 0, []
    for part in x:
        moe(part)
        drops += int(moe.last_routing.dropped.sum())
        chosen = moe.router(part)[1]
        ids.append(chosen.topk_ids)
        first.append(chosen.topk_weights[:, 0])
    (record,) = monitor.step()
    ids = torch.cat(ids)
    counts = torch.bincount(ids.flatten(), minlength=E)
    share = counts / counts.sum()
    assert list(record) == list(RECORD) and record["step"] == 0 and record["layer"] == ""
    assert record["counts"] == counts.tolist() and record["share"] == pytest.approx(share.tolist())
    assert record["max_violation"] == pytest.approx(float(counts.max() / counts.float().mean() - 1))
    assert record["entropy"] == pytest.approx(float(-(share * share.log()).nansum() / math.log(E)))
    assert record["dead"] == int((counts == 0).sum()) and record["drop_rate"] == pytest.approx(drops / (60 * K))
    assert record["confidence"] == pytest.approx(float(torch.cat(first).mean()))
    pairs = torch.zeros(E, E, dtype=torch.float64)
    for a, b in ids.tolist():
        pairs[a, b] += 1
        pairs[b, a] += 1
        pairs[a, a] += 1
        pairs[b, b] += 1
    assert torch.equal(monitor.pairs(""), pairs)
    assert monitor.scalars() == {f"moe//{name}": pytest.approx(record[name]) for name in SCALARS}
    assert torch.equal(monitor.history("", "counts")[0], counts.double())


def test_which_steps_and_forwards_count():
    moe = layer()
    monitor = mk.Monitor(moe, every=2)
    x = torch.randn(10, H, requires_grad=True)
    for step in range(4):
        torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False).sum().backward()
        moe.eval()(x)
        moe.train()
        found = monitor.step()
        assert [sum(r["counts"]) for r in found] == ([10 * K] if step % 2 == 0 else [])
    assert len(monitor.records) == 2
    monitor.step()
    assert len(monitor.records) == 2 and monitor.scalars() == {}  # no forward, no record
    monitor.close()
    moe(x)
    monitor.steps = 6
    assert monitor.step() == []


def test_dead_experts_raise_an_alert():
    moe = layer()
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2:, 0] = -10.0
    model = nn.ModuleDict({"block": moe})
    monitor = mk.Monitor(model)
    x = torch.randn(40, H)
    x[:, 0] = 1
    for _ in range(2):
        moe(x)
        monitor.step()
    assert monitor.alerts(max_violation=1.5) == [
        "layer block: 4 of 6 experts dead", "layer block: its fullest expert has 3.0 times the mean load",
    ]  # fmt: skip
    assert monitor.alerts(dead_after=3) == []


def tiny_model(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "Mixtral":
        config = transformers.MixtralConfig(
            hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, vocab_size=32,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config).train(), 2
    config = transformers.SwitchTransformersConfig(
        d_model=16, d_ff=8, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=4, vocab_size=32,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=100, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config).train(), 1


@pytest.mark.parametrize("kind", ["Mixtral", "Switch"])
def test_hugging_face_models_before_and_after_replace(kind):
    model, top_k = tiny_model(kind)
    monitor = mk.Monitor(model)
    ids = torch.randint(0, 32, (2, 10))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if kind == "Switch" else {})
    records = []
    for replaced in (False, True):
        if replaced:
            assert mk.replace(model).ok
        torch.manual_seed(0)
        model(**inputs)
        records.append(monitor.step())
    assert len(records[0]) == len(records[1]) == 2 == len(monitor.layers)
    for before, after in zip(*records):
        assert before["counts"] == after["counts"] and sum(before["counts"]) == 20 * top_k
        assert before["layer"] == after["layer"] and "experts" in before["layer"]


def test_specialisation_by_the_users_classes():
    moe = layer()
    monitor = mk.Monitor(moe, classes=lambda tokens: tokens % 3, num_classes=3)
    x, tokens = torch.randn(30, H), torch.arange(30)
    monitor.tokens = tokens
    moe(x)
    table = monitor.specialisation("")
    ids = moe.last_routing.topk_ids
    wanted = torch.stack([torch.bincount(ids[tokens % 3 == c].flatten(), minlength=E) / 20 for c in range(3)])
    assert torch.allclose(table, wanted.double())
    monitor.tokens = torch.full((30,), 7)
    monitor.classes = lambda tokens: tokens
    with pytest.raises(ValueError, match=r"classes\(tokens\) must be in 0..2"):
        moe(x)
    with pytest.raises(ValueError, match="layer must be one that was watched with co_activation=True"):
        monitor.pairs("")
    with pytest.raises(ValueError, match="model must be a model with MoE layers"):
        mk.Monitor(nn.Linear(2, 2))


def test_to_pandas():
    pandas = pytest.importorskip("pandas", reason="an optional peer of Monitor.to_pandas")
    moe = layer()
    monitor = mk.Monitor(moe)
    moe(torch.randn(10, H))
    monitor.step()
    frame = monitor.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns) == list(RECORD) and len(frame) == 1


@pytest.fixture
def recorded(tmp_path):
    model = nn.Sequential(layer(), layer())
    monitor = mk.Monitor(model, co_activation=True, classes=lambda t: t % 3, num_classes=3)
    monitor.tokens = torch.arange(20)
    for _ in range(3):
        model(torch.randn(20, H))
        monitor.step()
    monitor.save(tmp_path / "moe.json")
    return monitor, tmp_path / "moe.json"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_one_picture_of_all(recorded, tmp_path, ending):
    monitor, path = recorded
    out = plots.draw(monitor, tmp_path / f"a.{ending}")
    assert out.read_bytes()[:4] == (b"\x89PNG" if ending == "png" else b"<?xm") and out.stat().st_size > 10_000
    assert plots.layers(path) == ["0", "1"]


def test_the_parts_show_the_numbers(recorded):
    from matplotlib.figure import Figure

    monitor, path = recorded
    axes = Figure().add_subplot()
    shown = plots.load_map(axes, path).images[0].get_array()
    wanted = torch.stack([monitor.history(name, "share")[-1] * E for name in monitor.layers])
    assert torch.allclose(torch.tensor(shown.data), wanted)
    axes = plots.specialisation(Figure().add_subplot(), monitor, "1")
    assert torch.allclose(torch.tensor(axes.images[0].get_array().data), monitor.specialisation("1"))
    axes = plots.co_activation(Figure().add_subplot(), monitor)
    pairs = monitor.pairs("0")
    wanted = (pairs / pairs.diagonal()[:, None].clamp(min=1)).fill_diagonal_(0)
    assert torch.allclose(torch.tensor(axes.images[0].get_array().data), wanted)
    assert len(plots.collapse(Figure().add_subplot(), monitor).lines) == 2
    assert len(plots.load_over_time(Figure().add_subplot(), monitor).collections) == E
    with pytest.raises(ValueError, match="layer must be one of 0, 1, got 'x'"):
        plots.load_over_time(Figure().add_subplot(), monitor, "x")


def test_the_command_line(recorded, tmp_path):
    def plot(*words):
        return subprocess.run([sys.executable, "-m", "moe_kernels", "plot", *map(str, words)], capture_output=True,
                              text=True, cwd=tmp_path)  # fmt: skip

    done = plot(recorded[1], "--out", "b.png", "--layer", "1")
    assert done.returncode == 0 and "b.png: 6 records of 2 layers" in done.stdout, done.stderr
    assert (tmp_path / "b.png").stat().st_size > 10_000
    (tmp_path / "other.json").write_text("[]")
    for words, text in ((("none.json",), "none.json"), (("other.json",), "must be a file of Monitor.save")):
        done = plot(*words)
        assert done.returncode == 2 and text in done.stdout

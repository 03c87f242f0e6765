# SPDX-License-Identifier: Apache-2.0
"""A rank dies, stops, fails or disagrees: the others say who, in time, and go on. `make soak` does the same for hours.

R5 to R10 of the reliability table in docs/expert_parallel.md, a few trials each (tests/ep_drill.py).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ep_drill
import pytest
import torch

import moe_kernels as mk
from moe_kernels.expert_parallel import header
from moe_kernels.layers import Experts

FOLDER = Path(__file__).parent


def drill(*words: str, seconds: float = 240.0) -> list[dict[str, Any]]:
    command, env = [sys.executable, str(FOLDER / "ep_drill.py"), *words], {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, timeout=seconds, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert results, run.stderr[-3000:]
    assert [(r["job"], r["wrong"]) for r in results if r["wrong"]] == []
    assert run.returncode == 0
    return results


def test_a_killed_rank() -> None:
    """R5, R9, R10: the survivors raise within 2 s, name it, form a new group and compute the right step."""
    results = drill("kill", "--trials", "3")
    assert all(known["rebuilt"] for r in results for at, known in enumerate(r["ranks"]) if at != r["job"]["victim"])
    broken = copy.deepcopy(results[0])  # the judge is not blind
    broken["ranks"][(broken["job"]["victim"] + 1) % 4]["rank"] = 17
    assert ep_drill.faults_of(broken)


def test_a_stopped_rank() -> None:
    """R6: within the timeout and a second."""
    (result,) = drill("stop")
    times = [known["seconds"] for known in result["ranks"] if "seconds" in known]
    assert len(times) == 3 and min(times) > 1.5


def test_a_rank_that_fails_or_disagrees() -> None:
    """R7, R8: all raise the same within a second; the group goes on with the next step."""
    results = drill(*ep_drill.FAULTS, "--world", "3")
    assert len(results) == len(ep_drill.FAULTS)
    for result in results:
        said = {(known["rank"], known["field"], known["phase"]) for known in result["ranks"]}
        assert len(said) == 1, result


def test_an_error_in_the_backward_of_the_experts() -> None:
    """R7: autograd hands it on where it happened, all others are told at once; in pieces too, and without headers."""
    results = drill("backward", "--trials", "7", "--transports", "flat,rank_dedup,two_level,allgather,static")
    assert {(r["job"]["transport"], r["job"]["chunks"]) for r in results} >= {("flat", 1), ("two_level", 3)}


def records(**changed: int) -> list[list[int]]:
    """Four ranks' records; the third's is changed."""
    plain = {"sequence": 1, "phase": "dispatch", "rows": 5, "tokens": 5}
    return [header.encode({**plain, **(changed if rank == 2 else {})}, [1, 2, 0, 1]) for rank in range(4)]


@pytest.mark.parametrize("name", [*header.AGREED, "status"])
def test_every_field_is_judged(name: str) -> None:
    header.judge(records(), [4, 5, 6, 7], "dispatch")
    with pytest.raises(mk.MoECommError) as caught:
        header.judge(records(**{name: 99}), [4, 5, 6, 7], "dispatch")
    assert (caught.value.rank, caught.value.phase) == (6, "dispatch")
    assert caught.value.field == ("error" if name == "status" else name)


@pytest.mark.parametrize("rows", [-1, 2**31, 2**62, -(2**63)])
def test_counts_are_checked_before_anything_is_allocated(rows: int) -> None:
    with pytest.raises(mk.MoECommError, match="rows"):
        header.judge(records(rows=rows), [0, 1, 2, 3], "dispatch")
    bad = records()
    bad[1][-1] = rows
    with pytest.raises(mk.MoECommError, match="counts"):
        header.judge(bad, [0, 1, 2, 3], "dispatch")


def test_text_of_a_record() -> None:
    for words in ("", "short", "ä" * 200, "x" * 1000):
        assert header.text(header.encode({}, [0], words)) == words.encode()[:160].decode(errors="replace")


def test_one_thread_at_a_time() -> None:
    """R16 in one process: threads on one layer take turns, and no result is another's."""
    ep = mk.ExpertParallel(Experts(8, 4, 4, dtype=torch.float64))
    wrong: list[int] = []

    def work(seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for _ in range(100):
            x = torch.randn(3, 8, generator=g, dtype=torch.float64)
            ids = torch.randint(0, 4, (3, 1), generator=g)
            weights = torch.ones(3, 1, dtype=torch.float64)
            if not torch.equal(ep(x, weights, ids), ep.experts(x, weights, ids)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def test_a_forked_child_is_refused() -> None:
    """R17: at once, and with a reason."""
    ep = mk.ExpertParallel(Experts(8, 4, 4))
    x, weights, ids = torch.ones(3, 8), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    ep(x, weights, ids)
    pid = os.fork()
    if pid == 0:
        try:
            ep(x, weights, ids)
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    ep(x, weights, ids)


REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "layer_or_experts", {"layer_or_experts": 3}),
    (ValueError, "transport", {"transport": "pigeon"}),
    (ValueError, "chunks", {"chunks": 0}),
    (TypeError, "chunks", {"chunks": 1.5}),
    (ValueError, "timeout", {"timeout": 0}),
    (ValueError, "timeout", {"timeout": float("nan")}),
    (ValueError, "capacity_factor", {"capacity_factor": -1.0}),
    (ValueError, "capacity_factor", {"capacity_factor": float("nan")}),
    (ValueError, "capacity_factor", {"capacity_factor": 1.0, "transport": "allgather"}),
    (ValueError, "dispatch_dtype", {"dispatch_dtype": torch.int8}),
    (ValueError, "placement", {"placement": [0, 0, 0]}),
    (ValueError, "placement", {"placement": [0, 0, 0, 1]}),
    (TypeError, "group", {"group": "everyone"}),
    (ValueError, "group", {"group": [0, 0]}),
    (ValueError, "group", {"group": [1]}),
    (ValueError, "ranks_per_node", {"ranks_per_node": -2}),
    (ValueError, "num_experts", {"num_experts": 0}),
]


@pytest.mark.parametrize(("error", "name", "words"), REFUSED)
def test_settings_refused(error: type[Exception], name: str, words: dict[str, Any]) -> None:
    given = {"layer_or_experts": Experts(8, 4, 4), **words}
    with pytest.raises(error, match=f"ExpertParallel: .*{name}"):
        mk.ExpertParallel(given.pop("layer_or_experts"), **given)


def test_calls_refused() -> None:
    """On one rank too an error inside is a MoECommError, with the cause behind it."""
    ep = mk.ExpertParallel(Experts(8, 4, 4))
    x, weights, ids = torch.ones(3, 8), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32)
    bad: list[tuple[str, tuple[Any, ...]]] = [
        ("x", (x[0], weights, ids)), ("x", (x.int(), weights, ids)), ("topk_ids", (x, weights, ids.float())),
        ("topk_ids", (x, weights, ids[:2])), ("topk_weights", (x, None, ids)), ("K", (x, weights[:, :0], ids[:, :0])),
        ("H", (torch.ones(3, 9), weights, ids)), ("x", (None, weights, ids)),
    ]  # fmt: skip
    for name, given in bad:
        with pytest.raises(mk.MoECommError, match=name) as caught:
            ep(*given)
        assert caught.value.rank == 0 and isinstance(caught.value.__cause__, (TypeError, ValueError))
        assert ep(x, weights, ids).shape == x.shape
    layer = mk.ExpertParallel(mk.MoELayer(8, 4, 4, 2))
    with pytest.raises(ValueError, match="topk_ids"):
        layer(x, weights, ids)
    with pytest.raises(ValueError, match="spread"):
        mk.ExpertParallel(layer.layer)

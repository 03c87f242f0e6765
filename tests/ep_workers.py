# SPDX-License-Identifier: Apache-2.0
"""What one rank does in test_expert_parallel.py: many cases in one set of processes, each against a single process.

Every rank builds the whole case, takes its share of the tokens and checks its own results. One wrong result fails all.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moe_kernels as mk
from moe_kernels import testing
from moe_kernels.layers import Experts
from moe_kernels.testing import Case, make_case

TRANSPORTS = ("flat", "rank_dedup", "two_level", "allgather")
WEIGHTS = ("w13", "w2", "w13_bias", "w2_bias")


def share(T: int, rank: int, world: int) -> slice:
    """Ragged: rank 1 has no tokens, the last has most."""
    cuts = [0]
    for r in range(world - 1):
        cuts.append(cuts[-1] + (0 if r == 1 else min(r + 1, T - cuts[-1])))
    return slice(([*cuts, T])[rank], ([*cuts, T])[rank + 1])


def experts_of(case: Case) -> Experts:
    E, H = case.w2.shape[:2]
    options = {"activation": case.activation, "gated": case.gated, "bias": case.w13_bias is not None}
    experts = Experts(H, case.w2.shape[2], E, dtype=case.x.dtype, **options)
    experts.load_state_dict({name: getattr(case, name) for name in WEIGHTS if getattr(case, name) is not None})
    return experts


def run_share(ep: mk.ExpertParallel, case: Case, mine: slice) -> dict[str, Tensor]:
    """y and the gradients of this rank's share."""
    x, weights = (t[mine].clone().requires_grad_() for t in (case.x, case.topk_weights))
    for p in ep.parameters():
        p.grad = None
    y = ep(x, weights, case.topk_ids[mine], weight_on_input=case.weight_on_input)
    y.backward(case.grad_y[mine])
    found = {"y": y.detach(), "grad_x": x.grad, "grad_topk_weights": weights.grad}
    found |= {"grad_" + name.split(".")[-1]: p.grad for name, p in ep.named_parameters()}
    assert all(t is not None for t in found.values()), "a gradient of nothing is zeros, not None"
    return found  # type: ignore[return-value]


def partial_sums(case: Case) -> dict[str, Tensor]:
    """|contribution of a slot| summed over a token's slots, for y and grad_x: the most that a partial sum can be."""
    c, total = case.double(), {"y": torch.zeros_like(case.x.double()), "grad_x": torch.zeros_like(case.x.double())}
    for k in range(case.topk_ids.shape[1]):
        x = c.x.clone().requires_grad_()
        one = slice(k, k + 1)
        y = mk.reference.fused_experts(x, c.w13, c.w2, c.topk_weights[:, one], c.topk_ids[:, one], **c.options())
        total["y"] += y.detach().abs()
        if y.requires_grad:
            total["grad_x"] += torch.autograd.grad(y, x, c.grad_y, materialize_grads=True)[0].abs()
    return total


Truth = tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]


def truth_of(case: Case) -> Truth:
    return testing.expert_layer(case), partial_sums(case)


def widened(case: Case, truth: Truth, levels: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Truth and bound of a single process; `levels` roundings more of the partial sums of y and grad_x."""
    known = dict(truth[0])
    for name, size in truth[1].items():
        value, bound = known[name]
        known[name] = (value, bound + levels * testing.UNIT[case.x.dtype] * size)
    return known


def compare(found: dict[str, Tensor], known: dict[str, tuple[Tensor, Tensor]], mine: slice, local: Tensor) -> None:
    for name, t in found.items():
        part: Any = local if name.removeprefix("grad_") in WEIGHTS else mine
        truth, bound = (v[part] for v in known[name])
        testing.check(t, truth, bound, name)


CASES: list[dict[str, Any]] = [
    {"dtype": torch.float64, "K": 3},
    {"dtype": torch.float32, "skew": "zipf", "bias": True, "absent": True, "K": 3},
    {"dtype": torch.bfloat16, "skew": "empty", "K": 2},
    {"dtype": torch.float32, "activation": "relu", "gated": False, "K": 1, "H": 1},
    {"dtype": torch.float32, "skew": "one", "weight_on_input": True, "K": 2},
    {"dtype": torch.float64, "K": 8, "T": 9},
    {"dtype": torch.float32, "T": 0, "K": 2},
]


def the_cases() -> list[Case]:
    return [make_case(**({"T": 21, "E": 8} | words), seed=at) for at, words in enumerate(CASES)]


STATIC = ((0.5, torch.float64), (1.0, torch.float32), (8.0, torch.float64))


def static_case(factor: float, dtype: torch.dtype, world: int) -> tuple[Case, Case, list[Tensor]]:
    """12 tokens a rank; the same without the slots that each rank drops; and which those are."""
    case = make_case(12 * world, K=3, dtype=dtype, skew="zipf", absent=True, seed=7)
    slots = mk.Capacity(factor).slots(12, 3, 8)
    limits = [mk.limit_capacity(case.topk_ids[12 * r : 12 * r + 12], 8, slots) for r in range(world)]
    return case, dataclasses.replace(case, topk_ids=torch.where(torch.cat(limits), -1, case.topk_ids)), limits


def against_one_process(rank: int, folder: Path) -> int:
    """Every case through every transport, in one piece and in three."""
    world, done = dist.get_world_size(), 0
    known = torch.load(folder.parent / "truths.pt")
    for at, case in enumerate(the_cases()):
        mine, local = share(case.x.shape[0], rank, world), torch.arange(8).chunk(world)[rank]
        for transport, chunks in itertools.product(TRANSPORTS, (None, 3)):
            if chunks and at > 2:
                continue
            ep = mk.ExpertParallel(
                experts_of(case), transport=transport, ranks_per_node=max(world // 2, 1), chunks=chunks
            )
            levels = {"two_level": 2, "allgather": world + 1}.get(transport, 1)
            compare(run_share(ep, case, mine), widened(case, known[at], levels), mine, local)
            done += 1
    return done


def integers(T: int = 24, E: int = 8, K: int = 4, H: int = 6, I: int = 4) -> Case:
    """A case whose every sum is exact in float64: linear experts of small integers."""
    case = make_case(T, H, I, E, K, dtype=torch.float64, activation="relu", gated=False, seed=3)
    whole = {name: (getattr(case, name) * 3).round() for name in ("x", "w13", "w2", "grad_y")}
    return dataclasses.replace(case, **whole, topk_weights=(case.topk_weights * 8).round())


PLACEMENTS = {
    "contiguous": None,
    "strided": [0, 1, 2, 3, 0, 1, 2, 3],
    "uneven": [3, 0, 1, 2, 2, 2, 3, 3],
    "indexed": [[1, 1], [0, 0], [3, 1], [2, 0], [1, 0], [0, 1], [3, 0], [2, 1]],
}


def exact(rank: int, folder: Path) -> int:
    """Integers: all transports and placements give the bits of one process, forward and backward."""
    world, case, done = dist.get_world_size(), integers(), 0
    whole = run_share(mk.ExpertParallel(experts_of(case), [rank]), case, slice(None))
    mine = share(case.x.shape[0], rank, world)
    for transport, (kind, placement) in itertools.product(TRANSPORTS, PLACEMENTS.items()):
        ep = mk.ExpertParallel(experts_of(case), transport=transport, ranks_per_node=2, placement=placement)
        found = run_share(ep, case, mine)
        local = ep.engine.owner.eq(rank).nonzero()[:, 0]
        local = local[ep.engine.place[local].argsort()]
        for name, t in found.items():
            expected = whole[name][local if name.removeprefix("grad_") in WEIGHTS else mine]
            assert torch.equal(t, expected), (transport, kind, name)
        done += 1
    wrong = run_share(mk.ExpertParallel(experts_of(case), transport="flat", placement=[3, 2, 1, 0] * 2), case, mine)
    first = whole["grad_w13"][torch.arange(8).chunk(world)[rank]]
    assert not torch.equal(wrong["grad_w13"], first), "a wrong placement would not be noticed"
    return done


def arrivals(rank: int, folder: Path) -> dict[str, Any]:
    """Slots of each expert as they arrive, and bytes sent, for the test to count by itself."""
    case, found = integers(), {}
    mine = slice(6 * rank, 6 * rank + 6)
    for transport, dtype in itertools.product((*TRANSPORTS, "auto", "static"), (None, torch.float8_e4m3fn)):
        kind = {"capacity_factor": 8.0} if transport == "static" else {"transport": transport}
        ep = mk.ExpertParallel(experts_of(case), ranks_per_node=2, dispatch_dtype=dtype, **kind)
        assert ep.plan is None, "nothing is known of the tokens yet"
        seen: list[Tensor] = []
        ep.experts.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[2]))
        ep(case.x[mine], case.topk_weights[mine], case.topk_ids[mine])
        link = ep.engine.link
        assert link is not None
        before = dict(link.sent)
        ep(case.x[mine], case.topk_weights[mine], case.topk_ids[mine])
        counts = torch.bincount(torch.cat([ids[ids >= 0] for ids in seen]), minlength=ep.experts.w13.shape[0])
        found[transport, dtype] = {
            "counts": counts // 2, "sent": ep.bytes_sent, "plan": ep.plan,
            "phases": {key: n - before.get(key, 0) for key, n in link.sent.items() if n != before.get(key, 0)},
        }  # fmt: skip
    return found


def static_capacity(rank: int, folder: Path) -> int:
    """Drops are those of `limit_capacity` on this rank's tokens, the rest is the dropless result; then no header."""
    world, done = dist.get_world_size(), 0
    truths = torch.load(folder.parent / f"static{world}.pt")
    for at, (factor, dtype) in enumerate(STATIC):
        case, kept, limits = static_case(factor, dtype, world)
        mine, local = slice(12 * rank, 12 * rank + 12), torch.arange(8).chunk(world)[rank]
        ep = mk.ExpertParallel(experts_of(case), capacity_factor=factor)
        known = widened(kept, truths[at], 1)
        for step in range(3):
            headers = ep.engine.link.header_bytes if ep.engine.link else 0
            compare(run_share(ep, case, mine), known, mine, local)
            assert torch.equal(ep.dropped, limits[rank])
            assert (factor < 8) == bool(torch.cat(limits).any())
            if step:
                assert ep.engine.link.header_bytes == headers, "a header where nothing changed"
        done += 1
    return done


def float8(rank: int, folder: Path) -> int:
    """Rows sent as float8 give the bits of rows that were float8 before, whichever way they travel."""
    from moe_kernels.expert_parallel import rows

    world = dist.get_world_size()
    for at, (dtype, H) in enumerate(((torch.float32, 200), (torch.bfloat16, 128))):
        case = make_case(16, H=H, dtype=dtype, seed=at)
        mine = share(16, rank, world)
        rounded = dataclasses.replace(case, x=rows.dequantize(*rows.quantize(case.x), dtype))
        assert not torch.equal(rounded.x, case.x)
        for transport in ("flat", "rank_dedup", "allgather"):
            eps = [mk.ExpertParallel(experts_of(case), transport=transport, dispatch_dtype=kind)
                   for kind in (torch.float8_e4m3fn, None)]  # fmt: skip
            small, plain = run_share(eps[0], case, mine), run_share(eps[1], rounded, mine)
            for name in small:
                assert torch.equal(small[name], plain[name]), (transport, name)
            if world > 1 and mine.stop > mine.start and transport == "allgather":
                assert sum(eps[0].bytes_sent.values()) < sum(eps[1].bytes_sent.values())
    return world

# SPDX-License-Identifier: Apache-2.0
"""`plan`: what expert parallelism will move, how long that takes by a simple model, and which transport to use.

    plan(4096, 7168, 2048, 256, 8, 64, dispatch_dtype=torch.float8_e4m3fn, nodes_per_token=4).transport

Rows are expectations in closed form, or exact for given `topk_ids` (`traffic.exact_traffic`). A link's time is
alpha + bytes / beta; the two classes of link work side by side. Nothing is contended for: a plan compares transports,
and `calibrate` measures the constants where it matters. Letters: traffic.py; C chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import check
from . import chances
from .flows import Flow, Shape, flows
from .traffic import LINKS, STATIC, TRANSPORTS, Traffic, exact_traffic, metadata_bytes, owners, row_bytes, static_rows

__all__ = ["Cost", "Links", "Plan", "exact_traffic", "metadata_bytes", "owners", "plan", "row_bytes"]

MAX_CHUNKS = 8
MIN_ROWS = 128
"""rows that an expert keeps in every chunk: a smaller product wastes the tile"""


@dataclass(frozen=True)
class Links:
    """Speeds of a cluster: GB/s of one direction of one GPU as reached in practice, start-up times in microseconds.

    The defaults are assumptions for H100 with NVLink (450 GB/s, three quarters reached) and a 400 Gb/s network card a
    GPU (88 % reached). peer_us: for every remote rank that a message is posted to. tflops: of the expert products.
    """

    nvlink_gbs: float = 337.5
    nic_gbs: float = 44.0
    nvlink_us: float = 3.0
    nic_us: float = 12.0
    peer_us: float = 0.7
    tflops: float = 500.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name.endswith("_us") else 1e-9
            if not isinstance(value, (int, float)) or not low <= value < math.inf:
                check.refuse("Links", name, f"a number of at least {low:g}", check.got(value))


@dataclass(frozen=True)
class Cost:
    """One phase (dispatch or combine) of one transport, of an average rank.

    rows, bytes: sent a class of link. us: time of each class. launch_us: the part of it that no byte takes.
    """

    rows: dict[str, float]
    bytes: dict[str, int]
    us: dict[str, float]
    launch_us: dict[str, float]
    staged: bool
    """the second class of link has to wait for the first, piece by piece"""

    def total_us(self, chunks: int = 1) -> float:
        """The classes run side by side; staged ones as a pipeline of so many chunks."""
        low, high = sorted(self.us.values())
        return high + low / chunks if self.staged else high


@dataclass(frozen=True)
class Plan:
    """What to use, and why.

    transport, chunks: the choice of least `step_us`. bytes: transport -> class of link -> bytes that an average rank
    sends in dispatch and combine. rows: the rows of the dispatch likewise. us: communication of dispatch and combine.
    dominant: what takes longest with the choice: "nic", "nvlink", "launch" or "compute". recv_mean, recv_p99,
    recv_worst: bytes of the buffer that receives the dispatch, on the fullest rank: expected, in 99 of 100 steps, ever.
    drop_prob: expected share of the slots beyond the capacity; overflow_prob: chance that an expert overflows.
    step_us: with the expert products, at each transport's best chunk count. imbalance: fullest rank over the mean.
    static_bytes, static_recv: with a capacity, and places of a fixed number instead: what every rank sends in dispatch
    and combine, a class of link, and its buffer, both exactly; None where E is no multiple of the ranks.
    """

    transport: str
    chunks: int
    bytes: dict[str, dict[str, int]]
    rows: dict[str, dict[str, float]]
    us: dict[str, float]
    dominant: str
    recv_mean: int
    recv_p99: int
    recv_worst: int
    drop_prob: float
    overflow_prob: float
    step_us: dict[str, float]
    compute_us: float
    imbalance: float
    world_size: int
    static_bytes: dict[str, int] | None
    static_recv: int | None
    phases: dict[str, tuple[Cost, Cost]] = field(repr=False)
    """transport -> (dispatch, combine)"""
    traffic: dict[str, Traffic] | None = field(default=None, repr=False)
    """of given topk_ids"""

    def __str__(self) -> str:
        head = f"{self.world_size} ranks: {self.transport}, {self.chunks} chunks, bound by {self.dominant}"
        lines = [f"{'transport':<11}{'rows nic':>10}{'nvlink':>10}{'MB nic':>9}{'nvlink':>9}{'us':>9}{'step us':>10}"]
        for name, us in self.us.items():
            rows, sent = self.rows[name], self.bytes[name]
            lines.append(
                f"{name:<11}{rows['nic']:>10.0f}{rows['nvlink']:>10.0f}{sent['nic'] / 1e6:>9.1f}"
                f"{sent['nvlink'] / 1e6:>9.1f}{us:>9.0f}{self.step_us[name]:>10.0f}"
            )
        mean, p99, worst = (v / 1e6 for v in (self.recv_mean, self.recv_p99, self.recv_worst))
        lines.append(f"receives {mean:.1f} MB, {p99:.1f} in 99 of 100 steps, {worst:.1f} at worst")
        lines.append(f"fullest rank {self.imbalance:.2f} times the mean; slots dropped {self.drop_prob:.2%}")
        return "\n".join([head, *lines])


def plan(
    T: int, H: int, I: int, E: int, K: int, world_size: int, *, gpus_per_node: int = 8,
    dispatch_dtype: torch.dtype = torch.bfloat16, combine_dtype: torch.dtype = torch.bfloat16,
    links: Links | None = None, nodes_per_token: int | None = None, load: Tensor | Sequence[float] | None = None,
    capacity_factor: float | None = None, topk_ids: Sequence[Tensor] | Tensor | None = None,
    placement: Tensor | None = None, metadata: dict[str, int] | None = None,
) -> Plan:  # fmt: skip
    """The cost of one MoE layer over `world_size` ranks, forward, for every transport; chooses one.

    Args:
        T, H, I, E, K: tokens of a rank, hidden size, expert width (gated), experts, experts a token.
        world_size: W.
        gpus_per_node: g. two_level needs W to be a multiple of it, or less.
        dispatch_dtype, combine_dtype: of the rows that go, and that come back (the layer's own). A float8 row carries
            its scales.
        links: speeds of the cluster, `Links()` by default; `calibrate.calibrate()` measures them.
        nodes_per_token: M, the nodes a token's experts are confined to; None: any.
        load: [E] counts or shares of the experts, such as a Monitor's; None: all alike. Not with nodes_per_token.
        capacity_factor: for the share of dropped slots, with ceil(T*K/E*factor) slots for each rank and expert.
        topk_ids: of every rank, [T, K]: exact rows instead of expectations. Not with load or nodes_per_token.
        placement: int [E], the rank of every expert; contiguous by default. Not with nodes_per_token.
        metadata: transport -> bytes beside a dispatched row, `metadata_bytes` by default.
    Returns:
        Plan(transport, chunks, bytes, rows, us, dominant, recv_mean, recv_p99, recv_worst, drop_prob, ...).

    Errors: TypeError, ValueError.
    """
    for name, value in (("T", T), ("H", H), ("I", I), ("E", E), ("K", K), ("world_size", world_size),
                        ("gpus_per_node", gpus_per_node)):  # fmt: skip
        check.count("plan", name, value, 0 if name == "T" else 1)
    check.count("plan", "K", K, 1, E, "E=")
    links = Links() if links is None else links
    if not isinstance(links, Links):
        check.refuse("plan", "links", "a Links", check.got(links), TypeError)
    if capacity_factor is not None and not (isinstance(capacity_factor, (int, float)) and 0 < capacity_factor < 1e6):
        check.refuse("plan", "capacity_factor", "a number above 0", check.got(capacity_factor))
    if not set(metadata or {}) <= set(TRANSPORTS):
        check.refuse("plan", "metadata", f"by transport ({', '.join(TRANSPORTS)})", repr(metadata))
    shape = Shape(T, E, K, world_size, min(gpus_per_node, world_size))
    found = flows(shape, load=load, nodes_per_token=nodes_per_token, topk_ids=topk_ids, placement=placement)
    beside = {name: metadata_bytes(name, K, combine_dtype) for name in TRANSPORTS} | (metadata or {})
    widths = {name: row_bytes(H, dispatch_dtype, beside[name]) for name in TRANSPORTS}
    back = row_bytes(H, combine_dtype)
    phases = {
        name: (_cost(shape, name, flow, widths[name], links), _cost(shape, name, flow, back, links))
        for name, flow in found.transports.items()
    }
    compute = 6 * H * I * T * world_size * float(found.slots.max()) / (links.tflops * 1e6)
    best = {name: _best_chunks(shape, pair, compute) for name, pair in phases.items()}
    transport = min(best, key=lambda name: best[name][0])
    recv, drops = found.received[transport], _drops(shape, found.load, capacity_factor)
    static_bytes, static_recv = None, None
    if capacity_factor is not None and E % world_size == 0:
        each = static_rows(T, K, E, world_size, capacity_factor)
        static = row_bytes(H, dispatch_dtype, metadata_bytes(STATIC, K, combine_dtype))
        peers = {"nic": world_size - shape.g, "nvlink": shape.g - 1}
        static_bytes = {link: peers[link] * each * (static + back) for link in LINKS}
        static_recv = world_size * each * static
    traffic = None
    if topk_ids is not None:
        traffic = exact_traffic(topk_ids, E, ranks_per_node=gpus_per_node, hidden=H, dispatch_dtype=dispatch_dtype,
                                combine_dtype=combine_dtype, placement=placement, metadata=metadata)  # fmt: skip
    return Plan(
        static_bytes=static_bytes, static_recv=static_recv,
        transport=transport, chunks=best[transport][1],
        bytes={name: {link: sum(c.bytes[link] for c in pair) for link in LINKS} for name, pair in phases.items()},
        rows={name: pair[0].rows for name, pair in phases.items()},
        us={name: sum(c.total_us(best[name][1]) for c in pair) for name, pair in phases.items()},
        dominant=_dominant(phases[transport], compute), recv_mean=round(recv.mean * widths[transport]),
        recv_p99=math.ceil(recv.p99) * widths[transport], recv_worst=recv.worst * widths[transport],
        drop_prob=drops[0], overflow_prob=drops[1], step_us={name: us for name, (us, _) in best.items()},
        compute_us=compute, imbalance=found.imbalance, world_size=world_size, phases=phases, traffic=traffic,
    )  # fmt: skip


def _cost(shape: Shape, transport: str, flow: Flow, width: int, links: Links) -> Cost:
    """One phase. A collective sends a row once to a node and passes it on there, so its time counts it once."""
    W, N, g, T = shape.W, shape.N, shape.g, shape.T
    peers = {"nic": N - 1 if transport in ("two_level", "allgather") else W - g, "nvlink": 0}
    carried = {link: flow.rows[link] * flow.skew[link] for link in LINKS}
    if transport == "allgather":
        carried = {"nic": T * (N - 1), "nvlink": T * N * (g - 1)}
    launch = {
        "nic": (links.nic_us + links.peer_us * peers["nic"]) if N > 1 else 0.0,
        "nvlink": links.nvlink_us if g > 1 else 0.0,
    }
    speed = {"nic": links.nic_gbs * 1e3, "nvlink": links.nvlink_gbs * 1e3}
    return Cost(
        rows=flow.rows, bytes={link: round(flow.rows[link] * width) for link in LINKS},
        us={link: launch[link] + carried[link] * width / speed[link] for link in LINKS},
        launch_us=launch, staged=transport == "two_level",
    )  # fmt: skip


def _best_chunks(shape: Shape, pair: tuple[Cost, Cost], compute: float) -> tuple[float, int]:
    """(step time, chunks) of the fastest chunk count: communication beside the products, but for the ends."""
    rows = shape.T * shape.K * shape.W / shape.E
    tried = []
    for chunks in range(1, MAX_CHUNKS + 1):
        if chunks == 1 or rows / chunks >= MIN_ROWS:
            again = (chunks - 1) * sum(max(c.launch_us.values()) for c in pair)
            moved = sum(c.total_us(chunks) for c in pair) + again
            low, high = sorted((moved, compute))
            tried.append((high + low / chunks, chunks))
    return min(tried)


def _dominant(pair: tuple[Cost, Cost], compute: float) -> str:
    """The largest of: bytes on each class of link, starting to send, products."""
    parts = {link: sum(c.us[link] - c.launch_us[link] for c in pair) for link in LINKS}
    parts |= {"launch": sum(max(c.launch_us.values()) for c in pair), "compute": compute}
    return max(parts, key=lambda name: parts[name])


def _drops(shape: Shape, load: Tensor, capacity_factor: float | None) -> tuple[float, float]:
    """(share of the slots dropped, chance that an expert overflows), each rank and expert with its own capacity."""
    total = float(load.sum()) * shape.T
    if capacity_factor is None or total == 0:
        return 0.0, 0.0
    capacity = math.ceil(shape.T * shape.K / shape.E * capacity_factor)
    over, beyond = chances.overflow(shape.T, load, capacity)
    return float(beyond.sum()) / total, float(over.mean())

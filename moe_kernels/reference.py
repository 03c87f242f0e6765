# SPDX-License-Identifier: Apache-2.0
"""The executable specification: every stage of a Mixture-of-Experts layer in plain PyTorch.

Letters: T tokens, H hidden, I expert width, E experts, K experts a token, S = T*K slots (slot = t*K + k), P permuted
rows, G groups of experts, M groups a token may use. A token's layer is, in these words,

    route -> permute -> grouped_gemm -> activation -> grouped_gemm -> unpermute          (`moe_forward`)

and the last five stages in one are `fused_experts`. Every function has the signature of the public op of the same
name, runs on any device in any floating dtype, and is differentiable by ordinary autograd. Precision: float64 in means
float64 throughout; any other dtype is computed in float32 and cast once at the end. Nothing here is fast.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .main_grad import into_main_grad
from .schemas import acc_dtype

FLOAT32_MAX = torch.finfo(torch.float32).max


class Routing(NamedTuple):
    """What `route` returns. Slots are in descending order of the selection score, ties by ascending expert id."""

    topk_weights: Tensor
    """acc [T, K] combine weights (acc: float64 for float64 logits, else float32)"""
    topk_ids: Tensor
    """int32 [T, K] experts, -1 for an absent slot"""
    tokens_per_expert: Tensor
    """int32 [E] slots that chose each expert"""
    lse: Tensor | None
    """acc [T] log of the softmax denominator, or None for the other score functions"""
    dropped: Tensor | None
    """bool [T, K] slots dropped for capacity, or None where no capacity applies"""


class Permuted(NamedTuple):
    """What `permute` returns. The rows of expert e are expert_offsets[e] .. expert_offsets[e+1]."""

    x_rows: Tensor
    """[P, H] token rows in expert order, 0 in rows that hold no slot"""
    row_to_slot: Tensor
    """int32 [P] slot of each row, -1 for none"""
    slot_to_row: Tensor
    """int32 [S] row of each slot, -1 for an absent slot"""
    expert_offsets: Tensor
    """int32 [E+1] exclusive prefix sums; the last one is the number of rows in use"""


# ---- route


def scores(logits: Tensor, scoring_func: str = "softmax", logit_softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> the logits that count and their scores, acc [T, E]. NaN is -inf, +inf the largest float32."""
    l = logits.to(acc_dtype(logits.dtype))
    l = torch.where(l.isnan(), -math.inf, l).clamp(max=FLOAT32_MAX)
    if logit_softcap > 0:
        l = torch.where(l == -math.inf, l, logit_softcap * torch.tanh(l / logit_softcap))
    if scoring_func == "softmax":
        return l, _finite_rows(l).softmax(-1) * (l > -math.inf)
    if scoring_func == "sigmoid":
        return l, l.sigmoid()
    root = torch.logaddexp(l.clamp(min=-40), torch.zeros_like(l)).sqrt()
    return l, torch.where(l < -40, (l.clamp(max=-40) / 2).exp(), root)  # softplus(l) = exp(l) to the last bit below -40


def select(choice: Tensor, top_k: int) -> Tensor:
    """choice [T, E] -> ids [T, K], best first, ties to the lowest id."""
    return choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def limit_groups(choice: Tensor, num_expert_group: int, topk_group: int, group_top: int) -> Tensor:
    """choice [T, E] with -inf outside the M best of G groups; a group's score is the sum of its group_top best."""
    T, E = choice.shape
    in_group = choice.reshape(T, num_expert_group, E // num_expert_group)
    best = in_group.topk(min(group_top, in_group.shape[2]), -1).values.sum(-1)
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, select(best, topk_group), True)
    return torch.where(allowed[:, :, None], in_group, -math.inf).reshape(T, E)


def weigh(s: Tensor, ids: Tensor, renormalize: bool, eps: float, scale: float) -> Tensor:
    """Scores s [T, E] and ids [T, K] -> weights [T, K]; an absent id weighs 0."""
    w = torch.where(ids >= 0, s.gather(-1, ids.long().clamp(min=0)), 0.0)
    if renormalize:
        total = w.sum(-1, keepdim=True) + eps
        w = w / torch.where(total > 0, total, 1.0)
    return w * scale


def route(
    logits: Tensor, top_k: int, *, scoring_func: str = "softmax", renormalize: bool = True,
    renormalize_eps: float | None = None, e_score_correction_bias: Tensor | None = None,
    num_expert_group: int | None = None, topk_group: int | None = None, group_top: int | None = None,
    routed_scaling_factor: float = 1.0, scale_when_renormalized: bool = True, logit_softcap: float = 0.0,
    padding_mask: Tensor | None = None,
) -> Routing:  # fmt: skip
    """logits [T, E] -> Routing. The bias takes part in the choice only."""
    E, bias = logits.shape[1], e_score_correction_bias
    group_top = group_top or (1 if bias is None else 2)
    eps = renormalize_eps if renormalize_eps is not None else 0.0 if scoring_func == "softmax" else 1e-20
    renormalize, scale = effective_scale(renormalize, top_k, routed_scaling_factor, scale_when_renormalized)
    l, s = scores(logits, scoring_func, logit_softcap)
    choice = (s if bias is None else s + bias.to(s.dtype)).detach()
    choice = torch.where((l == -math.inf) | choice.isnan(), -math.inf, choice)
    if num_expert_group and num_expert_group > 1:
        choice = limit_groups(choice, num_expert_group, topk_group or 1, group_top)
    ids = select(choice, top_k)
    if padding_mask is not None:
        ids = torch.where(padding_mask[:, None], ids, -1)
    w = weigh(torch.where(choice > -math.inf, s, 0.0), ids, renormalize, eps, scale)
    counts = torch.bincount(ids[ids >= 0], minlength=E)
    lse = log_sum_exp(l, ids) if scoring_func == "softmax" else None
    return Routing(w, ids.int(), counts.int(), lse, None)


def effective_scale(renormalize: bool, top_k: int, scale: float, scale_when_renormalized: bool) -> tuple[bool, float]:
    """DeepSeek-V2 scales only what it does not renormalise, and renormalises only K > 1; V3 always scales."""
    if scale_when_renormalized:
        return renormalize, scale
    return (True, 1.0) if renormalize and top_k > 1 else (False, scale)


def log_sum_exp(l: Tensor, ids: Tensor) -> Tensor:
    """l [T, E] -> lse [T]; 0 for a masked token (id -1) and for a row without a finite logit."""
    counted = (l > -math.inf).any(-1) & (ids[:, 0] >= 0)
    return torch.where(counted, _finite_rows(l).logsumexp(-1), 0.0)


def _finite_rows(l: Tensor) -> Tensor:
    return torch.where((l > -math.inf).any(-1, keepdim=True), l, 0.0)


# ---- the sums that balance losses are made of


def sum_scores(
    logits: Tensor, *, scoring_func: str = "softmax", normalize: bool = True, logit_softcap: float = 0.0,
    groups: int = 1, padding_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """logits [T, E] -> [B, E]: the scores of the tokens of each of B groups, over a token's sum if normalize."""
    s = scores(logits, scoring_func, logit_softcap)[1]
    if normalize and scoring_func != "softmax":
        total = s.sum(-1, keepdim=True)
        s = s / torch.where(total > 0, total, 1.0)
    if padding_mask is not None:
        s = torch.where(padding_mask[:, None], s, 0.0)
    return s.reshape(groups, s.shape[0] // groups, s.shape[1]).sum(1)


def route_with_sums(
    logits: Tensor, top_k: int, groups: int = 1, *, normalize: bool = True, **options: Any
) -> tuple[Routing, Tensor]:
    """logits [T, E] -> Routing and score_sums [B, E]: `route` and `sum_scores` of the same logits."""
    summed = {name: options[name] for name in ("scoring_func", "logit_softcap", "padding_mask") if name in options}
    return route(logits, top_k, **options), sum_scores(logits, normalize=normalize, groups=groups, **summed)


# ---- capacity


def limit_capacity(topk_ids: Tensor, num_experts: int, capacity: int, *, group_size: int | None = None) -> Tensor:
    """topk_ids [T, K] -> dropped bool [T, K]: in every group the slots beyond an expert's first `capacity` ones.

    The order is by slot position: first choices of the group's tokens, then second choices, ... Absent slots stay.
    """
    T, E = topk_ids.shape[0], num_experts
    dropped = [torch.zeros_like(topk_ids[:0], dtype=torch.bool)]
    for ids in topk_ids.split(max(T if group_size is None else group_size, 1)):
        walk = ids.T.flatten().long()
        walk = torch.where((walk >= 0) & (walk < E), walk, E)
        chosen = F.one_hot(walk, E + 1)
        position = (chosen.cumsum(0) - chosen).gather(1, walk[:, None]).squeeze(1)
        late = (position >= capacity) & (walk < E)
        dropped.append(late.reshape(ids.T.shape).T)
    return torch.cat(dropped)


# ---- expert choice: cuts, then slots


def expert_cuts(
    logits: Tensor, count: int, group_size: int, *, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [T, E] -> scores [E, T] (-1: no token); of the `count` best tokens of every expert in every group of n,
    ties to the lowest: least [T/n, E] their least score, last [T/n, E] the last of just this one, -1 for none; then
    experts_per_token [T] and tokens_per_expert [E]."""
    T, n = logits.shape[0], group_size
    s = scores(logits)[1]
    s = (s if padding_mask is None else torch.where(padding_mask[:, None], s, -1.0)).T.contiguous()
    columns = s.reshape(s.shape[0], T // n, n)  # [E, T/n, n]
    order = select(columns.flatten(0, 1), count).reshape(*columns.shape[:2], count)
    worst = order[..., -1:]
    least = columns.gather(2, worst).squeeze(2)
    first = torch.arange(T // n, device=s.device) * n
    last = torch.where(least >= 0, worst.squeeze(2) + first, -1)
    taken = torch.zeros_like(columns, dtype=torch.bool).scatter(2, order, True) & (columns >= 0)
    return (s, least.T.contiguous(), last.T.contiguous().int(), taken.sum(0).flatten().int(),
            taken.sum((1, 2)).int())  # fmt: skip


def expert_slots(scores: Tensor, least: Tensor, last: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """What expert_cuts returns -> topk_weights and topk_ids [T, slots]: a token's experts, best first, then -1."""
    T = scores.shape[1]
    group = torch.arange(T, device=scores.device) // max(T // max(len(least), 1), 1)
    s, t = scores.T, torch.arange(T, device=scores.device)[:, None]
    taken = (s > least[group]) | ((s == least[group]) & (t <= last[group]))
    ids = select(torch.where(taken, s, -1.0), slots)
    present = taken.gather(1, ids)
    return torch.where(present, s.gather(1, ids), 0.0), torch.where(present, ids, -1).int()


def expert_choice(
    logits: Tensor, count: int, group_size: int, *, slots: int | None = None, padding_mask: Tensor | None = None
) -> Routing:
    """logits [T, E] -> Routing: every expert takes its `count` best tokens of a group; slots None: as needed."""
    _, least, last, per_token, counts = expert_cuts(logits.detach(), count, group_size, padding_mask=padding_mask)
    s = scores(logits)[1]
    s = s if padding_mask is None else torch.where(padding_mask[:, None], s, -1.0)
    slots = max(int(per_token.max()), 1) if slots is None else slots
    return Routing(*expert_slots(s.T, least, last, slots), counts, None, None)


# ---- sinkhorn


class Balanced(NamedTuple):
    """What `sinkhorn` returns."""

    topk_weights: Tensor  # acc [T, K] sigmoid of the logit for K = 1, softmax over all logits for more
    topk_ids: Tensor  # int32 [T, K] the best experts of the plan, best first, -1 for what is not a token
    tokens_per_expert: Tensor  # int32 [E]
    plan: Tensor  # acc [T, E], its rows sum to 1/T and its columns to 1/E
    iterations: Tensor  # int32 [1]


def sinkhorn(
    logits: Tensor, top_k: int, tol: float = 1e-4, max_iterations: int = 1000, *, padding_mask: Tensor | None = None
) -> Balanced:
    """logits [T, E] -> Balanced. Until the factors d1 of the columns move by no more than tol in the mean:
    d0 = (1/T) / (cost d1 + 1e-8), d1 = (1/E) / (cost^T d0 + 1e-8), cost = exp(logits), plan = d0 cost d1."""
    (_, E), acc = logits.shape, acc_dtype(logits.dtype)
    l, s = scores(logits, "sigmoid" if top_k == 1 else "softmax")
    valid = torch.ones_like(l[:, 0], dtype=torch.bool) if padding_mask is None else padding_mask
    cost = torch.where(valid[:, None], l.detach(), -math.inf)
    top, T = float(cost.max()) if cost.numel() else 0.0, int(valid.sum())
    if (logits.dtype.itemsize == 2 and top > -math.inf) or top > (600 if acc == torch.float64 else 60):
        cost = cost - top  # in half precision always, else where exp might overflow
    cost = cost.exp()
    d0, d1, iterations, moved = torch.zeros_like(cost[:, 0]), cost.new_ones(E), 0, math.inf
    while T > 0 and iterations < max_iterations and moved > tol:
        d0 = torch.where(valid, 1 / T / (cost @ d1 + 1e-8), 0.0)
        before, d1 = d1, 1 / E / (d0 @ cost + 1e-8)
        iterations, moved = iterations + 1, float((d1 - before).abs().mean())
    plan = d0[:, None] * cost * d1
    ids = torch.where(valid[:, None], select(plan, top_k), -1)
    counts = torch.bincount(ids[ids >= 0], minlength=E)
    done = torch.tensor([iterations], dtype=torch.int32, device=logits.device)
    return Balanced(weigh(s, ids, False, 0.0, 1.0), ids.int(), counts.int(), plan, done)


# ---- permute


def permute(x: Tensor, topk_ids: Tensor, num_experts: int, *, align: int = 1) -> Permuted:
    """x [T, H], topk_ids [T, K] -> rows in expert order, stable in the slot; each expert at a multiple of align."""
    (T, K), E = topk_ids.shape, num_experts
    S, P = T * K, T * K + E * (align - 1)
    ids = topk_ids.reshape(S).long()
    ids = torch.where((ids >= 0) & (ids < E), ids, E)  # expert E: the absent slots, last in order
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=E + 1)
    first = counts.cumsum(0) - counts  # of each expert, without padding
    offsets = F.pad(((counts[:E] + align - 1) // align * align).cumsum(0), (1, 0))
    row = offsets[ids[order]] + torch.arange(S, device=x.device) - first[ids[order]]
    row, slot = row[: S - counts[E]], order[: S - counts[E]]
    row_to_slot = torch.full((P,), -1, device=x.device).scatter(0, row, slot)
    slot_to_row = torch.full((S,), -1, device=x.device).scatter(0, slot, row)
    x_rows = _with_zero_row(x.to(acc_dtype(x.dtype)))[torch.where(row_to_slot >= 0, row_to_slot // K, T)]
    return Permuted(x_rows.to(x.dtype), row_to_slot.int(), slot_to_row.int(), offsets.int())


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


# ---- grouped_gemm


def grouped_gemm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, *, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None, main_grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One product a group e; offs [E] are inclusive ends of the groups along the dimension that a 2-D operand shares.

    a [M, k] b [E, k, N] -> [M, N] (rows grouped); a [E, M, k] b [k, N] -> [M, N] (columns grouped);
    a [M, k] b [k, N] -> [E, M, N] (k grouped); a [E, M, k] b [E, k, N] -> [E, M, N]. Past the last end: 0.
    """
    acc, out_dtype = acc_dtype(a.dtype), out_dtype or a.dtype
    a, b = a.to(acc), into_main_grad(b, main_grad).to(acc)
    plus = None if bias is None else bias.to(acc)[:, None]  # [E, 1, N]
    if offs is None:
        out = a @ b if plus is None else a @ b + plus
        return out.to(out_dtype)
    ends = offs.tolist()
    spans = list(enumerate(zip([0, *ends], ends)))
    if a.dim() == 2 and b.dim() == 2:
        out = torch.stack([a[:, lo:hi] @ b[lo:hi] for _, (lo, hi) in spans])
        return (out if plus is None else out + plus).to(out_dtype)
    if a.dim() == 2:
        b_of = b.unbind()
        rows = [a[lo:hi] @ b_of[e] + (0.0 if plus is None else plus[e]) for e, (lo, hi) in spans]
        return torch.cat([*rows, a.new_zeros(a.shape[0] - ends[-1], b.shape[2])]).to(out_dtype)
    columns = [a_e @ b[:, lo:hi] for a_e, (_, (lo, hi)) in zip(a.unbind(), spans)]
    return torch.cat([*columns, a.new_zeros(a.shape[1], b.shape[1] - ends[-1])], 1).to(out_dtype)


# ---- the expert MLP


def activate(
    h: Tensor, activation: str = "silu", gated: bool = True, swiglu_limit: float = 7.0, swiglu_alpha: float = 1.702
) -> Tensor:
    """h [..., 2I] = [gate; up] -> act(gate) * up [..., I]; ungated: h [..., I] -> act(h)."""
    gate, up = h.chunk(2, -1) if gated else (h, None)
    if activation == "swigluoai" and up is not None:
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
        return (up + 1) * gate * torch.sigmoid(swiglu_alpha * gate)
    act = _ACTIVATIONS[activation](gate)
    return act if up is None else act * up


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def fused_experts(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, activation: str = "silu",
    gated: bool | None = None, w13_bias: Tensor | None = None, w2_bias: Tensor | None = None, interleaved: bool = False,
    transposed: bool = False, expert_map: Tensor | None = None, apply_router_weight_on_input: bool = False,
    swiglu_limit: float = 7.0, swiglu_alpha: float = 1.702, hidden_mask: Tensor | None = None, recompute: bool = False,
    w13_main_grad: Tensor | None = None, w2_main_grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[t] = sum over k of topk_weights[t, k] * (act(x[t] @ w13[e]^T + b13[e]) @ w2[e]^T + b2[e]), e = ids[t, k]."""
    acc, ids = acc_dtype(x.dtype), local_ids(topk_ids, expert_map)
    w13, w2 = into_main_grad(w13, w13_main_grad), into_main_grad(w2, w2_main_grad)
    w13, w2, w13_bias = canonical(w13, w2, w13_bias, interleaved, transposed)
    gated = w13.shape[1] == 2 * w2.shape[2] if gated is None else gated
    w13_of, w2_of = w13.unbind(), w2.unbind()
    y = torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format)
    for e in [e for e in ids.unique().tolist() if 0 <= e < len(w13)]:
        t, k = torch.where(ids == e)
        weight, row = topk_weights[t, k, None].to(acc), x[t].to(acc)
        row = weight * row if apply_router_weight_on_input else row
        h = row @ w13_of[e].to(acc).T + (0.0 if w13_bias is None else w13_bias[e].to(acc))
        h = activate(h, activation, gated, swiglu_limit, swiglu_alpha)
        h = h if hidden_mask is None else h * hidden_mask[t, k].to(acc)
        out = h @ w2_of[e].to(acc).T + (0.0 if w2_bias is None else w2_bias[e].to(acc))
        y = y.index_add(0, t, out if apply_router_weight_on_input else weight * out)
    return y.to(x.dtype)


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """topk_ids [T, K] -> local expert ids [T, K]; expert_map [G]: global id -> local one, -1 where it is elsewhere."""
    ids = topk_ids.long()
    if expert_map is None:
        return ids
    known = (ids >= 0) & (ids < len(expert_map))
    return torch.where(known, F.pad(expert_map.long(), (0, 1))[torch.where(known, ids, len(expert_map))], -1)


def canonical(
    w13: Tensor, w2: Tensor, w13_bias: Tensor | None, interleaved: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights of any layout -> w13 [E, 2I, H] with rows [gate; up], w2 [E, H, I], w13_bias [E, 2I] in that order."""
    if transposed:
        w13, w2 = w13.mT, w2.mT
    if interleaved:
        w13 = torch.cat([w13[:, ::2], w13[:, 1::2]], 1)
        w13_bias = None if w13_bias is None else torch.cat([w13_bias[:, ::2], w13_bias[:, 1::2]], 1)
    return w13, w2, w13_bias


# ---- unpermute


def unpermute(rows: Tensor, slot_to_row: Tensor, topk_weights: Tensor) -> Tensor:
    """rows [P, H], slot_to_row [S], topk_weights [T, K] -> y [T, H]; an absent slot is skipped, never multiplied."""
    (T, K), P, acc = topk_weights.shape, rows.shape[0], acc_dtype(rows.dtype)
    row = slot_to_row.reshape(T, K).long()
    kept = (row >= 0) & (row < P)
    weights = torch.where(kept, topk_weights.to(acc), 0.0)
    picked = _with_zero_row(rows)[torch.where(kept, row, P)].to(acc)
    return (weights[:, :, None] * picked).sum(1).to(rows.dtype)


# ---- the layer


def moe_forward(
    x: Tensor, router_weight: Tensor, w13: Tensor, w2: Tensor, top_k: int, *, activation: str = "silu"
) -> Tensor:
    """The whole layer, stage by stage: x [T, H], router_weight [E, H], w13 [E, 2I, H], w2 [E, H, I] -> y [T, H]."""
    acc = acc_dtype(x.dtype)
    routing = route(x.to(acc) @ router_weight.to(acc).T, top_k)
    rows = permute(x, routing.topk_ids, len(w13))
    ends = rows.expert_offsets[1:]
    h = activate(grouped_gemm(rows.x_rows, w13.mT, ends), activation)
    y_rows = grouped_gemm(h, w2.mT, ends)
    return unpermute(y_rows, rows.slot_to_row, routing.topk_weights)

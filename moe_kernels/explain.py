# SPDX-License-Identifier: Apache-2.0
"""Which kernel an op will use for given sizes, and why not another: asked of the tables that the kernels act on."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import _build, auto_pack, check
from .fallback import PANEL, backend_of
from .schemas import SCHEMAS, allow_tf32


@dataclass(frozen=True)
class Explanation:
    """What runs, how, and which alternatives were refused.

    backend: "cpu avx512", or "reference" where there is no kernel. config: the choices that depend on the sizes.
    refused: (alternative, reason), in the order of the tables. fallback: whether the reference runs. asked: the call.
    """

    backend: str
    config: str
    refused: list[tuple[str, str]]
    fallback: bool
    asked: str = ""

    def __str__(self) -> str:
        lines = [f"{self.asked}: {self.backend}" + (" (a slow fallback)" if self.fallback else ""), f"  {self.config}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.refused])


class Sizes(NamedTuple):
    """The sizes and layout of one call, in the letters of the legend."""

    T: int
    H: int
    I: int
    E: int
    K: int
    bytes: int
    gated: bool
    transposed: bool


def explain(op: str, *, T: int, H: int, I: int, E: int, K: int, dtype: torch.dtype, device: str | torch.device,
            gated: bool = True, transposed: bool = False) -> Explanation:  # fmt: skip
    """Which kernel serves `op` at these sizes, with which configuration, and what was refused.

    Args:
        op: a public op (route, permute, grouped_gemm, unpermute, fused_experts, pack_experts ..), the `_backward` of
            one, or fused_experts_packed. grouped_gemm means the first product of the expert MLP, w13.mT.
        T, H, I, E, K: tokens, hidden size, expert width, experts, experts a token. The rows of an expert are taken to
            be T*K/E; what depends on them is decided expert by expert when the op runs.
        dtype: float64, float32, bfloat16 or float16, of inputs and weights.
        device: "cpu", "cuda", "cuda:1", or an architecture such as "sm_90". No device is touched.
        gated, transposed: the layout of the weights, as in `fused_experts`.
    Returns:
        Explanation(backend, config, refused, fallback, asked).

    Errors: TypeError, ValueError.
    """
    if op not in SCHEMAS:
        raise ValueError(f"explain: op must be one of {', '.join(SCHEMAS)}, got {op!r}")
    for name, value in (("T", T), ("H", H), ("I", I), ("E", E), ("K", K)):
        check.count("explain", name, value, 1)
    if op.startswith("route"):
        check.count("explain", "K", K, 1, E, "E=")
    if T * K > check.MAX_ROWS:
        check.refuse("explain", "T*K", f"at most {check.MAX_ROWS}", str(T * K))
    if dtype not in check.FLOATS:
        check.refuse("explain", "dtype", "float64, float32, bfloat16 or float16", str(dtype), TypeError)
    kind, name = _device(device)
    asked = f"{op} [T={T}, H={H}, I={I}, E={E}, K={K}] {str(dtype).removeprefix('torch.')} on {name}"
    backend, why = backend_of(op, kind)
    if backend == "reference":
        if kind == "cuda" and _build.ops_loaded and not _build.info()["cuda"]:
            why += f"; the library was built for the CPU only: {_build.cuda_route()}"
        return Explanation(backend, "plain PyTorch, moe_kernels.reference", [(f"{name} kernel", why)], True, asked)
    level, choices = _LEVEL_AND_CHOICES[kind]
    config, refused = choices(op, Sizes(T, H, I, E, K, dtype.itemsize, gated, transposed), name)
    return Explanation(f"{kind} {level(name)}", config, refused, False, asked)


def _device(device: str | torch.device) -> tuple[str, str]:
    """(torch's kind of device, what the caller called it)."""
    name = str(device).lower()
    if re.fullmatch(r"sm_\d+[af]?", name):
        return "cuda", name
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind in ("", "meta"):
        check.refuse("explain", "device", 'one that computes, such as "cpu", "cuda" or "sm_90"', repr(str(device)))
    return kind, name


# ---- the CPU: one table of panels for every product


class Product(NamedTuple):
    """A product with one weight: its strides between columns and along the contraction, its columns, its rows."""

    name: str
    row_stride: int
    col_stride: int
    columns: int
    rows: int
    halves: bool = False  # gate and up side by side


def _products(op: str, s: Sizes, token_block: int) -> list[Product]:
    """The products of an op whose way depends on sizes, for experts that get the same number of rows."""
    width = 2 * s.I if s.gated else s.I
    rows = math.ceil(s.T * s.K / s.E)
    block = math.ceil(min(s.T, token_block) * s.K / s.E)  # the combine takes so many tokens at a time
    w13, w2 = ((1, width), (1, s.H)) if s.transposed else ((s.H, 1), (s.I, 1))
    if op == "fused_experts":
        return [Product("x w13", *w13, width, rows, s.gated), Product("h w2", *w2, s.H, block)]
    if op == "fused_experts_packed":
        return [Product("x w13", 1, PANEL, width, rows, s.gated), Product("h w2", 1, PANEL, s.H, block)]
    if op == "fused_experts_backward":
        return [Product("grad_y w2", *w2[::-1], s.I, rows), Product("grad_h w13", *w13[::-1], s.H, block)]
    return [Product("a b", *w13, width, rows)] if op == "grouped_gemm" else []


def _cpu_choices(op: str, s: Sizes, _name: str) -> tuple[str, list[tuple[str, str]]]:
    try:
        host: Any = importlib.import_module(f"{__package__}._host")
    except ImportError as error:
        return f"not known: the host module could not be loaded: {error}", []
    said, refused = [], []
    for product in _products(op, s, host.token_block):
        name, row_stride, col_stride, columns, rows, halves = product
        padded = op == "fused_experts_packed"
        no, way, width, depth = host.panel_way(row_stride, col_stride, padded, s.bytes, columns, rows, halves)
        refused += [(f"{name} {other}", f"at {rows} rows an expert: {why}") for other, why in no]
        text = f"{name}: {way}, {width} columns" + (f" x {depth} deep" if depth else "")
        rest = columns % width if columns > width else 0
        if rest and (last := host.panel_way(row_stride, col_stride, padded, s.bytes, rest, rows, halves)[1]) != way:
            text += f", the last {rest}: {last}"
        said.append(text)
    if op == "fused_experts_backward":
        said.append("weight gradients: packed, 32 columns")
    elif op == "fused_experts":
        packs, why = auto_pack.explain(s.T, s.H, s.I, s.E, s.gated, s.transposed, s.bytes)
        said += [packs] if packs else []
        refused += [("packed copy of a layer", why)] if why else []
    return "; ".join(said) or "one way for every size", refused


def _cpu_level(_name: str) -> str:
    return str(_build.info()["isa"])


# ---- CUDA: the launcher cuts the tiles; the products of the expert MLP ask one table of them


def _cuda_choices(op: str, s: Sizes, name: str) -> tuple[str, list[tuple[str, str]]]:
    stage = op.removesuffix("_backward")
    if stage in ("fused_experts", "grouped_gemm"):
        return _cuda_products(op, s, name)
    cut = f"tiles by csrc/cuda/{stage}_tile.h" if stage in ("route", "permute") else "one way for every size"
    return f"csrc/cuda/{stage}.cuh, {cut}", []


def _cuda_products(op: str, s: Sizes, name: str) -> tuple[str, list[tuple[str, str]]]:
    try:
        host: Any = importlib.import_module(f"{__package__}._host")
    except ImportError as error:
        return f"csrc/cuda/{op}.cuh, not known: the host module could not be loaded: {error}", []
    width = 2 * s.I if s.gated else s.I
    products = [("x w13", width, s.H), ("h w2", s.H, s.I)]  # columns, length of the sum
    if op == "fused_experts_backward":
        products = [("grad_y w2", s.I, s.H), ("grad_h w13", s.H, width)]
    elif op.startswith("grouped_gemm"):
        products = [("a b", width, s.H)] if op == "grouped_gemm" else []
    dtype, said, refused = {8: 0, 4: 1, 2: 2}[s.bytes], [], []
    whole = s.H * s.bytes % 16 == 0 and s.I * s.bytes % 16 == 0
    tf32 = allow_tf32(torch.float32) and s.bytes == 4
    for product, columns, depth in products:
        no, row = host.cuda_product(_arch(name), s.E, s.T * s.K, columns, depth, dtype, whole, tf32)
        refused += [(f"{product} {other}", why) for other, why in no]
        said.append(f"{product}: {row}" + (" in tf32" if tf32 and row != "fma" else ""))
    hopper = "_sm90" if _arch(name) == 90 and s.bytes == 2 and whole else ""
    if op.endswith("_backward"):
        sizes = {"w13": (width, s.H), "w2": (s.H, s.I)} if op == "fused_experts_backward" else {"b": (s.H, width)}
        for weight, (N, K) in sizes.items():
            parts = host.cuda_wgrad_parts(_arch(name), s.E, s.T * s.K, N, K, dtype, whole, tf32)
            cut = f".cuh, an expert's rows in {parts} parts" if parts > 1 else f"{hopper}.cuh"
            said.append(f"gradient of {weight}: csrc/cuda/grouped_wgrad{cut}")
    elif op == "fused_experts" and host.few_tokens >= s.T:
        said.append(f"where nothing requires a gradient: csrc/cuda/decode{hopper}.cuh")
    stem = op.removesuffix("_backward") + ("_sm90" if op == "grouped_gemm" and "wgmma" in said[0] else "")
    return f"csrc/cuda/{stem}.cuh, {'; '.join(said)}", refused


def _arch(name: str) -> int:
    """90 of "sm_90a"; for "cuda" the newest architecture of this build, or of NVRTC the first device's."""
    if name.startswith("sm_"):
        return int(name.removeprefix("sm_").rstrip("af"))
    if _build.info()["nvrtc"] and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(torch.device(name))
        return 10 * major + minor
    built = re.findall(r"(\d+)\.(\d)", str(_build.info()["arch_list"]))
    return max((10 * int(major) + int(minor) for major, minor in built), default=80)


def _cuda_level(name: str) -> str:
    built = "NVRTC" if _build.info()["nvrtc"] else str(_build.info()["arch_list"])
    return name if name.startswith("sm_") else f"({built})"


Choices = Callable[[str, Sizes, str], tuple[str, list[tuple[str, str]]]]
# kind of device -> (the instruction set or architecture in use, the choices by size)
_LEVEL_AND_CHOICES: dict[str, tuple[Callable[[str], str], Choices]] = {
    "cpu": (_cpu_level, _cpu_choices),
    "cuda": (_cuda_level, _cuda_choices),
}

# SPDX-License-Identifier: Apache-2.0
"""What the MoE layers of a checkpoint are and which kernels will serve them, before a weight is loaded.

A config gives the layers (hf/config.py). With transformers installed the model is built without memory, which gives
every parameter and the very report that `replace` would print. The heads of safetensors files say what lies on disk.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import struct
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from . import hf, presets
from .explain import Explanation, explain
from .layers import Experts, MoELayer

TOKENS = (1, 512)  # decode and prefill
DTYPES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "F4": 0.5}  # of safetensors; others: 1
PLAIN = {"F64", "F32", "BF16", "F16"}  # what the kernels read


@dataclass(frozen=True)
class LayerRow:
    """MoE layers that are alike. Parameters are those of one layer."""

    layers: str
    count: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str
    gated: bool
    router: str
    expert_params: int
    router_params: int
    shared_params: int
    fused: bool
    """one fused_experts call; False: permute, grouped_gemm, a function of the model's own, grouped_gemm, unpermute"""

    def __str__(self) -> str:
        gate = " with a gate" if self.gated else ""
        text = (
            f"{self.layers} ({self.count}): {self.num_experts} experts, {self.top_k} a token, {self.hidden_size} -> "
            f"{self.intermediate_size} -> {self.hidden_size}, {self.activation}{gate}; {self.router}"
        )
        return f"{text}; shared experts of {short(self.shared_params)} parameters" if self.shared_params else text


@dataclass(frozen=True)
class Inspection:
    """The answer; `str()` is the table and `dataclasses.asdict()` the JSON. Sizes in bytes; None: not known."""

    source: str
    model: str
    dtype: str
    layers: list[LayerRow]
    total_params: int | None
    active_params: int | None
    experts_bytes: dict[str, int]
    """of all experts, in each dtype"""
    stored_bytes: dict[str, int]
    """of all experts as they lie on disk, by the dtype of safetensors"""
    taken: list[str]
    skipped: list[str]
    kernels: list[str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.model} ({self.source}), {self.dtype}", "MoE layers:"]
        lines += [f"  {row}" for row in self.layers] or ["  not known"]
        if self.experts_bytes:
            memory = ", ".join(f"{dtype} {gib(size)}" for dtype, size in self.experts_bytes.items())
            lines.append(f"Memory of all experts: {memory}")
        if self.stored_bytes:
            stored = ", ".join(f"{dtype} {gib(size)}" for dtype, size in self.stored_bytes.items())
            lines.append(f"Experts on disk: {stored}")
        if self.total_params is not None:
            active = "" if self.active_params is None else f", {short(self.active_params)} active for a token"
            lines.append(f"Parameters: {short(self.total_params)}{active}")
        sections = (("Taken over", self.taken), ("Not taken over", self.skipped), ("Kernels", self.kernels),
                    ("Notes", self.notes))  # fmt: skip
        for title, entries in sections:
            lines += [f"{title}:", *(f"  {line}" for entry in entries for line in entry.split("\n"))] if entries else []
        return "\n".join(lines)


def inspect(source: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Inspection:
    """What the MoE layers of a model are, what they take and which kernels serve them.

    Args:
        source: a folder with config.json (and perhaps safetensors files), a config.json, or the name of a preset.
        dtype: to run in; None: the config's, or bfloat16.
        device: as in `explain`.

    Errors: FileNotFoundError, ValueError: no such file or preset (lists the presets), no JSON, no MoE model.
    """
    if str(source) in presets.names():
        return _of_preset(str(source), dtype or torch.bfloat16, device)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"inspect: {path} is no file, and {str(source)!r} no preset: {', '.join(presets.names())}"
        )
    try:
        raw = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"inspect: {path} is no JSON: {error}") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ValueError(f"inspect: {path} must be a config with a model_type, got {sorted(raw)[:5] or 'nothing'}")
    return _of_config(path, raw, dtype, device)


def _of_preset(name: str, dtype: torch.dtype, device: str) -> Inspection:
    preset = presets.get(name)
    row = _row(preset.layer_kwargs(), f"{preset.num_moe_layers} of {preset.num_layers} layers", preset.num_moe_layers)
    how = f'MoELayer.from_preset("{name}")'
    return Inspection(
        preset.source, name, _name(dtype), [row], preset.total_params(), preset.active_params(), _memory([row]), {},
        [how], [], _kernels([row], dtype, device),
    )  # fmt: skip


def _of_config(path: Path, raw: dict[str, Any], dtype: torch.dtype | None, device: str) -> Inspection:
    notes: list[str] = []
    config = _config(path, raw, notes)
    rows: list[LayerRow] = []
    refusal = None
    try:
        rows = _rows(config)
    except ValueError as error:
        refusal = error
    model = _empty_model(config, raw, notes)
    survey = hf.ReplaceReport() if model is None else _survey(model)
    if refusal is not None and not (survey.taken or survey.skipped):
        raise refusal
    if refusal is not None:
        notes.append(str(refusal))
    stored, stored_total = _stored(path.parent)
    rows = _as_built(rows, survey, notes)
    taken, skipped = _lines(survey)
    quantised = sorted(set(stored) - PLAIN) or _quantisation(raw)
    if quantised:
        skipped.append(f"the experts are stored as {', '.join(quantised)}: quantised experts are not supported; load "
                       "the model dequantised for what is said here")  # fmt: skip
    total = stored_total if model is None else sum(p.numel() for p in model.parameters())
    idle = sum(row.count * (row.expert_params // row.num_experts) * (row.num_experts - row.top_k) for row in rows)
    dtype = dtype or _dtype(config, raw)
    return Inspection(
        str(path), (raw.get("architectures") or [raw["model_type"]])[0], _name(dtype), rows, total,
        total - idle if total is not None and rows else None, _memory(rows), stored, taken, skipped,
        _kernels(rows, dtype, device, _transposed(model)), notes,
    )  # fmt: skip


# ---- the layers of a config


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        return None


def _config(path: Path, raw: dict[str, Any], notes: list[str]) -> Any:
    """The config with the defaults of its class where transformers knows it, else as it is written."""
    transformers = _transformers()
    if transformers is None:
        notes.append("transformers is not installed: the model was not built, so its parameters and what replace() "
                     "would take are not known")  # fmt: skip
    else:
        try:
            return transformers.AutoConfig.from_pretrained(path)
        except Exception as error:
            notes.append(f"transformers does not know this config: {_first_line(error)}")
    return SimpleNamespace(**raw)


def _rows(config: Any) -> list[LayerRow]:
    """The MoE layers of a config, alike ones together. Errors: ValueError where it has none that we can describe."""
    read = importlib.import_module(f"{__package__}.hf.config")
    sparse, _ = read.moe_layers(*read.find(config))
    alike: dict[str, tuple[dict[str, Any], list[int]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a block's noise in training is not of interest here
        for i in sparse:
            arguments = read.layer_kwargs(config, i, device="meta")
            key = str({k: v for k, v in arguments.items() if k != "losses"})
            alike.setdefault(key, (arguments, []))[1].append(i)
    return [_row(arguments, f"layers {read.ranges(found)}", len(found)) for arguments, found in alike.values()]


def _row(arguments: dict[str, Any], where: str, count: int) -> LayerRow:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = MoELayer(**arguments, device="meta")
    experts, router = layer.experts, arguments["router"]
    fused = isinstance(experts, Experts)
    return LayerRow(
        where, count, arguments["num_experts"], arguments["top_k"], arguments["hidden_size"],
        arguments["intermediate_size"], arguments["activation"] if fused else "its own", arguments.get("gated", True),
        _router(router), _count(experts), _count(layer.router), _count(layer.shared_experts), fused,
    )  # fmt: skip


def _as_built(rows: list[LayerRow], report: hf.ReplaceReport, notes: list[str]) -> list[LayerRow]:
    """The rows corrected by the model itself: a decoder's layers too, and what replace() would really run."""
    entries = report.taken + report.skipped
    deep = [e for e in entries if ".decoder." in f".{e.name}"]
    if len(rows) == 1 and deep and len(deep) < len(entries):
        found = sorted(int(re.search(r"\.(\d+)\.", e.name)[1]) for e in deep)  # type: ignore[index]
        where = f"decoder layers {', '.join(map(str, found))}"
        encoder = dataclasses.replace(rows[0], layers=f"encoder {rows[0].layers}")
        rows = [encoder, dataclasses.replace(rows[0], layers=where, count=len(deep))]
    if report.taken:
        how = " ".join(e.how for e in report.taken)
        fused = re.search(r"fused_experts.*?\((\w+)\)", how)
        rows = [dataclasses.replace(row, fused=fused is not None, activation=fused[1] if fused else row.activation)
                for row in rows]  # fmt: skip
    if (more := len(entries) - sum(row.count for row in rows)) > 0 and rows:
        notes.append(f"{more} further mixtures of experts are not described, and count as active in full")
    return rows


def _router(router: Any) -> str:
    return repr(router) if dataclasses.is_dataclass(router) else f"router {type(router).__name__}"


def _count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


# ---- the model without its weights


def _empty_model(config: Any, raw: dict[str, Any], notes: list[str]) -> torch.nn.Module | None:
    """The model of a config with tensors that have no memory, or None with a note why not."""
    transformers = _transformers()
    if transformers is None or isinstance(config, SimpleNamespace):
        return None
    named = getattr(transformers, (raw.get("architectures") or [""])[0] or "?", None)
    autos = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModel")
    kinds = [
        getattr(transformers, name) for name in autos if type(config) in getattr(transformers, name)._model_mapping
    ]
    build = named._from_config if named is not None else kinds[0].from_config if kinds else None
    if build is None:
        notes.append(f"transformers has no model for {type(config).__name__}")
        return None
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with _no_memory():
            return build(config)  # type: ignore[no-any-return]
    except Exception as error:
        notes.append(f"the model could not be built from its config: {_first_line(error)}")
        return None
    finally:
        transformers.logging.set_verbosity(level)


def _no_memory() -> Any:
    """Unlike the meta device: what looks at a tensor's device sees the CPU, as it will once the weights are loaded."""
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    return fake.FakeTensorMode(allow_non_fake_inputs=True)


def _survey(model: torch.nn.Module) -> hf.ReplaceReport:
    with _no_memory():
        return hf.survey(model)


def _lines(report: hf.ReplaceReport) -> tuple[list[str], list[str]]:
    """The lines of the report that name layers: taken, skipped."""
    lines = [line.strip() for line in str(report).split("\n")[1:]]
    taken, skipped = ([line[len(word):].strip() for line in lines if line.startswith(word)]
                      for word in ("taken", "skipped"))  # fmt: skip
    return taken, skipped


# ---- what lies on disk


def _stored(folder: Path) -> tuple[dict[str, int], int | None]:
    """Bytes of the experts by dtype, and all parameters, from the heads of the safetensors files; no weight is read."""
    sizes: Counter[str] = Counter()
    total = 0
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        for name, tensor in _head(file).items():
            count = 1
            for size in tensor["shape"]:
                count *= size
            total += count
            if "experts" in name and "shared" not in name:
                sizes[tensor["dtype"]] += int(count * BYTES.get(tensor["dtype"], 1))
    return dict(sizes), total if files else None


def _head(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of length, then JSON. Errors: ValueError."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(100_000_000, file.stat().st_size):
            raise ValueError(f"inspect: {file} is no safetensors file, or was cut off: its head is {length} bytes long")
        try:
            head: dict[str, Any] = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"inspect: {file} is no safetensors file: {error}") from error
    head.pop("__metadata__", None)
    return head


def _quantisation(raw: dict[str, Any]) -> list[str]:
    found = raw.get("quantization_config") or {}
    return [str(found.get("quant_method") or "quantised")] if found else []


# ---- numbers


def _memory(rows: list[LayerRow]) -> dict[str, int]:
    count = sum(row.count * row.expert_params for row in rows)
    return {dtype: count * size for dtype, size in DTYPES.items()} if rows else {}


def _transposed(model: torch.nn.Module | None) -> bool:
    """Whether the model keeps its experts as [E, H, 2I] and [E, I, H]; the kernels read them where they lie."""
    for module in () if model is None else model.modules():
        up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
        if up is not None and down is not None and up.dim() == down.dim() == 3:
            return bool(getattr(module, "is_transposed", up.shape[1] == down.shape[2]))
    return False


def _kernels(rows: list[LayerRow], dtype: torch.dtype, device: str, transposed: bool = False) -> list[str]:
    """What explain() says of each kind of layer at each number of tokens."""
    found: dict[str, None] = {}
    for row in rows:
        for T in TOKENS:
            op = "fused_experts" if row.fused else "grouped_gemm"
            answer: Explanation = explain(
                op, T=T, H=row.hidden_size, I=row.intermediate_size, E=row.num_experts, K=row.top_k, dtype=dtype,
                device=device, gated=row.gated, transposed=transposed,
            )  # fmt: skip
            found[str(answer)] = None
    return list(found)


def _dtype(config: Any, raw: dict[str, Any]) -> torch.dtype:
    name = raw.get("dtype") or raw.get("torch_dtype") or getattr(config, "dtype", None)
    return getattr(torch, str(name).removeprefix("torch."), None) or torch.bfloat16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


def short(count: int) -> str:
    """46702792704 -> "46.70 B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2f} MiB"


def run(source: str, *, as_json: bool = False, dtype: str | None = None, device: str = "cpu") -> int:
    """The command line: prints the table or JSON; 1 and a sentence where there is nothing to show."""
    try:
        chosen = None if dtype is None else getattr(torch, dtype)
        found = inspect(source, dtype=chosen, device=device)
    except (OSError, ValueError, TypeError) as error:
        print(f"moe_kernels inspect: {error}")
        return 1
    print(json.dumps(dataclasses.asdict(found), indent=1) if as_json else found)
    return 0

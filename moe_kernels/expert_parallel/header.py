# SPDX-License-Identifier: Apache-2.0
"""The record that opens every exchange: what every rank tells every other before any row travels.

All ranks gather all records and judge them by the same rules in the same order, so they reach the same verdict: either
all go on, or all raise the same error. A record has the same length whatever a rank believes about the layer.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

from ..check import MAX_ROWS
from .faults import MoECommError

MAGIC, VERSION = 0x4D4F4531, 1
AGREED = ("magic", "version", "sequence", "phase", "layer", "transport", "experts", "hidden", "top_k", "dtype", "wire",
          "capacity", "grad_mode")  # fmt: skip
"""fields that must be the same everywhere; strings travel as their crc32"""
OWN = ("status", "tokens", "rows", "width", "needs", "text_size")
FIELDS = AGREED + OWN
TEXT = 20
"""int64 of text: why a rank failed"""
FIXED = len(FIELDS) + TEXT
PLACE = {name: at for at, name in enumerate(FIELDS)}

Value = int | str


def code(value: Value) -> int:
    return zlib.crc32(value.encode()) if isinstance(value, str) else int(value)


_PHASES = {
    code(name): name
    for name in ("plan", *(f"{what}{level}{way}" for what in ("dispatch", "combine") for level in ("", " rail", " node")
                           for way in ("", " backward")))
}  # fmt: skip


def encode(fields: dict[str, Value], counts: Sequence[int], text: str = "") -> list[int]:
    """One record: the fields (0 where none is given), the text, and the rows for every rank."""
    raw = text.encode()[: TEXT * 8]
    known = {"magic": MAGIC, "version": VERSION, "text_size": len(raw)} | fields
    padded = raw.ljust(TEXT * 8, b"\0")
    words = [int.from_bytes(padded[i : i + 8], "little", signed=True) for i in range(0, TEXT * 8, 8)]
    return [code(known.get(name, 0)) for name in FIELDS] + words + list(counts)


def field(record: Sequence[int], name: str) -> int:
    return record[PLACE[name]]


def counts(record: Sequence[int]) -> list[int]:
    return list(record[FIXED:])


def text(record: Sequence[int]) -> str:
    size = min(max(field(record, "text_size"), 0), TEXT * 8)
    raw = b"".join(word.to_bytes(8, "little", signed=True) for word in record[len(FIELDS) : FIXED])
    return raw[:size].decode(errors="replace")


def judge(records: Sequence[Sequence[int]], ranks: Sequence[int], phase: str) -> None:
    """Raises MoECommError about the first thing that is wrong, the same on every rank.

    Where ranks disagree, the one that differs from most is named; of two, the second.
    """
    for name in ("magic", "version"):
        _same(records, ranks, phase, name)
    for rank, record in zip(ranks, records):
        if field(record, "status"):
            raise MoECommError(rank, "error", _common(records, phase), text(record) or "it did not say why")
    for name in AGREED[2:]:
        _same(records, ranks, phase, name)
    for rank, record in zip(ranks, records):
        rows, sent = field(record, "rows"), counts(record)
        if not 0 <= rows <= MAX_ROWS or not 0 <= field(record, "tokens") <= MAX_ROWS:
            raise MoECommError(rank, "rows", phase, f"it has 0..{MAX_ROWS} rows, says {rows}")
        if not 0 <= field(record, "width") <= MAX_ROWS:
            raise MoECommError(rank, "width", phase, f"a token has no {field(record, 'width')} experts")
        if any(not 0 <= n <= rows for n in sent):
            wrong = next(n for n in sent if not 0 <= n <= rows)
            raise MoECommError(rank, "counts", phase, f"it sends a peer 0..rows={rows} rows, says {wrong}")
    for at, rank in enumerate(ranks):
        total = sum(counts(record)[at] for record in records)
        if total > MAX_ROWS:
            raise MoECommError(rank, "counts", phase, f"it can receive {MAX_ROWS} rows, is sent {total}")


def _common(records: Sequence[Sequence[int]], phase: str) -> str:
    """The phase that most of the ranks without an error are in: a rank that failed may not know it."""
    codes = [field(record, "phase") for record in records if not field(record, "status")]
    votes = Counter(codes or [code(phase)])
    return _PHASES.get(max(votes, key=lambda value: (votes[value], -codes.index(value) if codes else 0)), phase)


def _same(records: Sequence[Sequence[int]], ranks: Sequence[int], phase: str, name: str) -> None:
    values = [field(record, name) for record in records]
    if len(set(values)) == 1:
        return
    votes = Counter(values)
    usual = max(votes, key=lambda value: (votes[value], -values.index(value)))
    at = next(i for i, value in enumerate(values) if value != usual)
    raise MoECommError(ranks[at], name, phase, f"it has {values[at]}, rank {ranks[values.index(usual)]} has {usual}")

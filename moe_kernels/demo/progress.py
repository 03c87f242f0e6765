# SPDX-License-Identifier: Apache-2.0
"""Progress bars: tqdm where it is installed (transformers brings it) and a terminal is there, otherwise nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Sequence[Item], title: str) -> Iterator[Item]:
    """The items, with a bar on stderr."""
    bar = None
    with contextlib.suppress(ImportError):
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

        bar = tqdm(items, desc=f"   {title}", leave=False, disable=None, dynamic_ncols=True)
    yield from items if bar is None else bar

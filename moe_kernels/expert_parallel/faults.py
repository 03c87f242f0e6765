# SPDX-License-Identifier: Apache-2.0
"""`MoECommError`, and which exceptions of one rank every rank is told about."""

from __future__ import annotations

LOCAL_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
                ValueError)  # fmt: skip
"""what a rank reports to the others; the exception that ends a recomputation early is none of these"""


class MoECommError(RuntimeError):
    """An exchange between ranks could not be done. Every rank that lives raises it, naming the same rank.

    rank: the global rank that is the cause. field: what was wrong: the name of a header field or of an argument's
    owner ("error": it raised, "process": it ended, "heartbeat": it does not answer, "absent": it lives but did not
    come). phase: of the layer: "connect", "dispatch", "combine", "dispatch backward", "combine backward", ...
    """

    def __init__(self, rank: int, field: str, phase: str, detail: str = "") -> None:
        super().__init__(rank, field, phase, detail)
        self.rank, self.field, self.phase, self.detail = rank, field, phase, detail

    def __str__(self) -> str:
        return f"ExpertParallel: rank {self.rank}, {self.field}, in {self.phase}: {self.detail}"

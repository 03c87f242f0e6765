# SPDX-License-Identifier: Apache-2.0
"""Plants faults in kernel source: every barrier, fence, wait, parity, atomic and tail test, deleted or weakened.

A site is rewritten so that faults::on(number) chooses between what it says and what it should not: all faults of a file
are compiled together and chosen one at a time while the program runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Call = Callable[[list[str]], str]  # arguments -> what stands there instead

# Names whose call is a statement of its own, and what may go wrong with it besides being left out.
STATEMENTS: dict[str, dict[str, Call]] = {
    "__syncthreads": {},
    "__syncwarp": {},
    "__threadfence": {"narrow": lambda a: "__threadfence_block()"},
    "land": {},
    "bar_sync": {},
    "bar_arrive": {},
    "cp_async_commit_group": {},
    "cp_async_wait_all": {"weaken": lambda a: "cp_async_wait_group<1>()"},
    "mbarrier_init": {"miscount": lambda a: f"mbarrier_init({a[0]}, ({a[1]}) + 1)"},
    "mbarrier_arrive": {},
    "mbarrier_wait_parity": {"wrong parity": lambda a: f"mbarrier_wait_parity({a[0]}, ({a[1]}) ^ 1u)"},
    "cp_async_mbarrier_arrive_noinc": {"too early": lambda a: f"mbarrier_arrive({a[0]})"},
    "fence_mbarrier_init": {},
    "fence_proxy_async": {},
    "fence_proxy_async_global": {},
    "mbarrier_arrive_expect_tx": {"miscount": lambda a: f"mbarrier_arrive_expect_tx({a[0]}, ({a[1]}) + 16)"},
    "mbarrier_arrive_remote": {"wrong block": lambda a: f"mbarrier_arrive_remote({a[0]}, ({a[1]}) ^ 1u)"},
    "wgmma_fence": {},
    "wgmma_commit_group": {},
    "bulk_commit_group": {},
    "cluster_arrive": {},
    "cluster_wait": {},
    "griddepcontrol_wait": {},
    "griddepcontrol_launch_dependents": {},
    "st_release_gpu": {"relax": lambda a: f"st_relaxed_gpu({a[0]}, {a[1]})"},
}
# Calls that may stand in an expression, and what they may be mistaken for.
EXPRESSIONS: dict[str, dict[str, Call]] = {
    "atomicAdd": {"not atomic": lambda a: f"::moe::faults::plain_add({a[0]}, {a[1]})"},
    "atomicMin": {"not atomic": lambda a: f"::moe::faults::plain_min({a[0]}, {a[1]})"},
    "atomicMax": {"not atomic": lambda a: f"::moe::faults::plain_max({a[0]}, {a[1]})"},
    "ld_acquire_gpu": {"relax": lambda a: f"ld_relaxed_gpu({a[0]})"},
    "atom_add_acq_rel_gpu": {"relax": lambda a: f"atomicAdd({a[0]}, {a[1]})"},
    "mbarrier_test_wait_parity": {"wrong parity": lambda a: f"mbarrier_test_wait_parity({a[0]}, ({a[1]}) ^ 1u)"},
}
WAIT_GROUP = re.compile(r"\b((?:cp_async|wgmma|bulk)_wait_group(?:_read)?)<([^<>()]+|\([^()]*\))>\(\)")
# A tail test compares with something that bounds the data: a count, a size, an end, a field of the arguments.
BOUND = re.compile(
    r"(?<=[\w\])]) (<|>=) (?=(?:args\.[A-Z_a-z]+|tile\.\w+|count|counts?_|size|end|n|bins|steps|rounds|width|vectors|"
    r"tiles|warps?|tokens|head|slices|left|E|K|T|P|S|H|G|kDepth)\b(?!\(|::))"
)


@dataclass(frozen=True)
class Fault:
    number: int
    file: str
    line: int
    what: str  # "delete __syncthreads"
    text: str  # the line of source, stripped
    turn: int = 1  # counts those of the file that read the same

    @property
    def key(self) -> str:
        return f"{self.file} | {self.what} | {self.text}" + (f" #{self.turn}" if self.turn > 1 else "")

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.what}: {self.text}"


def arguments_at(text: str, start: int) -> tuple[list[str], int]:
    """The arguments of a call whose '(' stands at start, and the place behind its ')'."""
    depth, begin, found = 0, start + 1, []
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if depth == 0:
            last = text[begin:at].strip()
            return [*found, last] if last or found else [], at + 1
        if depth == 1 and text[at] == ",":
            found.append(text[begin:at].strip())
            begin = at + 1
    raise ValueError("unbalanced parentheses")


def code_lines(file: str, text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of the code in every line of a kernel: no comments, no declarations, no host code in a .cu."""
    at, in_kernel = 0, not file.endswith(".cu")
    for line in text.splitlines(keepends=True):
        code = line.split("//")[0]
        declares = code.lstrip().startswith(("#", "template", "constexpr", "MOE_DEVICE", "MOE_KERNEL", "static_assert"))
        if code.startswith(("MOE_KERNEL", "MOE_DEVICE")):
            in_kernel = True
        if in_kernel and not declares:
            yield at, at + len(code)
        if file.endswith(".cu") and code.startswith("}"):
            in_kernel = False
        at += len(line)


class Planter:
    """Rewrites one file. Numbers count from `first`."""

    def __init__(self, file: str, text: str, first: int) -> None:
        self.file, self.text, self.faults, self.next = file, text, list[Fault](), first
        self.edits: list[tuple[int, int, str]] = []

    def fault(self, at: int, what: str) -> str:
        line = self.text.count("\n", 0, at) + 1
        source = self.text.splitlines()[line - 1].strip()
        turn = 1 + sum((fault.what, fault.text) == (what, source) for fault in self.faults)
        self.faults.append(Fault(self.next, self.file, line, what, source, turn))
        self.next += 1
        return f"::moe::faults::on({self.next - 1})"

    def calls(self, begin: int, end: int) -> None:
        for name, others in [*STATEMENTS.items(), *EXPRESSIONS.items()]:
            for match in re.finditer(rf"(?<![\w.:]){name}\(", self.text[begin:end]):
                start = begin + match.start()
                arguments, stop = arguments_at(self.text, begin + match.end() - 1)
                call = self.text[start:stop]
                statement = name in STATEMENTS
                result = f"(void)({call})" if statement else call
                for what, other in others.items():
                    instead = f"(void)({other(arguments)})" if statement else other(arguments)
                    result = f"{self.fault(start, f'{what} {name}')} ? {instead} : {result}"
                if statement:
                    result = f"{self.fault(start, f'delete {name}')} ? (void)0 : {result}"
                self.edits.append((start, stop, f"({result})"))

    def waits(self, begin: int, end: int) -> None:
        for match in WAIT_GROUP.finditer(self.text, begin, end):
            weak = self.fault(match.start(), f"weaken {match[1]}")
            gone = self.fault(match.start(), f"delete {match[1]}")
            other = f"{match[1]}<({match[2]}) + 1>()"
            self.edits.append((*match.span(), f"({gone} ? (void)0 : {weak} ? {other} : {match[0]})"))

    def tails(self, begin: int, end: int) -> None:
        """i < n becomes i <= n, and i >= n becomes i > n."""
        for match in BOUND.finditer(self.text, begin, end):
            on = self.fault(match.start(), f"off by one {match[1]}")
            self.edits.append((*match.span(), f" {match[1]} {on} + "))

    def replace(self, what: str, old: str, new: str) -> None:
        """A fault written by hand: `old` stands in the file once."""
        if self.text.count(old) != 1:
            raise ValueError(f"{self.file}: {what}: the text stands there {self.text.count(old)} times: {old}")
        start = self.text.index(old)
        self.edits.append((start, start + len(old), f"({self.fault(start, what)} ? ({new}) : ({old}))"))

    def result(self) -> str:
        """The rewritten file."""
        text = self.text
        for begin, end, new in sorted(self.edits, reverse=True):
            text = text[:begin] + new + text[end:]
        return text


def plant(file: str, text: str, by_hand: list[tuple[str, str, str]], first: int) -> tuple[str, list[Fault]]:
    """The file with every fault in it, and what they are."""
    planter = Planter(file, text, first)
    for what, old, new in by_hand:
        planter.replace(what, old, new)
    for begin, end in code_lines(file, text):
        planter.calls(begin, end)
        planter.waits(begin, end)
        planter.tails(begin, end)
    kept, numbers = [], set[int]()
    for begin, end, new in planter.edits:  # of faults inside one another the outermost stays
        if any(b <= begin and end <= e and (begin, end) != (b, e) for b, e, _ in planter.edits):
            continue
        kept.append((begin, end, new))
        numbers |= {int(number) for number in re.findall(r"faults::on\((\d+)\)", new)}
    planter.edits = kept
    return planter.result(), [fault for fault in planter.faults if fault.number in numbers]

"""Reads SASS: the loops of a kernel over its logits, and what each of them executes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

Lines = list[tuple[int, str]]  # addresses and instructions


def read_code(sass: str) -> dict[str, Lines]:
    """The instructions of each function, with their addresses."""
    functions = {}
    for part in re.split(r"Function : ", sass)[1:]:
        name, _, body = part.partition("\n")
        functions[name.strip()] = [
            (int(match[1], 16), match[2])
            for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?;)", body)
        ]
    return functions


def _target(text: str, operations: str) -> int | None:
    """Where one of these operations may jump to."""
    match = re.search(rf"\b(?:{operations})\b.*\b0x([0-9a-f]+)\s*;", text)
    return int(match[1], 16) if match else None


def accessed_bytes(text: str, operation: str) -> int:
    """What an instruction loads or stores, if it is this operation; else 0."""
    match = re.search(rf"\b{operation}((?:\.\w+)*)\b", text)
    if match is None:
        return 0
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[word] for word in match[1].split(".") if word in sizes), 4)


@dataclass(frozen=True)
class Loop:
    """A loop that contains no other, from the target of its branch to the branch."""

    begin: int
    end: int
    body: tuple[str, ...]

    def __contains__(self, address: int) -> bool:
        return self.begin <= address <= self.end

    def accesses(self, operation: str) -> list[int]:
        """The size of each."""
        sizes = [accessed_bytes(text, operation) for text in self.body]
        return [size for size in sizes if size > 0]

    def bytes(self, operation: str) -> int:
        return sum(self.accesses(operation))

    @cached_property
    def kind(self) -> str:
        """What it does with logits: a key of ``COUNTED``; empty if it does something else."""
        has = {name for name in ("LDG", "STG", "LDS", "STS") if self.accesses(name)}
        if any("SHFL" in text for text in self.body):
            return ""
        return next((kind for kind, operations in KINDS.items() if operations == has), "")


# The operations of a loop of each kind, and of no other. What they do: units.cuh.
KINDS = {
    "load": {"LDG", "STS"},
    "sum": {"LDS", "STS"},
    "write": {"LDS", "STG"},
    "recompute": {"LDG", "STG"},
}
# The operation that moves every element once.
COUNTED = {"load": "LDG", "sum": "LDS", "write": "STG", "recompute": "STG"}


def innermost_loops(lines: Lines) -> list[Loop]:
    ranges = []
    for address, text in lines:
        target = _target(text, "BRA")
        if target is not None and target < address:
            ranges.append((target, address))
    return [
        Loop(begin, end, tuple(text for address, text in lines if begin <= address <= end))
        for begin, end in sorted(set(ranges))
        if not any(
            other != (begin, end) and begin <= other[0] and other[1] <= end for other in ranges
        )
    ]


def loops_over_logits(lines: Lines) -> dict[str, list[Loop]]:
    found: dict[str, list[Loop]] = {kind: [] for kind in KINDS}
    for loop in innermost_loops(lines):
        if loop.kind:
            found[loop.kind].append(loop)
    return found


def _successors(lines: Lines) -> dict[int, list[int]]:
    """Of each instruction. After a call both what is called and what is behind it: for sm_80, nvcc
    also jumps by a call with a predicate."""
    following = {}
    for (address, text), (after, _) in zip(lines, [*lines[1:], (None, "")], strict=True):
        leaves = re.match(r"(BRA\s+0x|EXIT\b|RET\b)", text) is not None
        nexts = [None if leaves else after, _target(text, r"BRA|CALL\.REL")]
        following[address] = [to for to in nexts if to is not None]
    return following


def shortest_round(lines: Lines, loops: list[Loop]) -> int:
    """The fewest instructions from the first loop through the others, in their order, and back to
    the first. Those of the loops themselves do not count."""
    first, *others = loops
    stops = [*others, first]
    following = _successors(lines)
    done = (-1, len(stops))

    def leave(loop: Loop, passed: int) -> set[tuple[int, int]]:
        exits = {to for at in following if at in loop for to in following[at] if to not in loop}
        return set().union(*(arrive(address, passed) for address in exits))

    def arrive(address: int, passed: int) -> set[tuple[int, int]]:
        if address not in stops[passed]:
            return {(address, passed)}
        return {done} if passed + 1 == len(stops) else leave(stops[passed], passed + 1)

    count, states = 0, leave(first, 0)
    seen = set(states)
    while done not in states:
        if not states:
            raise RuntimeError("no path leads through the loops and back")
        count += 1
        nexts = [arrive(to, passed) for at, passed in states for to in following[at]]
        states = set().union(*nexts) - seen
        seen |= states
    return count


@dataclass(frozen=True)
class PatchLoops:
    """Instructions of the two loops over classes of a patch of upsampled pixels."""

    sum: int
    gradient: int  # where no pixel has the class as its label
    label: int  # more, where one has


@dataclass(frozen=True)
class PatchCode:
    """The loops with exponentials that are kept in shared memory, and with those that are computed
    again."""

    pixels: int
    kept: PatchLoops
    again: PatchLoops


def patch_code(lines: Lines, pixels: int) -> PatchCode | None:
    """None without these loops, as of doubles. The gradient's alone shuffle, twice. Of those of the
    careful way, which are longer, there is one more."""
    found: dict[tuple[str, bool], list[Loop]] = {}
    for loop in innermost_loops(lines):
        exps, shuffles, stores, loads = (
            sum(word in text for text in loop.body) for word in ("MUFU.EX2", "SHFL", "STS", "LDS")
        )
        if exps == pixels and shuffles == 0:
            found.setdefault(("sum", stores > 0), []).append(loop)
        elif exps in (0, pixels) and shuffles == 2 and loads > 0:
            found.setdefault(("gradient", exps == 0), []).append(loop)
    if len(found) < 4:
        return None
    shortest = {key: min(loops, key=lambda loop: len(loop.body)) for key, loops in found.items()}
    of_kept, of_again = (
        _patch_loops(lines, shortest["sum", keeps], shortest["gradient", keeps])
        for keeps in (True, False)
    )
    return PatchCode(pixels, of_kept, of_again)


def _patch_loops(lines: Lines, summing: Loop, adding: Loop) -> PatchLoops:
    addresses = [address for address, _ in lines if address in adding]
    skipped = [
        sum(address < other < target for other in addresses)
        for address, text in zip(addresses, adding.body, strict=True)
        if (target := _target(text, "BRA")) is not None and target in adding
    ]
    label = max(skipped, default=0)
    return PatchLoops(len(summing.body), len(adding.body) - label, label)

"""What the tables of the benchmarks' pages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from measured import Measured


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def spread(case: Measured, rival: str) -> str:
    row = case.find(rival)
    return f"{number(row.ratio)} ±{number(row.iqr / 2)}" if row else ""


def shape_label(case: Measured) -> str:
    return str(case.shape)


def marked(case: Measured, rival: str) -> str:
    """The ratio; with a mark where the rival is faster."""
    ratio = case.over_ours(rival)
    text = spread(case, rival)
    return f"{text} **(slower)**" if ratio is not None and ratio < 1 else text


def markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def size_label(case: Measured) -> str:
    return f"{case.size}{', align_corners' if case.case.align_corners else ''}"


def variant(case: Measured) -> str:
    """What is unusual about a case."""
    first = case.case
    usual = ("contiguous", "int64", "mean", "forward+backward", "random")
    words = (first.layout, first.target_dtype, first.reduction, first.direction, first.labels)
    found = [word for word, default in zip(words, usual, strict=True) if word != default]
    return " ".join([*([f"to {size_label(case)}"] if case.size else []), *found])


@dataclass
class Score:
    """Writes the figures that have goals, and counts those that reach theirs."""

    reached: int = 0
    total: int = 0

    def cell(self, value: str, goal: float | None, is_reached: bool) -> str:
        if goal is None:
            return value
        self.reached, self.total = self.reached + is_reached, self.total + 1
        return f"**{value}** ({goal:g})" if is_reached else f"{value} ({goal:g})"

    def at_least(self, case: Measured, rival: str, goal: float) -> str:
        """The rival's time over ours."""
        ratio = case.over_ours(rival)
        return self.cell(spread(case, rival), goal, ratio is not None and ratio >= goal)

    def at_most(self, value: str, ratio: float | None, goal: float | None) -> str:
        is_reached = ratio is not None and goal is not None and ratio <= goal
        return self.cell(value, goal, is_reached)

    def table(self, header: list[str], lines: list[list[str]]) -> str:
        return f"{markdown(header, lines)}\n\n{self.reached} of {self.total} goals reached."

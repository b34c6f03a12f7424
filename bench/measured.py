"""The rivals of a case side by side, from the rows of a CSV file."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from results import TimeRow, parse_shape


class Measured:
    """The rivals of one case, by name (and threads, where those differ)."""

    def __init__(self, rows: Iterable[TimeRow]) -> None:
        self.rows = list(rows)
        self.case = self.rows[0]
        self.shape = parse_shape(self.case.shape)
        self.size = parse_shape(self.case.size)

    def find(self, rival: str, threads: int | None = None) -> TimeRow | None:
        wanted = (row for row in self.rows if row.rival == rival)
        return next((row for row in wanted if threads in (None, row.threads)), None)

    def over_ours(self, rival: str) -> float | None:
        row = self.find(rival)
        return row.ratio if row else None

    def ours_over(self, rival: str) -> float | None:
        ratio = self.over_ours(rival)
        return 1 / ratio if ratio else None


def group_cases(rows: list[TimeRow]) -> list[Measured]:
    def key(row: TimeRow) -> tuple[object, ...]:
        kind = (row.target_dtype, row.reduction, row.direction)
        upsampled = (row.size, row.align_corners, row.labels)
        return (row.section, row.shape, row.dtype, row.layout, *kind, *upsampled)

    return [Measured(group) for _, group in groupby(rows, key)]

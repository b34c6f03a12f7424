"""Logits of a lower resolution than their target: the cases, the goals and the tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from cases import Case, Shape
from measured import Measured
from tables import Score, number, shape_label, size_label, spread


class Goals(NamedTuple):
    """At least theirs / ours, in the order of RIVALS."""

    pytorch_ood: float
    cross_entropy: float
    unfused: float
    interpolate: float


RIVALS = ("ours", "pytorch-ood", "cross_entropy", "unfused", "interpolate")
# By the shape of the logits and the size of the target. (513, 513) has align_corners.
GOALS: dict[tuple[Shape, Shape], Goals] = {
    ((2, 19, 128, 128), (512, 512)): Goals(90, 40, 26, 25),
    ((1, 150, 128, 128), (512, 512)): Goals(110, 45, 30, 28),
    ((2, 19, 64, 64), (512, 512)): Goals(120, 55, 33, 32),
    ((8, 2, 64, 64), (256, 256)): Goals(25, 8, 5, 4),
    ((2, 19, 128, 256), (1024, 2048)): Goals(150, 55, 33, 32),
    ((1, 21, 65, 65), (513, 513)): Goals(30, 14, 9, 8),
}
# Other forms of the logits of the first of them, and the most that they may take over float32.
FORMS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "channels_last": {"layout": "channels_last"},
}
FORM_GOALS = {"bfloat16": 1.3, "float16": 1.3, "channels_last": None}


def all_cases() -> list[Case]:
    """Logits of a lower resolution than their target."""
    rivals = [
        Case("upsampled", shape, RIVALS, size=size, align_corners=size == (513, 513), budget=6.0)
        for shape, size in GOALS
    ]
    shape, size = next(iter(GOALS))
    forms = Case("upsampled forms", shape, ("ours",), size=size)

    def curve(section: str, *shape: int) -> Case:
        return Case(section, shape, ("ours", "unfused"), size=(512, 512), budget=1.0)

    return [
        *(
            replace(case, labels=labels)
            for case in [*rivals, forms]
            for labels in ("random", "blocks")
        ),
        *(curve("upsampled scales", 1, 19, 512 // n, 512 // n) for n in (2, 4, 8, 16)),
        *(curve("upsampled classes", 1, n, 128, 128) for n in (2, 5, 10, 19, 40, 80, 150)),
    ]


def label(case: Measured) -> list[str]:
    return [shape_label(case), size_label(case), case.case.labels]


def goal_table(cases: list[Measured]) -> str:
    score = Score()
    names = RIVALS[1:]
    lines = []
    for case in cases:
        goals = zip(names, GOALS[case.shape, case.size], strict=True)
        figures = [score.at_least(case, name, goal) for name, goal in goals]
        lines.append([*label(case), *figures, number(case.case.median_us / 1e3)])
    header = ["logits", "target", "labels", *(f"{name} / ours" for name in names), "ours, ms"]
    return score.table(header, lines)


def forms_table(cases: list[Measured]) -> str:
    score = Score()
    lines = [
        [
            *label(case),
            *(
                score.at_most(spread(case, name), case.over_ours(name), goal)
                for name, goal in FORM_GOALS.items()
            ),
        ]
        for case in cases
    ]
    floors = {"channels_last": "contiguous"}
    header = [f"{name} / {floors.get(name, 'float32')}" for name in FORM_GOALS]
    return score.table(["logits", "target", "labels", *header], lines)

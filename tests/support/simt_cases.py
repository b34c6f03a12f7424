"""Small cases that together take every way through the CUDA kernels and launchers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from inputs import IGNORE, LAYOUTS, make_logits, make_target
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    reduction: str = "mean"
    mix: str = "mixed"
    alpha: str = "number"  # "number", "zero", "one", "scalar", "rows"
    weighted: bool = False  # the classes have weights, some of them 0
    smoothing: float = 0.0  # of the labels
    upstream: float | None = None  # None: a random one for each row
    direct: bool = False  # the forward operator is asked for the gradient, also in float16
    retain: bool = False  # the graph: the backward computes the gradient again
    counts: tuple[float, float] | None = None  # what a mean divides by, where that is given
    parts: int = 1  # the classes are cut into so many parts, each with a call of its own
    offset: float = 0.0
    poison: bool = False  # NaN in ignored rows, -inf at a class that is nobody's label
    broken: bool = False  # NaN in inliers of the first class, which has a weight of 0 if weighted
    limits: dict[str, int] = field(default_factory=dict)
    reads_twice: bool = False  # a row does not fit the stage
    wide: bool = False  # all logits but those at the labels move 16 bytes at a time
    counted: bool = True

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += [self.layout, self.reduction, self.mix, f"alpha-{self.alpha}"]
        if self.upstream != 1.0:
            parts.append(f"upstream-{self.upstream}")
        flags = ("weighted", "direct", "retain", "poison", "broken")
        parts += [name for name in flags if getattr(self, name)]
        parts += [f"smoothing-{self.smoothing}"] if self.smoothing else []
        parts += [f"counts-{self.counts}"] if self.counts else []
        parts += [f"parts-{self.parts}"] if self.parts > 1 else []
        parts += [f"{name}-{value}" for name, value in self.limits.items()]
        return "-".join(parts)


def padded(x: Tensor) -> Tensor:
    """Rows as they are, in a wider matrix: every row is aligned, whatever the number of classes."""
    width = -(-x.shape[1] // 16) * 16 + 16
    out = torch.full((x.shape[0], width), float("nan"), dtype=x.dtype)[:, : x.shape[1]]
    return out.copy_(x)


def padded_transposed(x: Tensor) -> Tensor:
    """Aligned classes of a number of rows that fills no vector."""
    return padded(x.t()).t()


FAR = 2**31 + 16


def far(axis: int):
    """A layout whose last element along one axis is beyond 2**31 elements from the first.

    The memory between is never touched, so it is never there.
    """

    def make(x: Tensor) -> Tensor:
        strides = list(torch.empty(x.shape).stride())
        if x.dim() == 2 and axis == 1:
            strides[0] = 1
        strides[axis] = FAR
        last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        storage = torch.empty(last + 16, dtype=x.dtype)
        return storage.as_strided(x.shape, strides).copy_(x)

    return make


MAKE_LAYOUT = {
    **LAYOUTS,
    "padded": padded,
    "padded_transposed": padded_transposed,
    "far_rows": far(0),
    "far_classes": far(1),
}

WALKS = [
    # rows: a warp, several rows a warp, a row with classes that fill no vector, the block
    {"shape": (9, 64), "wide": True},
    {"shape": (21, 16), "wide": True},
    {"shape": (37, 10)},
    {"shape": (70, 2)},
    {"shape": (7, 150), "layout": "sliced"},
    {"shape": (6, 90), "layout": "strided", "counted": False},
    {"shape": (1, 7), "counted": False},
    {"shape": (1, 15), "counted": False},
    {"shape": (1, 67), "counted": False},
    {"shape": (3, 1040), "wide": True},
    {"shape": (2, 1061)},
    {"shape": (1, 1093), "counted": False},
    {"shape": (2, 5, 4, 6), "layout": "channels_last"},
    # pixels: 16 bytes at a time, one at a time, a matrix that is transposed
    {"shape": (2, 19, 8, 16), "wide": True},
    {"shape": (1, 21, 4, 24), "wide": True},
    {"shape": (2, 5, 3, 7)},
    {"shape": (45, 6), "layout": "transposed"},
    {"shape": (45, 6), "layout": "padded_transposed"},
    {"shape": (64, 18), "layout": "transposed", "wide": True},
]


# What changes inliers; the rest of a row's way through the kernels is the same.
OPTIONS = [{"weighted": True}, {"smoothing": 0.1}]


def cases_with_options() -> list[Case]:
    """In every kernel, with and without wide loads; the counts of the weights, too."""
    wide_rows, wide_pixels = (
        {"shape": (70, 16), "wide": True},
        {"shape": (2, 7, 8, 16), "wide": True},
    )
    narrow_rows, narrow_pixels = {"shape": (37, 10), "layout": "sliced"}, {"shape": (2, 5, 3, 7)}
    cases = []
    for walk in (wide_rows, wide_pixels, narrow_rows, narrow_pixels, {"shape": (3, 1040)}):
        for options in OPTIONS:
            # the gradient: in the forward, in the forward and then in the backward, in the latter
            cases.append(Case(**walk, **options, upstream=1.0))
            cases.append(Case(**walk, **options, upstream=0.3, reduction="group_mean"))
            cases.append(Case(**walk, **options, dtype=torch.bfloat16, reduction="none"))
    for walk in (wide_rows, wide_pixels):
        for options in OPTIONS:
            cases.append(Case(**walk, **options, upstream=0.3, dtype=torch.float64))
            cases.append(Case(**walk, **options, upstream=1.0, alpha="rows", reduction="sum"))
            cases.append(Case(**walk, **options, upstream=1.0, counts=(7.5, 4)))
            cases.append(
                Case(
                    **walk, **options, upstream=1.0, limits={"max_stage_bytes": 0}, reads_twice=True
                )
            )
        cases += [
            Case(**walk, smoothing=1.0, upstream=0.3),
            Case(**walk, weighted=True, smoothing=0.1, upstream=0.3),
            Case(**walk, weighted=True, poison=True, alpha="zero", upstream=1.0),
            Case(**walk, weighted=True, broken=True, upstream=1.0),
            Case(**walk, weighted=True, broken=True, reduction="none"),
        ]
    cases += [
        # more rows than one block counts; counts of 0; classes in parts
        Case((5000, 3), weighted=True, upstream=1.0, reduction="group_mean"),
        Case((300, 1), weighted=True, upstream=1.0, reduction="group_mean"),
        Case((37, 10), upstream=0.3, reduction="group_mean", counts=(0.0, 4.0)),
        Case((2, 5, 3, 7), upstream=1.0, counts=(0.0, 0.0)),
        Case((37, 10), smoothing=0.1, reduction="none", alpha="one", parts=3, counted=False),
        Case((2, 5, 3, 7), smoothing=0.1, reduction="none", alpha="one", parts=3, counted=False),
    ]
    return cases


def make_cases() -> list[Case]:
    cases = [
        Case(dtype=dtype, upstream=1.0, reduction=reduction, **walk)
        for dtype in DTYPES
        for walk, reduction in zip(WALKS, ["mean", "group_mean", "sum"] * 7, strict=False)
    ]
    cases += [Case(dtype=dtype, upstream=0.3, **walk) for dtype in DTYPES[:3] for walk in WALKS]
    # Where a gradient, which has no gaps, is aligned otherwise than the logits: wide, or nearly so,
    # in the forward alone.
    gaps = [((5, 67), "padded"), ((45, 6), "padded_transposed")]
    gaps += [((7, 150), "sliced"), ((6, 90), "strided")]
    cases += [
        Case(shape, dtype, layout, reduction="none", counted=False)
        for dtype in DTYPES
        for shape, layout in gaps
    ]
    # Autograd does not ask for this one.
    half = {"dtype": torch.float16, "upstream": 1.0, "direct": True}
    cases += [Case(**half, **walk) for walk in WALKS]
    rows, pixels = {"shape": (300, 16), "wide": True}, {"shape": (3, 6, 16, 20), "wide": True}
    for walk in (rows, pixels):
        few_blocks = {"max_blocks": 1}
        # strides of the grid
        cases.append(Case(**walk, upstream=1.0, limits=few_blocks))
        cases.append(Case(**walk, upstream=0.3, limits=few_blocks, reduction="group_mean"))
        cases.append(Case(**walk, reduction="none", limits=few_blocks))
        # nothing fits the stage: read twice
        cases.append(Case(**walk, upstream=1.0, limits={"max_stage_bytes": 0}, reads_twice=True))
        # the backward's ways
        cases.append(Case(**walk, upstream=0.3, reduction="mean"))
        cases.append(Case(**walk, upstream=0.3, retain=True))
        cases.append(Case(**walk, upstream=0.3, dtype=torch.float16))
        cases.append(Case(**walk, reduction="none", dtype=torch.bfloat16))
        cases.append(Case(**walk, reduction="none", mix="ignored"))
        cases.append(Case(**walk, upstream=1.0, mix="inliers"))
        cases.append(Case(**walk, upstream=1.0, mix="outliers", reduction="group_mean"))
        cases.append(Case(**walk, upstream=1.0, mix="ignored", reduction="sum"))
        for alpha in ("zero", "scalar", "rows"):
            cases.append(Case(**walk, upstream=1.0, alpha=alpha))
            cases.append(Case(**walk, alpha=alpha, reduction="none"))
        cases.append(Case(**walk, upstream=1.0, offset=1e4))
        cases.append(Case(**walk, upstream=1.0, poison=True, alpha="zero"))
        cases.append(Case(**walk, reduction="none", poison=True))
        # counts from outside; classes in parts
        cases += [
            Case(**walk, dtype=dtype, upstream=1.0, reduction=reduction, counts=(7.5, 4))
            for dtype in DTYPES[:2]
            for reduction in ("mean", "group_mean")
        ]
    cases += [
        Case(shape, dtype, reduction="none", alpha="one", parts=3, counted=False)
        for dtype in DTYPES[:2]
        for shape in [(37, 10), (9, 64), (5, 1100), (2, 5, 3, 7), (1, 48, 4, 8)]
    ]
    cases += [
        # more rows than one block counts
        Case((5000, 2), upstream=1.0, reduction="group_mean"),
        Case((1, 2, 70, 80), upstream=1.0, wide=True),
        Case((9000, 1), upstream=1.0, reduction="group_mean", limits={"max_blocks": 2}),
        # the stage shrinks the block, then gives up the width, then itself
        Case((1, 60, 4, 40), upstream=1.0, wide=True),
        Case((1, 150, 8, 10), upstream=1.0),
        Case((1, 400, 4, 8), upstream=1.0, wide=True, reads_twice=True),
        # a block walks rows, and strides; a long row
        Case((5, 1100), upstream=1.0, wide=True, limits={"max_blocks": 2}),
        Case((2, 17000), upstream=1.0, wide=True, reads_twice=True),
        Case((1, 17000), torch.float64, upstream=0.3, counted=False),
        Case((1, 1), upstream=1.0, counted=False),
        # offsets beyond 32 bits: rows, images, classes
        Case((2, 16), torch.bfloat16, "far_rows", mix="inliers", upstream=1.0, counted=False),
        Case((2, 16, 8), torch.bfloat16, "far_rows", mix="inliers", upstream=1.0, counted=False),
        Case((8, 2), torch.bfloat16, "far_classes", mix="inliers", upstream=1.0, counted=False),
        Case((0, 5), upstream=1.0, counted=False),
        Case((3, 5, 0), reduction="none", counted=False),
    ]
    return cases + cases_with_options()


def make_alpha(case: Case, target: Tensor) -> Any:
    numbers = {"number": 0.7, "zero": 0.0, "one": 1.0}
    if case.alpha in numbers:
        return numbers[case.alpha]
    if case.alpha == "scalar":
        return torch.tensor(0.7, requires_grad=True)
    alpha = torch.rand(target.shape)
    alpha[torch.rand(target.shape) < 0.3] = 0
    return alpha.requires_grad_()


def make_weight(case: Case) -> Tensor | None:
    """The weights of the classes."""
    num_classes = case.shape[1]
    weights = torch.tensor([0.0, 0.3, 7.1]).repeat(-(-num_classes // 3))[:num_classes]
    return weights.to(torch.promote_types(case.dtype, torch.float32)) if case.weighted else None


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Any]:
    torch.default_generator.manual_seed(1)
    logits = make_logits(case.shape, case.dtype, offset=case.offset)
    target = make_target(case.shape, case.mix)
    if case.poison:
        ignored = (target == IGNORE) | (target < 0 if case.alpha == "zero" else False)
        logits = logits.masked_fill(ignored.unsqueeze(1), float("nan"))
        unused = (target != 0) & (target >= 0)
        logits[:, 0] = logits[:, 0].masked_fill(unused, float("-inf"))
    if case.broken:
        logits = logits.masked_fill((target == 0).unsqueeze(1), float("nan"))
    return MAKE_LAYOUT[case.layout](logits), target, make_alpha(case, target)


CASES = make_cases()

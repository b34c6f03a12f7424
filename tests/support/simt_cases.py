"""Small cases that together take every way through the CUDA kernels and launchers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from inputs import DTYPES, IGNORE, LAYOUTS, make_logits, make_target
from simt_upsampled import make_upsampled_cases
from torch import Tensor


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
    forward: bool = False  # alone, without a gradient
    retain: bool = False  # the graph: the backward computes the gradient again
    counts: tuple[float, float] | None = None  # what a mean divides by, where that is given
    parts: int = 1  # the classes are cut into so many parts, each with a call of its own
    label_dtype: torch.dtype = torch.int64
    apart: bool = False  # the labels begin between two 16-byte boundaries
    offset: float = 0.0
    huge: float = 1.0  # the logits are that much larger
    poison: bool = False  # NaN in ignored rows, -inf at a class that is nobody's label
    broken: bool = False  # NaN in inliers of the first class, which has a weight of 0 if weighted
    limits: dict[str, int] = field(default_factory=dict)
    reads_twice: bool = False  # a row does not fit the stage
    # The size of the target, where the logits are upsampled to it; `shape` is the logits'.
    size: tuple[int, int] | None = None
    align_corners: bool = False
    statistics: bool = False  # are asked for
    blocks: bool = False  # neighbouring labels are equal
    steep: float = 0.0  # what the largest logits of neighbouring elements differ by
    # All logits move 16 bytes at a time, but those at both ends of a row that is no multiple of it.
    wide: bool = False
    counted: bool = True

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        if self.size is not None:
            parts[:1] += ["to", "x".join(map(str, self.size))]
        parts += [self.layout, self.reduction, self.mix, f"alpha-{self.alpha}"]
        if self.upstream != 1.0:
            parts.append(f"upstream-{self.upstream}")
        flags = ("weighted", "direct", "forward", "retain", "poison", "broken", "apart")
        flags += ("align_corners", "statistics", "blocks")
        parts += [name for name in flags if getattr(self, name)]
        parts += [f"smoothing-{self.smoothing}"] if self.smoothing else []
        parts += [f"counts-{self.counts}"] if self.counts else []
        parts += [f"parts-{self.parts}"] if self.parts > 1 else []
        parts += [f"huge-{self.huge}"] if self.huge != 1 else []
        parts += [f"steep-{self.steep}"] if self.steep else []
        parts += [f"offset-{self.offset}"] if self.offset else []
        parts += [str(self.label_dtype)] if self.label_dtype != torch.int64 else []
        parts += [f"{name}-{value}" for name, value in self.limits.items()]
        return "-".join(parts)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of the logits that have a label each."""
        return self.shape if self.size is None else (*self.shape[:2], *self.size)


def padded(x: Tensor) -> Tensor:
    """Rows as they are, in a wider matrix: every row is aligned, whatever the number of classes."""
    width = -(-x.shape[1] // 16) * 16 + 16
    out = torch.full((x.shape[0], width), float("nan"), dtype=x.dtype)[:, : x.shape[1]]
    return out.copy_(x)


def padded_transposed(x: Tensor) -> Tensor:
    """Aligned classes of a number of rows that fills no vector."""
    return padded(x.t()).t()


def shifted(x: Tensor) -> Tensor:
    """Contiguous, but from an address between two 16-byte boundaries."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


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
    "shifted": shifted,
    "far_rows": far(0),
    "far_classes": far(1),
}

WALKS = [
    # rows: a warp, several rows a warp, a row with classes that fill no vector, the block
    {"shape": (5, 1000), "wide": True},
    {"shape": (21, 64), "wide": True},
    {"shape": (37, 10)},
    {"shape": (70, 2)},
    {"shape": (7, 150), "layout": "sliced"},
    {"shape": (6, 90), "layout": "strided", "counted": False},
    {"shape": (1, 7), "counted": False},
    {"shape": (1, 15), "counted": False},
    {"shape": (6, 75), "wide": True},
    {"shape": (3, 1040), "wide": True},
    {"shape": (2, 1031), "wide": True},
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


def without_stage(walk: dict[str, Any]) -> dict[str, Any]:
    """The stage holds a part of a row, which is read twice. Pixels give up their width."""
    wide = len(walk["shape"]) == 2
    return {**walk, "wide": wide, "limits": {"max_stage_bytes": 0}, "reads_twice": True}


def cases_with_options() -> list[Case]:
    """In every kernel, with and without wide loads; the counts of the weights, too."""
    wide_rows, wide_pixels = (
        {"shape": (70, 64), "wide": True},
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
            cases.append(Case(**without_stage(walk), **options, upstream=1.0))
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
        # a mean without a gradient
        *(
            Case((rows, 3), dtype, weighted=True, upstream=1.0, forward=True)
            for rows in (40, 5000)
            for dtype in DTYPES
        ),
        Case((37, 10), upstream=0.3, reduction="group_mean", counts=(0.0, 4.0)),
        Case((2, 5, 3, 7), upstream=1.0, counts=(0.0, 0.0)),
        Case((37, 10), smoothing=0.1, reduction="none", alpha="one", parts=3, counted=False),
        Case((2, 5, 3, 7), smoothing=0.1, reduction="none", alpha="one", parts=3, counted=False),
    ]
    return cases


def cases_of_every_dtype() -> list[Case]:
    """Ways that differ by the width of loads alone."""
    cases = []
    no_stage, one_block = {"max_stage_bytes": 0}, {"max_blocks": 1}
    for dtype in DTYPES:
        unit = {"dtype": dtype, "upstream": 1.0, "direct": dtype == torch.float16}
        cases += [
            Case((2500, 2), **unit),
            Case((150, 64), limits=one_block, wide=True, **unit),
            Case((300, 3), limits=one_block, **unit),
            Case((2, 1000), layout="strided", counted=False, **unit),
            Case((2, 1000), dtype, "strided", reduction="none", counted=False),
            Case((2, 700), layout="strided", limits=no_stage, reads_twice=True, **unit),
            Case((1, 40, 4, 8), limits=no_stage, reads_twice=True, **unit),
            Case((20, 300), limits=no_stage, reads_twice=True, wide=True, **unit),
        ]
        for shape in [(1, 5, 8, 16), (2, 5, 3, 7)]:
            cases.append(Case(shape, poison=True, alpha="zero", **unit))
            cases.append(Case(shape, mix="ignored", **unit))
            cases.append(Case(shape, dtype, mix="ignored", reduction="none"))
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
    gaps += [((5, 128), "shifted"), ((1, 5, 4, 8), "shifted")]
    cases += [
        Case(shape, dtype, layout, reduction=reduction, upstream=upstream, counted=False)
        for dtype in DTYPES
        for shape, layout in gaps
        for reduction, upstream in (("none", None), ("mean", 1.0))
    ]
    # Autograd does not ask for this one.
    half = {"dtype": torch.float16, "upstream": 1.0, "direct": True}
    cases += [Case(**half, **walk) for walk in WALKS]
    rows, pixels = {"shape": (150, 64), "wide": True}, {"shape": (3, 6, 16, 20), "wide": True}
    for walk in (rows, pixels):
        few_blocks = {"max_blocks": 1}
        # strides of the grid
        cases.append(Case(**walk, upstream=1.0, limits=few_blocks))
        cases.append(Case(**walk, upstream=0.3, limits=few_blocks, reduction="group_mean"))
        cases.append(Case(**walk, reduction="none", limits=few_blocks))
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
        # more rows than one block counts, or than each counts for itself
        Case((5000, 2), upstream=1.0, reduction="group_mean"),
        Case((1, 2, 70, 80), upstream=1.0, wide=True),
        Case((2049, 1), upstream=1.0, reduction="group_mean", limits={"max_blocks": 2}),
        Case((2048, 1), upstream=1.0, reduction="group_mean", limits={"max_blocks": 2}),
        # the stage costs pixels their width, then shrinks the block, then holds a part of a row
        Case((1, 55, 4, 40), upstream=1.0, wide=True),
        Case((1, 56, 4, 40), upstream=1.0),
        Case((1, 150, 8, 10), upstream=1.0),
        Case((1, 600, 4, 8), upstream=1.0),
        Case((1, 1900, 4, 4), upstream=1.0, reads_twice=True),
        # a block walks rows, and strides; a long row
        Case((5, 1100), upstream=1.0, wide=True, limits={"max_blocks": 2}),
        Case((2, 17001), upstream=1.0, wide=True),
        Case((1, 50000), torch.bfloat16, upstream=1.0, wide=True),
        Case((1, 60000), torch.bfloat16, upstream=1.0, wide=True, reads_twice=True),
        Case((1, 17000), torch.float64, upstream=0.3, counted=False),
        Case((1, 1), upstream=1.0, counted=False),
        # the stage has room for exactly a row, and for a byte less
        Case((3, 1100), upstream=1.0, wide=True, limits={"max_stage_bytes": 8192}),
        Case(
            (3, 1100), upstream=1.0, wide=True, limits={"max_stage_bytes": 8191}, reads_twice=True
        ),
        # parts of rows, without a gradient
        *(
            Case(shape, dtype, reduction="none", wide=True)
            for dtype in DTYPES
            for shape in [(1, 40, 4, 8), (2, 9001)]
        ),
        # logits whose sum would overflow; lanes without a logit, far below the others' maximum
        *(Case(shape, huge=1e35, upstream=1.0) for shape in [(4, 1100), (1, 1100, 4, 4)]),
        Case((3, 75), torch.bfloat16, huge=1e35, mix="outliers", upstream=1.0),
        # labels of every width, at any address
        *(
            Case((rows, 2), label_dtype=dtype, apart=apart, upstream=1.0, reduction="group_mean")
            for rows in (45, 2500)
            for dtype in (torch.int8, torch.int16, torch.int32)
            for apart in (False, True)
        ),
        # offsets beyond 32 bits: rows, images, classes
        Case((2, 16), torch.bfloat16, "far_rows", mix="inliers", upstream=1.0, counted=False),
        Case((2, 16, 8), torch.bfloat16, "far_rows", mix="inliers", upstream=1.0, counted=False),
        Case((8, 2), torch.bfloat16, "far_classes", mix="inliers", upstream=1.0, counted=False),
        Case((0, 5), upstream=1.0, counted=False),
        Case((3, 5, 0), reduction="none", counted=False),
    ]
    cases += cases_of_every_dtype() + cases_with_options()
    return cases + [Case(**arguments) for arguments in make_upsampled_cases()]


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


def make_map(case: Case, logits: Tensor, target: Tensor) -> None:
    """What is special of upsampled logits, in place."""
    height, width = (-(-size // of) for size, of in zip(case.size, case.shape[2:], strict=True))
    if case.blocks:
        first = target[:, ::height, ::width]
        blocks = first.repeat_interleave(height, 1).repeat_interleave(width, 2)
        target.copy_(blocks[:, : case.size[0], : case.size[1]])
    if case.steep:
        # In turn one class and another is the largest: halfway, both are far below.
        is_odd = torch.arange(logits[0, 0].numel()).view(case.shape[2:]) % 2 == 1
        logits[:, 0] += torch.where(is_odd, 2 * case.steep, 0.0)
        logits[:, 1] += torch.where(is_odd, 0.0, 2 * case.steep)
        logits[:, 2:] -= 2 * case.steep
    if case.poison:
        # Every pixel that has a part of an element that is NaN is ignored. A class that is no
        # label, nor an outlier's, near another element is -inf there.
        target[:, : 2 * height, : 2 * width] = IGNORE
        logits[:, :, 0, 0] = float("nan")
        target[:, -2 * height :, -2 * width :] = 1
        target[:, : 2 * height, : 2 * width] = IGNORE
        logits[:, 0, -1, -1] = float("-inf")


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Any]:
    torch.default_generator.manual_seed(1)
    logits = make_logits(case.shape, case.dtype, offset=case.offset) * case.huge
    target = make_target(case.full_shape, case.mix).to(case.label_dtype)
    if case.size is not None:
        make_map(case, logits, target)
    elif case.poison:
        ignored = (target == IGNORE) | (target < 0 if case.alpha == "zero" else False)
        logits = logits.masked_fill(ignored.unsqueeze(1), float("nan"))
        unused = (target != 0) & (target >= 0)
        logits[:, 0] = logits[:, 0].masked_fill(unused, float("-inf"))
    if case.broken:
        logits = logits.masked_fill((target == 0).unsqueeze(1), float("nan"))
    if case.apart:
        target = torch.cat([target[:1], target])[1:]
    return MAKE_LAYOUT[case.layout](logits), target, make_alpha(case, target)


CASES = make_cases()

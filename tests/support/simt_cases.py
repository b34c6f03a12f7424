"""Small cases that together take every way through the CUDA kernels and launchers, and the checks
that each must pass. The real kernels pass all of them under many schedules; each deliberately wrong
copy of them must fail one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import simt_device
import torch
from inputs import IGNORE, LAYOUTS, make_logits, make_target
from torch import Tensor

from oe_ext import outlier_exposure_loss, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Errors allowed relative to the largest value: a few roundings of the arithmetic, then the one of
# the gradient's own dtype.
ARITHMETIC = {torch.float64: 2e-15, torch.float32: 4e-7}
STORED = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class CheckError(AssertionError):
    """What a check found: which one, and what."""

    def __init__(self, check: str, what: str):
        super().__init__(f"{check}: {what}")
        self.check = check


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    reduction: str = "mean"
    mix: str = "mixed"
    alpha: str = "number"  # "number", "zero", "scalar", "rows"
    upstream: float | None = None  # None: a random one for each row
    direct: bool = False  # the forward operator is asked for the gradient, also in float16
    retain: bool = False  # the graph: the backward computes the gradient again
    offset: float = 0.0
    poison: bool = False  # NaN in ignored rows, -inf at a class that is nobody's label
    limits: dict[str, int] = field(default_factory=dict)
    reads_twice: bool = False  # a row does not fit the stage
    wide: bool = False  # all logits but those at the labels move 16 bytes at a time
    counted: bool = True

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        parts += [self.layout, self.reduction, self.mix, f"alpha-{self.alpha}"]
        if self.upstream != 1.0:
            parts.append(f"upstream-{self.upstream}")
        parts += [name for name in ("direct", "retain", "poison") if getattr(self, name)]
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
    return cases


def make_alpha(case: Case, target: Tensor) -> Any:
    if case.alpha in ("number", "zero"):
        return 0.7 if case.alpha == "number" else 0.0
    if case.alpha == "scalar":
        return torch.tensor(0.7, requires_grad=True)
    alpha = torch.rand(target.shape)
    alpha[torch.rand(target.shape) < 0.3] = 0
    return alpha.requires_grad_()


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Any]:
    torch.default_generator.manual_seed(1)
    logits = make_logits(case.shape, case.dtype, offset=case.offset)
    target = make_target(case.shape, case.mix)
    if case.poison:
        ignored = (target == IGNORE) | (target < 0 if case.alpha == "zero" else False)
        logits = logits.masked_fill(ignored.unsqueeze(1), float("nan"))
        unused = (target != 0) & (target >= 0)
        logits[:, 0] = logits[:, 0].masked_fill(unused, float("-inf"))
    return MAKE_LAYOUT[case.layout](logits), target, make_alpha(case, target)


def compare(check: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    actual, expected = actual.double(), expected.double()
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        raise CheckError(check, "not finite where it should be, or the reverse")
    finite = expected.isfinite()
    if not torch.equal(actual[~finite].isnan(), expected[~finite].isnan()):
        raise CheckError(check, "inf and NaN are not where they should be")
    actual, expected = actual[finite], expected[finite]
    if actual.numel() == 0:
        return
    scale = expected.abs().max().item() if check != "value" else max(1.0, expected.abs().max())
    error = (actual - expected).abs().max().item()
    if error > tolerance * scale:
        raise CheckError(check, f"off by {error:.2e}, allowed {tolerance * scale:.2e}")


def allowed_passes(case: Case) -> int:
    """How often all logits, or their gradients, may be read or written."""
    if case.reduction == "none" or (case.dtype == torch.float16 and not case.direct):
        return 3
    again = 2 if case.upstream != 1.0 or case.retain else 0
    return 2 + again + case.reads_twice


def check_traffic(case: Case, launches: list[dict[str, Any]], logits: Tensor) -> None:
    """How many launches and passes there are, and how their accesses coalesce."""
    if len(launches) > 4:
        raise CheckError("launches", f"{len(launches)} of them: {[r['kernel'] for r in launches]}")
    if not case.counted:
        return
    moved = [r[kind] for r in launches for kind in ("reads", "writes")]
    of_logits = [m[name] for m in moved for name in ("logits", "grad_logits") if name in m]
    # Beside its passes, a forward reads each row's logit at the label once more.
    budget = allowed_passes(case) * logits.nbytes + logits.nbytes / case.shape[1]
    total = sum(traffic["bytes"] for traffic in of_logits)
    if total > budget:
        raise CheckError(
            "passes", f"{total / logits.nbytes:.3f}, budget {budget / logits.nbytes:.3f}"
        )
    if case.wide:
        narrow = total - sum(traffic["wide_bytes"] for traffic in of_logits)
        if narrow > logits.nbytes / case.shape[1]:
            raise CheckError("width", f"{narrow} bytes were not moved 16 at a time")
        for name in ("logits", "grad_logits"):
            traffic = [m[name] for m in moved if name in m]
            wide_sectors = sum(t["sectors"] for t in traffic)
            least = sum(t["bytes"] for t in traffic) / 32
            # Each single logit at a label is a sector of its own.
            if wide_sectors > 1.35 * least + logits.numel() / case.shape[1] + 8:
                raise CheckError("sectors", f"{name}: {wide_sectors} where {least:.0f} would do")


@dataclass(frozen=True)
class Result:
    loss: Tensor
    grads: tuple[Tensor, ...]  # of the logits, and of alpha where it is a tensor
    launches: list[dict[str, Any]]


def _options(case: Case) -> dict[str, Any]:
    return {"reduction": case.reduction, "ignore_index": IGNORE}


def _weight(case: Case, target: Tensor) -> Tensor:
    """The upstream gradient."""
    torch.default_generator.manual_seed(2)
    weight = torch.rand(target.shape) if case.upstream is None else torch.tensor(case.upstream)
    return weight.to(torch.promote_types(case.dtype, torch.float32))


def execute(case: Case, seed: int, *, counting: bool = False) -> Result:
    """Runs the kernels under one schedule; what the harness finds is an error."""
    logits, target, alpha = make_inputs(case)
    weight = _weight(case, target)
    leaves = [logits.detach().requires_grad_()]
    if isinstance(alpha, Tensor):
        leaves.append(alpha)
    simt_device.load()
    simt_device.set_seed(seed)
    ops = torch.ops.oe_ext
    try:
        with (
            simt_device.limits(**case.limits),
            simt_device.active(),
            simt_device.counting(counting) as launches,
        ):
            if case.direct:
                options = (alpha, None, case.reduction, IGNORE, None)
                loss, _, *statistics, grad = ops._outlier_exposure_loss_forward(
                    logits, target, *options, True
                )
                ops._outlier_exposure_loss_backward_from_unit(
                    grad, weight, logits, target, *statistics, *options
                )
                grads = (grad,)
            else:
                loss = outlier_exposure_loss(leaves[0], target, alpha, **_options(case))
                grads = torch.autograd.grad(loss, leaves, weight, retain_graph=case.retain)
    except RuntimeError as error:
        raise CheckError("harness", str(error).split("\n")[0]) from error
    return Result(loss.detach(), grads, launches)


@cache
def truth(number: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and the gradients of a case in float64, from the reference."""
    case = CASES[number]
    logits, target, alpha = make_inputs(case)
    logits = logits.double().requires_grad_()
    leaves = [logits]
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().double().requires_grad_()
        leaves.append(alpha)
    loss = reference.outlier_exposure_loss(logits, target, alpha, **_options(case))
    return loss.detach(), torch.autograd.grad(loss, leaves, _weight(case, target).double())


def run(number: int, seed: int) -> Result:
    """Runs a case under one schedule and checks all that is promised of it."""
    case = CASES[number]
    result = execute(case, seed, counting=True)
    true_loss, true_grads = truth(number)
    arithmetic = ARITHMETIC[result.loss.dtype] * (1 + abs(case.offset) * 0.05)
    compare("value", result.loss, true_loss, arithmetic)
    compare("gradient", result.grads[0], true_grads[0], 2 * arithmetic + STORED[case.dtype])
    for actual, expected in zip(result.grads[1:], true_grads[1:], strict=True):
        compare("alpha gradient", actual, expected, 4 * arithmetic)
    check_traffic(case, result.launches, make_inputs(case)[0])
    return result


CASES = make_cases()

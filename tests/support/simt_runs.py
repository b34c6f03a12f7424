"""Runs the cases of simt_cases.py and checks what is promised of each.

The real kernels pass under many schedules; each deliberately wrong copy of them must fail one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import simt_device
import torch
import torch.nn.functional as F
from inputs import IGNORE
from simt_cases import CASES, Case, make_inputs, make_weight
from torch import Tensor

from oe_ext import outlier_exposure_loss, reference

# Errors allowed relative to the largest value: a few roundings of the arithmetic, then the one of
# the gradient's own dtype.
ARITHMETIC = {torch.float64: 2e-15, torch.float32: 4e-7}
STORED = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class CheckError(AssertionError):
    """What a check found: which one, and what."""

    def __init__(self, check: str, what: str):
        super().__init__(f"{check}: {what}")
        self.check = check


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
    if case.forward:
        return 1
    if case.reduction == "none" or (case.dtype == torch.float16 and not case.direct):
        return 3
    again = 2 if case.upstream != 1.0 or case.retain else 0
    return 2 + again + case.reads_twice


def check_traffic(case: Case, launches: list[dict[str, Any]], logits: Tensor) -> None:
    """How many launches and passes there are, and how their accesses coalesce."""
    if len(launches) > 4 * case.parts:
        raise CheckError("launches", f"{len(launches)} of them: {[r['kernel'] for r in launches]}")
    if not case.counted:
        return
    if case.size is not None:
        check_traffic_of_map(case, launches, logits)
        return
    moved = [r[kind] for r in launches for kind in ("reads", "writes")]
    of_logits = [m[name] for m in moved for name in ("logits", "grad_logits") if name in m]
    budget = allowed_passes(case) * logits.nbytes
    total = sum(traffic["bytes"] for traffic in of_logits)
    if total > budget:
        raise CheckError(
            "passes", f"{total / logits.nbytes:.3f}, budget {budget / logits.nbytes:.3f}"
        )
    if case.wide:
        narrow = total - sum(traffic["wide_bytes"] for traffic in of_logits)
        unit = 16 // logits.element_size()
        at_ends = 2 * (unit - 1) if case.shape[1] % unit else 0
        rows = logits.numel() / case.shape[1]
        if narrow > rows * at_ends * logits.element_size() * allowed_passes(case):
            raise CheckError("width", f"{narrow} bytes were not moved 16 at a time")
        for name in ("logits", "grad_logits"):
            traffic = [m[name] for m in moved if name in m]
            wide_sectors = sum(t["sectors"] for t in traffic)
            least = sum(t["bytes"] for t in traffic) / 32
            # Each end of a row may be a sector of its own.
            if wide_sectors > 1.35 * least + rows * 2 * bool(at_ends) + 8:
                raise CheckError("sectors", f"{name}: {wide_sectors} where {least:.0f} would do")


def check_traffic_of_map(case: Case, launches: list[dict[str, Any]], logits: Tensor) -> None:
    """The gradient is written once, but for a row of each band but the first, which is also read;
    and of what has the target's size, nothing moves but what the caller gave or asked for."""
    acc_size = 8 if case.dtype == torch.float64 else 4
    gradient_bytes = logits.numel() * acc_size
    height = case.shape[2]
    of_shared_rows = gradient_bytes * (height // 4) / height  # bands of 4 cells or more
    kernels = 1 if case.forward or case.reduction != "none" else 2
    for record in launches:
        written = record["writes"].get("grad_logits", {"bytes": 0})["bytes"]
        read = record["reads"].get("grad_logits", {"bytes": 0})["bytes"]
        is_last = "add_bands" in record["kernel"]
        if written > (of_shared_rows if is_last else gradient_bytes):
            raise CheckError("passes", f"{written} bytes of the gradient are written")
        if read > (of_shared_rows if is_last else 0):
            raise CheckError("passes", f"{read} bytes of the gradient are read")
    # The lanes beside a warp's own columns read labels, too.
    pixels = logits.shape[0] * case.size[0] * case.size[1]
    labels = [r["reads"].get("target", {"bytes": 0})["bytes"] for r in launches]
    label_bytes = torch.empty((), dtype=case.label_dtype).element_size()
    passes = sum(labels) / (pixels * label_bytes)
    if passes > 2 * kernels + 2:  # two for the counts of a mean
        raise CheckError("passes", f"{passes:.2f} of the labels")


@dataclass(frozen=True)
class Result:
    loss: Tensor
    grads: tuple[Tensor, ...]  # of the logits, and of alpha where it is a tensor
    launches: list[dict[str, Any]]


def _row_options(case: Case) -> dict[str, Any]:
    return {"weight": make_weight(case), "label_smoothing": case.smoothing}


def _options(case: Case) -> dict[str, Any]:
    options = {"reduction": case.reduction, "ignore_index": IGNORE, **_row_options(case)}
    if case.size is not None:
        options |= {"upsample": "bilinear", "align_corners": case.align_corners}
    return options


def _upstream(case: Case, target: Tensor) -> Tensor:
    """The upstream gradient."""
    torch.default_generator.manual_seed(2)
    upstream = torch.rand(target.shape) if case.upstream is None else torch.tensor(case.upstream)
    return upstream.to(torch.promote_types(case.dtype, torch.float32))


def _call_operators(
    case: Case, logits: Tensor, target: Tensor, alpha: float, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and gradient. The forward is asked for the gradient, and given counts."""
    ops = torch.ops.oe_ext
    counts = None if case.counts is None else torch.tensor(case.counts, dtype=torch.float64)
    options = (alpha, None, case.reduction, IGNORE, None)
    loss, _, *statistics, grad = ops._outlier_exposure_loss_forward(
        logits, target, *options, True, counts, **_row_options(case)
    )
    ops._outlier_exposure_loss_backward_from_unit(
        grad, upstream, logits, target, *statistics, *options, **_row_options(case)
    )
    return loss, grad


def _call_upsampled(
    case: Case, logits: Tensor, target: Tensor, alpha: Any, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, of upsampled logits. Statistics are checked here."""
    number, tensor = (0.0, alpha.detach()) if isinstance(alpha, Tensor) else (alpha, None)
    counts = None if case.counts is None else torch.tensor(case.counts, dtype=torch.float64)
    options = (case.reduction, IGNORE, None, case.align_corners)
    loss, _, row_max, row_sum_exp, argmax, _, grad = (
        torch.ops.oe_ext._upsampled_outlier_exposure_loss_forward(
            logits, target, number, tensor, *options, case.statistics, True, counts,
            **_row_options(case),
        )
    )  # fmt: skip
    if case.statistics:
        full = F.interpolate(
            logits.double(), size=case.size, mode="bilinear", align_corners=case.align_corners
        )
        active = (target != IGNORE) & full.isfinite().any(1)
        lse = (row_max.double() + row_sum_exp.double().log())[active]
        tolerance = 4 * ARITHMETIC[loss.dtype] * max(1.0, full[full.isfinite()].abs().max())
        compare("value", lse, full.logsumexp(1)[active], tolerance)
        largest = full.gather(1, argmax.long().unsqueeze(1)).squeeze(1)[active]
        compare("value", largest, full.amax(1)[active], tolerance)
        if case.huge == 0 and argmax.any():
            raise CheckError("value", "not the first of equal classes")
    return loss, (grad * upstream).to(logits.dtype)


def _call_in_parts(
    case: Case, logits: Tensor, target: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses and the gradient, from calls that see some of the classes each."""
    ops = torch.ops.oe_ext
    options = (1.0, None, "none", IGNORE, None)
    num_classes = logits.shape[1]
    parts = logits.tensor_split(case.parts, dim=1)
    firsts = [sum(part.shape[1] for part in parts[:i]) for i in range(case.parts)]
    smoothing = {"label_smoothing": case.smoothing}
    maxima, sums, of_q, masses = [], [], [], []
    for part, first in zip(parts, firsts, strict=True):
        loss, _, row_max, row_sum_exp, _, _ = ops._outlier_exposure_loss_forward(
            part, target, *options, False, None, num_classes, first, **smoothing
        )
        here = ((target >= first) & (target < first + part.shape[1])).double()
        uniform = torch.where(target < 0, 1.0, case.smoothing)
        masses.append(here + uniform * (part.shape[1] / num_classes - here))
        maxima.append(row_max)
        sums.append(row_sum_exp.double())
        of_q.append(row_sum_exp.double().log() - loss)  # <q, logit - maximum> of the part
    row_max = torch.stack(maxima).amax(0)
    down = [(part_max - row_max).double() for part_max in maxima]
    sum_exp = sum(one * by.exp() for one, by in zip(sums, down, strict=True))
    q_x = sum(one + mass * by for one, mass, by in zip(of_q, masses, down, strict=True))
    counted = target != IGNORE
    loss = torch.where(counted, sum_exp.log() - q_x, 0).to(row_max.dtype)
    no_counts = torch.empty(0, dtype=torch.float64)
    grads = [
        ops._outlier_exposure_loss_backward(
            upstream, part, target, row_max, sum_exp.to(row_max.dtype), no_counts, *options,
            num_classes, first, **smoothing,
        )
        for part, first in zip(parts, firsts, strict=True)
    ]  # fmt: skip
    return loss, torch.cat(grads, dim=1)


def execute(case: Case, seed: int, *, counting: bool = False) -> Result:
    """Runs the kernels under one schedule; what the harness finds is an error."""
    logits, target, alpha = make_inputs(case)
    upstream = _upstream(case, target)
    leaves = [logits.detach().requires_grad_()]
    if isinstance(alpha, Tensor):
        leaves.append(alpha)
    simt_device.load()
    simt_device.set_seed(seed)
    try:
        with (
            simt_device.limits(**case.limits),
            simt_device.active(),
            simt_device.counting(counting) as launches,
        ):
            if case.parts > 1:
                loss, *grads = _call_in_parts(case, logits, target, upstream)
            elif case.size is not None and (case.direct or case.counts or case.statistics):
                loss, *grads = _call_upsampled(case, logits, target, alpha, upstream)
            elif case.direct or case.counts is not None:
                loss, *grads = _call_operators(case, logits, target, alpha, upstream)
            elif case.forward:
                loss, grads = outlier_exposure_loss(logits, target, alpha, **_options(case)), []
            else:
                loss = outlier_exposure_loss(leaves[0], target, alpha, **_options(case))
                grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=case.retain)
    except RuntimeError as error:
        raise CheckError("harness", str(error).split("\n")[0]) from error
    return Result(loss.detach(), tuple(grads), launches)


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
    loss = reference.outlier_exposure_loss(
        logits, target, alpha, counts=case.counts, **_options(case)
    )
    return loss.detach(), torch.autograd.grad(loss, leaves, _upstream(case, target).double())


def run(number: int, seed: int) -> Result:
    """Runs a case under one schedule and checks all that is promised of it."""
    case = CASES[number]
    result = execute(case, seed, counting=True)
    true_loss, true_grads = truth(number)
    arithmetic = ARITHMETIC[result.loss.dtype] * (1 + abs(case.offset) * 0.05)
    compare("value", result.loss, true_loss, arithmetic)
    if not case.forward:
        compare("gradient", result.grads[0], true_grads[0], 2 * arithmetic + STORED[case.dtype])
    for actual, expected in zip(result.grads[1:], true_grads[1:], strict=not case.forward):
        compare("alpha gradient", actual, expected, 4 * arithmetic)
    check_traffic(case, result.launches, make_inputs(case)[0])
    return result

"""The rivals, and checks that those which claim to compute the loss do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import ALPHA, Case, Inputs
from torch import Tensor

from oe_ext import outlier_exposure_loss, reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from inductor import keep_caches_apart
from oracles import load_pytorch_ood_class

keep_caches_apart()

#: The rivals that compute the loss. cross_entropy is a cheaper one; sum, clone and interpolate are
#: floors.
EXACT = ("ours", "pytorch-ood", "compiled", "unfused")

# The largest error, over the largest value, of the loss and of its gradient. The loss of half
# types is computed in float32; their gradient is stored in half: one unit in the last place.
LOSS_TOLERANCE = {torch.float64: 1e-12}
GRADIENT_TOLERANCE = {
    torch.float64: 1e-12,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}
FLOAT32_TOLERANCE = 1e-5

#: One forward (the loss), or one forward and backward (the gradient).
Step = Callable[[], Tensor]


class DisagreementError(RuntimeError):
    """A rival's result differs from ours."""


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The loss without branches, in a form that suits ``torch.compile``."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = F.log_softmax(logits, dim=1, dtype=dtype)
    at_label = log_probs.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(target < 0, -ALPHA * log_probs.mean(dim=1), -at_label).mean()


def make_losses(case: Case, inputs: Inputs) -> dict[str, Step]:
    """The loss of each rival of the case, except clone, which has none."""
    if case.size:
        return make_upsampled_losses(case, inputs)
    logits, target, classes, ood_index, _, options = inputs

    def ours(**options: Any) -> Step:
        return lambda: outlier_exposure_loss(
            logits, target, ALPHA, case.reduction, ood_index=ood_index, **options
        )

    def cross_entropy(**options: Any) -> Step:
        return lambda: F.cross_entropy(logits, classes, reduction=case.reduction, **options)

    losses: dict[str, Step] = {
        "ours": ours(**options),
        "cross_entropy": cross_entropy(**options),
        "sum": lambda: logits.sum(),
    }
    if options:
        losses |= {name: ours(**{name: value}) for name, value in options.items()}
        losses |= {"off": ours(), "cross_entropy off": cross_entropy()}
    if "pytorch-ood" in case.rivals:
        module = load_pytorch_ood_class()(ALPHA, case.reduction)
        losses["pytorch-ood"] = lambda: module(logits, target)
    if "compiled" in case.rivals:
        torch._dynamo.reset()
        compiled = torch.compile(plain_loss, fullgraph=True, dynamic=False)
        losses["compiled"] = lambda: compiled(logits, target)
    return losses


def make_upsampled_losses(case: Case, inputs: Inputs) -> dict[str, Step]:
    """Ours, and what the rivals make of the interpolated logits; those alone are "interpolate"."""
    logits, target, classes, _, _, options = inputs
    module = load_pytorch_ood_class()(ALPHA, case.reduction)

    def full() -> Tensor:
        return F.interpolate(logits, case.size, mode="bilinear", align_corners=case.align_corners)

    return {
        "ours": lambda: outlier_exposure_loss(logits, target, ALPHA, case.reduction, **options),
        "pytorch-ood": lambda: module(full(), target),
        "cross_entropy": lambda: F.cross_entropy(full(), classes, reduction=case.reduction),
        "unfused": lambda: outlier_exposure_loss(full(), target, ALPHA, case.reduction),
        "interpolate": full,
    }


def make_steps(case: Case, inputs: Inputs, losses: dict[str, Step]) -> dict[str, Step]:
    logits, weight = inputs.logits, inputs.weight
    detached = logits.detach()
    if case.inference:
        return {name: losses.get(name, detached.clone) for name in case.rivals}

    def differentiated(loss: Step) -> Step:
        return lambda: torch.autograd.grad(loss(), logits, weight)[0]

    def total() -> Tensor:
        # The gradient of a sum is one number, expanded. backward() writes it out, and so do we.
        return torch.autograd.grad(logits.sum(), logits)[0].contiguous()

    def interpolated() -> Tensor:
        # With the gradient of a sum, but without its pass.
        full = losses["interpolate"]()
        return torch.autograd.grad(full, logits, full.new_ones(()).expand_as(full))[0]

    steps = {name: differentiated(loss) for name, loss in losses.items() if name != "sum"}
    steps |= {"sum": total, "clone": detached.clone}
    if "interpolate" in losses:
        steps["interpolate"] = interpolated
    return {name: steps[name] for name in case.rivals}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error over the largest value; NaN if either contains NaN.

    Differences below the dtype's smallest number do not count: float16 cannot hold them.
    """
    info = torch.finfo(actual.dtype)
    smallest = info.smallest_normal * info.eps
    expected = expected.double()
    error = (actual.double() - expected).abs().max() - smallest
    return (error.clamp(min=0) / expected.abs().max()).item()


def check(case: Case, inputs: Inputs, losses: dict[str, Step]) -> None:
    """Compares the rivals that compute the loss with ours and with float64.

    Raises:
        DisagreementError: a value or a gradient is off by more than the tolerance.
    """
    logits, target, _, ood_index, weight, options = inputs

    def values(loss: Step, leaf: Tensor, weight: Tensor | None) -> list[Tensor]:
        value = loss()
        if case.inference:
            return [value]
        return [value.detach(), torch.autograd.grad(value, leaf, weight)[0]]

    exact = logits.detach().double().requires_grad_(not case.inference)
    expected = values(
        lambda: reference.outlier_exposure_loss(
            exact, target, ALPHA, case.reduction, ood_index=ood_index, **options
        ),
        exact,
        None if weight is None else weight.double(),
    )
    tolerances = [
        LOSS_TOLERANCE.get(case.dtype, FLOAT32_TOLERANCE),
        GRADIENT_TOLERANCE.get(case.dtype, FLOAT32_TOLERANCE),
    ]
    ours = None
    for name in (name for name in EXACT if name in case.rivals):
        actual = values(losses[name], logits, weight)
        ours = ours or actual
        for truth, held in (("float64", expected), ("ours", ours)):
            for what, a, b, tolerance in zip(
                ("loss", "gradient"), actual, held, tolerances, strict=False
            ):
                error = relative_error(a, b)
                if not error <= tolerance:
                    raise DisagreementError(
                        f"{case}: the {what} of {name} differs from {truth} by {error:.2g} of "
                        f"the largest value, more than {tolerance:.2g}"
                    )

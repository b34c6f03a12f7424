"""How far a result may differ from the reference in float64.

The budget is a few roundings of the arithmetic (``ARITHMETIC``, as in the cases of the SIMT
harness), each relative to the contribution of one position, plus one rounding to the dtype of the
result. The latter is computed and not estimated, so overflow, underflow and ties are exact. Where
the reference in the dtype of the arithmetic gives inf or NaN, a result may do so too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from simt_runs import ARITHMETIC
from strategies import Case, Inputs
from torch import Tensor

from oe_ext import reference


@dataclass(frozen=True)
class Results:
    """The loss and its gradients; that of alpha if alpha is a tensor."""

    loss: Tensor
    grad: Tensor
    alpha_grad: Tensor | None


def options_of(case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """The options, with class weights that have passed through the dtype of the arithmetic."""
    options = case.options(inputs)
    if inputs.weight is not None:
        options["weight"] = inputs.weight.to(case.acc_dtype).to(dtype)
    return options


def reference_results(case: Case, inputs: Inputs, upstream: Tensor, dtype: torch.dtype) -> Results:
    """The results of the reference, on the same values in another dtype."""
    logits = inputs.logits.to(dtype).requires_grad_()
    # Both pass through the dtype of the operator's arithmetic first.
    alpha = torch.as_tensor(inputs.alpha, dtype=case.acc_dtype).detach().to(dtype)
    options = options_of(case, inputs, dtype)

    def loss_of(alpha: Tensor) -> Tensor:
        function = reference.outlier_exposure_loss
        return function(logits, inputs.target, alpha, case.reduction, **options)

    # With a learnable alpha the reference reads outliers of weight 0: one call for each gradient.
    loss = loss_of(alpha)
    (grad,) = torch.autograd.grad(loss, logits, upstream.to(dtype), allow_unused=True)
    alpha_grad = None
    if case.alpha_dtype is not None:
        alpha.requires_grad_()
        (alpha_grad,) = torch.autograd.grad(loss_of(alpha), alpha, upstream.to(dtype))
    return Results(loss.detach(), grad, alpha_grad)


@dataclass(frozen=True)
class Budgets:
    """The absolute budgets of the arithmetic."""

    loss: Tensor
    grad: Tensor
    alpha_grad: Tensor | None


def budgets(case: Case, inputs: Inputs, upstream: Tensor) -> Budgets:
    rounding = ARITHMETIC[case.acc_dtype]
    smallest = torch.finfo(case.acc_dtype).smallest_normal * torch.finfo(case.acc_dtype).eps
    inlier, outlier = reference.inliers_and_outliers(inputs.target, *case.special_labels.values())
    options = options_of(case, inputs, torch.float64)
    cross_entropy = reference.outlier_exposure_loss(
        inputs.logits.double(), inputs.target, 1.0, "none", **options
    )
    alpha = torch.as_tensor(inputs.alpha, dtype=case.acc_dtype).detach().double()
    class_weight, smoothing = options["weight"], case.label_smoothing
    inlier_weight = reference.weights_of_inliers(inputs.target, inlier, class_weight)
    # k of the formula, by which a row's terms are multiplied
    k = torch.where(outlier, 1.0, inlier_weight)
    if class_weight is not None:
        k = torch.where(inlier, (1 - smoothing) * k + smoothing * class_weight.mean(), k)
    weight = torch.where(outlier, alpha.abs(), 1.0)
    counts = inlier_weight.sum(), outlier.sum().double()
    if case.reduction == "mean":
        divisor = sum(counts).expand(inlier.shape)
    elif case.reduction == "group_mean":
        divisor = torch.where(outlier, counts[1], counts[0])
    else:
        divisor = torch.ones_like(inlier, dtype=torch.float64)
    share = torch.where((inlier | outlier) & (divisor > 0), 1 / divisor, 0)
    # The terms of a row's loss are positive. Their roundings are relative to them, except that of
    # the logarithm, whose argument is at least 1.
    of_row = rounding * torch.maximum(cross_entropy.nan_to_num(posinf=0), k)
    # and each may be rounded where it is subnormal
    of_row = torch.where(k != 0, of_row + 4 * smallest, 0)
    loss = torch.where(weight * share != 0, weight * share * of_row + 4 * smallest, 0)
    if case.reduction not in (None, "none"):
        loss = loss.sum()
    upstream = upstream.double().abs()
    scale = weight * k * share * upstream
    alpha_grad = None
    if isinstance(inputs.alpha, Tensor):
        of_alpha = torch.where(outlier, 4 * of_row * share * upstream, 0)
        of_alpha = of_alpha + torch.where(outlier, 4 * smallest, 0)
        alpha_grad = of_alpha.sum_to_size(inputs.alpha.shape)
    return Budgets(
        loss=loss,
        # to be exactly 0 where nothing counts
        grad=(2 * rounding * scale + torch.where(scale != 0, 4 * smallest, 0)).unsqueeze(1),
        alpha_grad=alpha_grad,
    )


def outside(actual: Tensor, truth: Tensor, budget: Tensor, native: Tensor) -> Tensor:
    """Where a result exceeds its budget and is not excused. Where the reference in the same
    arithmetic is inf or NaN, the result may be inf or NaN: in sums of inf and -inf, their order
    decides."""
    dtype = actual.dtype
    low, high = (truth - budget).to(dtype), (truth + budget).to(dtype)
    nearest = truth.to(dtype)
    is_good = torch.where(
        nearest.isnan(), actual.isnan(), (low <= actual) & (actual <= high) | (actual == nearest)
    )
    both_overflow = truth.isfinite() & ~native.isfinite() & ~actual.isfinite()
    return ~(is_good | both_overflow)


def check(what: str, actual: Tensor, truth: Tensor, budget: Tensor, native: Tensor) -> None:
    assert actual.shape == truth.shape, what
    wrong = outside(actual, truth, budget, native)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        expected = truth[where].item()
        allowed = budget.expand(truth.shape)[where].item()
        raise AssertionError(
            f"{what}: {actual[where].item()!r} at {where}, where {expected!r} is right, give or "
            f"take {allowed:.2e}; {int(wrong.sum())} of {wrong.numel()} are wrong"
        )


def check_results(case: Case, inputs: Inputs, upstream: Tensor, actual: Results) -> None:
    truth = reference_results(case, inputs, upstream, torch.float64)
    native = reference_results(case, inputs, upstream, case.acc_dtype)
    allowed = budgets(case, inputs, upstream)
    check("loss", actual.loss, truth.loss, allowed.loss, native.loss)
    check("gradient", actual.grad, truth.grad, allowed.grad, native.grad)
    if actual.alpha_grad is not None:
        check(
            "gradient of alpha",
            actual.alpha_grad,
            truth.alpha_grad,
            allowed.alpha_grad,
            native.alpha_grad,
        )

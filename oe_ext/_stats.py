"""What a training loop logs beside the loss, from what the pass of the loss leaves behind."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.utils._pytree
from torch import Tensor

from oe_ext._checks import check_alpha
from oe_ext.reference import inliers_and_outliers

__all__ = ["LossScores", "LossStats", "loss_with_stats"]


class LossStats(NamedTuple):
    """Of one batch: 0-dim tensors, detached, on the device of the logits."""

    #: The mean cross-entropy of the inliers; NaN without any.
    inlier_loss: Tensor
    #: The mean cross-entropy of the outliers to the uniform distribution, not weighted by alpha;
    #: NaN without any.
    outlier_loss: Tensor
    #: int64.
    num_inliers: Tensor
    #: int64.
    num_outliers: Tensor
    #: The part of the inliers whose label has the largest logit, or shares it; NaN without any.
    inlier_accuracy: Tensor


class LossScores(NamedTuple):
    """Of each position: tensors of the shape of target, detached; NaN where it is ignored."""

    #: The largest softmax probability.
    max_softmax: Tensor
    #: logsumexp of the logits: the negative of the energy of Liu et al., NeurIPS 2020.
    energy: Tensor


# torch.export saves a program that returns them only if it knows their names.
for _type in (LossStats, LossScores):
    torch.utils._pytree._register_namedtuple(_type, serialized_type_name=f"oe_ext.{_type.__name__}")


def _wants_unit_gradient(logits: Tensor, others: list[Tensor], reduction: str) -> bool:
    """As autograd.cpp decides for the loss alone."""
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and reduction != "none"
        and logits.dtype != torch.float16
        and not torch.compiler.is_compiling()
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, [logits, *others]))
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def alpha_as_tensor(alpha: float, logits: Tensor) -> Tensor:
    """Of the dtype and on the device of the loss. torch.compile makes a variable of a number where
    it multiplies a tensor; anywhere else it is a constant, and each new one is compiled anew."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.ones((), dtype=dtype, device=logits.device) * alpha


def loss_with_stats(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str,
    return_stats: bool,
    return_scores: bool,
    ignore_index: int | None,
    ood_index: int | None,
) -> tuple[Tensor | LossStats | LossScores, ...]:
    """The loss, and what was asked for: O(N) more work, and no look at the logits but at those of
    the labels."""
    if not torch.compiler.is_dynamo_compiling():
        check_alpha(alpha)
    # As a tensor, alpha makes the operator keep the cross-entropy of each row, also of outliers
    # that weigh nothing.
    weight = alpha if isinstance(alpha, Tensor) else alpha_as_tensor(alpha, logits)
    unit_gradient = _wants_unit_gradient(logits, [target, weight], reduction)
    loss, cross_entropy, row_max, row_sum_exp, _, _ = (
        torch.ops.oe_ext._outlier_exposure_loss_forward.default(
            logits, target, 0.0, weight, reduction, ignore_index, ood_index, unit_gradient
        )
    )
    result: tuple[Tensor | LossStats | LossScores, ...] = (loss,)
    with torch.no_grad():
        inlier, outlier = inliers_and_outliers(target, ignore_index, ood_index)
        if return_stats:
            result += (_stats(logits, target, cross_entropy, row_max, inlier, outlier),)
        if return_scores:
            # The rows that are ignored were never read.
            nan = row_max.new_full((), float("nan"))
            counted = inlier | outlier
            scores = LossScores(
                max_softmax=torch.where(counted, row_sum_exp.reciprocal(), nan),
                energy=torch.where(counted, row_max + row_sum_exp.log(), nan),
            )
            result += (scores,)
    return result


def _stats(
    logits: Tensor,
    target: Tensor,
    cross_entropy: Tensor,
    row_max: Tensor,
    inlier: Tensor,
    outlier: Tensor,
) -> LossStats:
    num_inliers, num_outliers = inlier.sum(), outlier.sum()
    # where(), not products: an ignored row may hold anything
    zero = cross_entropy.new_zeros((), dtype=torch.float64)
    label = torch.where(inlier, target.long(), 0).unsqueeze(1)
    at_label = logits.detach().gather(1, label).squeeze(1).to(row_max.dtype)
    is_right = inlier & (at_label == row_max)
    dtype = cross_entropy.dtype
    return LossStats(
        inlier_loss=(torch.where(inlier, cross_entropy, zero).sum() / num_inliers).to(dtype),
        outlier_loss=(torch.where(outlier, cross_entropy, zero).sum() / num_outliers).to(dtype),
        num_inliers=num_inliers,
        num_outliers=num_outliers,
        inlier_accuracy=is_right.sum().to(dtype) / num_inliers,
    )

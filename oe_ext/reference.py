"""The definition of the loss in plain torch: simple, slow, differentiable, on any device.

Every kernel is tested against it, in float64. It follows the formula of Hendrycks et al. (arXiv
1812.04606): the loss of a row ``x`` with the distribution ``q`` is ``logsumexp(x) - <q, x>``, where
``q`` is one-hot for an inlier and uniform for an outlier. Class weights and label smoothing change
the inliers as in :func:`torch.nn.functional.cross_entropy`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["inliers_and_outliers", "outlier_exposure_loss", "weights_of_inliers"]


def inliers_and_outliers(
    target: Tensor, ignore_index: int | None, ood_index: int | None
) -> tuple[Tensor, Tensor]:
    """Two masks of the shape of ``target``, of the inliers and of the outliers. All other positions
    are ignored. Labels are not checked."""
    labels = target.long()
    special = labels < 0 if ood_index is None else labels == ood_index
    if ignore_index is None:
        return ~special, special
    counted = labels != ignore_index
    return counted & ~special, counted & special


def weights_of_inliers(target: Tensor, inlier: Tensor, weight: Tensor | None) -> Tensor:
    """The class weight of each inlier, 1 without ``weight``, and 0 elsewhere: float64 of the shape
    of ``target``. An illegal label gets any weight."""
    if weight is None:
        return inlier.double()
    labels = torch.where(inlier, target.long(), 0).clamp(0, len(weight) - 1)
    return torch.where(inlier, weight.double()[labels], 0.0)


def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    reduction: str | None = "mean",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    counts: tuple[float, float] | Tensor | None = None,
    ignore_index: int | None = None,
    ood_index: int | None = None,
    upsample: str | None = None,
    align_corners: bool = False,
) -> Tensor:
    """The same arguments, shapes and result as :func:`oe_ext.outlier_exposure_loss`, in the dtype
    of the logits (float32 for half types). Inputs are not checked."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if upsample is not None:
        logits = interpolate(logits.to(dtype), target.shape[1:], None, upsample, align_corners)
    labels = target.long()
    inlier, outlier = inliers_and_outliers(target, ignore_index, ood_index)

    alpha = torch.as_tensor(alpha, dtype=dtype, device=logits.device).expand(labels.shape)
    class_weight = weights_of_inliers(labels, inlier, weight).to(dtype)
    # Replaces rows that do not count: a NaN there would survive a product with 0. An outlier with
    # an alpha of 0 counts if alpha is a variable, since its derivative is not 0.
    is_variable = alpha.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(alpha)
    counted = inlier | outlier if is_variable else inlier | (outlier & (alpha != 0))
    x = torch.where(counted.unsqueeze(1), logits.to(dtype), 0)
    x = x - x.amax(dim=1, keepdim=True).detach()

    # log(sum(exp(x))) - <q, x>, as a sum over the classes where q is not 0: 0 * -inf is NaN.
    log_sum = x.exp().sum(dim=1).log()
    at_label = x.gather(1, torch.where(inlier, labels, 0).unsqueeze(1)).squeeze(1)
    # With a smoothing of 0 or 1, one of its parts does not count, even if it is infinite.
    cross_entropy = torch.zeros_like(log_sum)
    if label_smoothing != 1:
        cross_entropy = (1 - label_smoothing) * class_weight * (log_sum - at_label)
    if label_smoothing != 0:
        of_classes = log_sum.unsqueeze(1) - x
        if weight is not None:
            of_classes = of_classes * weight.to(dtype).reshape(-1, *[1] * (x.dim() - 2))
        cross_entropy = cross_entropy + label_smoothing * of_classes.mean(dim=1)
    cross_entropy = torch.where(outlier, log_sum - x.mean(dim=1), cross_entropy)
    loss = torch.where(counted, torch.where(outlier, alpha, 1) * cross_entropy, 0)

    if reduction is None or reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    num_inliers = weights_of_inliers(labels, inlier, weight).sum()
    num_outliers = outlier.sum()
    if counts is not None:
        num_inliers, num_outliers = torch.as_tensor(counts, device=logits.device).double()
    if reduction == "mean":
        if labels.numel() == 0 and counts is None:
            return loss.sum() / 0  # like any mean of nothing; 0 if all positions are ignored
        return loss.sum() / _divisor(num_inliers + num_outliers)
    if reduction == "group_mean":
        per_inlier = loss.where(inlier, 0).sum() / _divisor(num_inliers)
        per_outlier = loss.where(outlier, 0).sum() / _divisor(num_outliers)
        return per_inlier + per_outlier
    raise ValueError(f"unknown reduction {reduction!r}")


def _divisor(count: Tensor) -> Tensor:
    return torch.where(count == 0, torch.inf, count)  # a mean of nothing is 0

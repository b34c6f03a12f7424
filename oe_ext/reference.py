"""The definition of the loss in plain torch: simple, slow, differentiable, on any device.

Every kernel is tested against it, in float64. It follows the formula of Hendrycks et al. (arXiv
1812.04606): the loss of a row ``x`` with the distribution ``q`` is ``logsumexp(x) - <q, x>``, where
``q`` is one-hot for an inlier and uniform for an outlier.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inliers_and_outliers", "outlier_exposure_loss"]


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


def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    reduction: str | None = "mean",
    *,
    ignore_index: int | None = None,
    ood_index: int | None = None,
) -> Tensor:
    """The same arguments, shapes and result as :func:`oe_ext.outlier_exposure_loss`, in the dtype
    of the logits (float32 for half types). Inputs are not checked."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = target.long()
    inlier, outlier = inliers_and_outliers(target, ignore_index, ood_index)

    alpha = torch.as_tensor(alpha, dtype=dtype, device=logits.device).expand(labels.shape)
    weight = torch.where(outlier, alpha, inlier.to(dtype))
    # Replaces rows that do not count: a NaN there would survive a product with 0. A row with a
    # weight of 0 counts if the weight is a variable, since its derivative with respect to the
    # weight is not 0.
    is_variable = alpha.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(alpha)
    counts = inlier | outlier if is_variable else weight != 0
    x = torch.where(counts.unsqueeze(1), logits.to(dtype), 0)
    x = x - x.amax(dim=1, keepdim=True).detach()

    # log(sum(exp(x))) - <q, x>, as a sum over the classes where q is not 0: 0 * -inf is NaN.
    log_sum = x.exp().sum(dim=1).log()
    at_label = x.gather(1, torch.where(inlier, labels, 0).unsqueeze(1)).squeeze(1)
    cross_entropy = log_sum - torch.where(outlier, x.mean(dim=1), at_label)
    loss = torch.where(counts, weight * cross_entropy, 0)

    if reduction is None or reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        num_counted = (inlier | outlier).sum()
        # 0 if all positions are ignored, but NaN, like any mean, if there are none at all
        return loss.sum() / (num_counted.clamp(min=1) if labels.numel() > 0 else num_counted)
    if reduction == "group_mean":
        per_inlier = loss.where(inlier, 0).sum() / inlier.sum().clamp(min=1)
        per_outlier = loss.where(outlier, 0).sum() / outlier.sum().clamp(min=1)
        return per_inlier + per_outlier
    raise ValueError(f"unknown reduction {reduction!r}")

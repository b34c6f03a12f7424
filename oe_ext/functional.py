"""The functional form of the loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from oe_ext.reference import inliers_and_outliers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LossStats", "outlier_exposure_loss"]

# Logits that are surely not a DTensor, without importing what defines it.
_LOCAL_TYPES = (Tensor, torch.nn.Parameter)


class LossStats(NamedTuple):
    """What a training loop logs beside the loss: detached, and on the device of the logits. What
    was not asked for is None."""

    #: 0-dim: the mean cross-entropy of the inliers; NaN without any.
    inlier_loss: Tensor | None = None
    #: 0-dim: the mean cross-entropy of the outliers to the uniform distribution, not weighted by
    #: alpha; NaN without any.
    outlier_loss: Tensor | None = None
    #: 0-dim, int64.
    num_inliers: Tensor | None = None
    #: 0-dim, int64.
    num_outliers: Tensor | None = None
    #: 0-dim: the part of the inliers whose label has the largest logit, or shares it; NaN without
    #: any.
    inlier_accuracy: Tensor | None = None
    #: Shape of target: the largest softmax probability of each position; NaN where it is ignored.
    max_softmax: Tensor | None = None
    #: Shape of target: logsumexp of each position's logits (the negative of the energy of Liu et
    #: al., NeurIPS 2020); NaN where it is ignored.
    energy: Tensor | None = None


@overload
def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = ...,
    reduction: str | None = ...,
    *,
    ignore_index: int | None = ...,
    ood_index: int | None = ...,
    process_group: ProcessGroup | None = ...,
    return_stats: Literal[False] = ...,
    return_scores: Literal[False] = ...,
) -> Tensor: ...


@overload
def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = ...,
    reduction: str | None = ...,
    *,
    ignore_index: int | None = ...,
    ood_index: int | None = ...,
    process_group: ProcessGroup | None = ...,
    return_stats: bool = ...,
    return_scores: bool = ...,
) -> Tensor | tuple[Tensor, LossStats]: ...


def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    reduction: str | None = "mean",
    *,
    ignore_index: int | None = None,
    ood_index: int | None = None,
    process_group: ProcessGroup | None = None,
    return_stats: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Cross-entropy on labelled positions plus ``alpha`` times cross-entropy to the uniform
    distribution on outliers.

    With :math:`x` the logits of a position, :math:`y` its label and :math:`C` classes:

    .. math::
        \ell(x, y) = \begin{cases}
            \log \sum_c e^{x_c} - x_y & \text{if } 0 \le y < C \\
            \alpha \left(\log \sum_c e^{x_c} - \frac{1}{C} \sum_c x_c\right)
                & \text{if } y \text{ marks an outlier}
        \end{cases}

    Source: Hendrycks, Mazeika and Dietterich, "Deep Anomaly Detection with Outlier Exposure",
    ICLR 2019, https://arxiv.org/abs/1812.04606.

    Args:
        logits: shape ``[N, C]`` or ``[N, C, d1, ..., dk]``; float16, bfloat16, float32 or float64.
            Any strides.
        target: shape ``[N]`` or ``[N, d1, ..., dk]``; int64, int32, int16, int8 or uint8. A class
            in ``[0, C)``, or a mark: a negative number is an outlier.
        alpha: weight of the outliers. A finite number, or a floating-point tensor that broadcasts
            against ``target`` (one weight for all, or one for each position), which gets a
            gradient.
        reduction: ``"none"`` (or ``None``): the loss of each position, 0 where it is ignored.
            ``"sum"``. ``"mean"``: the sum divided by the number of positions that are not ignored,
            inliers and outliers together. ``"group_mean"``: the mean over the inliers plus the
            (weighted) mean over the outliers, as the paper trains; an empty group counts 0.
        ignore_index: positions with this label count for nothing; looked at before anything else.
            Nothing is ignored by default: -100 marks an outlier as any negative number does.
        ood_index: the label that marks an outlier, instead of the negative numbers.
        process_group: the processes that share a batch; each holds a part of it. ``"mean"`` and
            ``"group_mean"`` then divide by the positions of all parts. The losses of the processes,
            and their gradients, average to those of the whole batch, as
            :class:`~torch.nn.parallel.DistributedDataParallel` averages them, also where the parts
            hold different numbers of inliers and outliers. Two integers are sent.
        return_stats: also return :class:`LossStats` with the mean losses, the counts and the
            accuracy, from the same pass and without a synchronisation.
        return_scores: also return :class:`LossStats` with each position's maximum softmax
            probability and logsumexp, the scores that detectors of outliers use.

    Logits may be a :class:`~torch.distributed.tensor.DTensor` with a sharded batch, or with sharded
    classes (see :mod:`oe_ext.distributed`).

    Returns:
        float32, or float64 for float64 logits. A scalar, or ``target``'s shape for ``"none"``. With
        ``return_stats`` or ``return_scores`` a tuple of it and :class:`LossStats`.

    Raises:
        ValueError: a rank, a shape or a reduction that is not as above, no class at all, or an
            ``alpha`` that is not finite.
        TypeError: a dtype that is not as above, soft labels among them.
        IndexError: on the CPU, a label that is no class and no mark. On CUDA a device-side assert
            stops the kernel, as with :func:`torch.nn.functional.cross_entropy`.
    """
    if reduction is None:
        reduction = "none"
    marks = {"ignore_index": ignore_index, "ood_index": ood_index}
    if process_group is not None or type(logits) not in _LOCAL_TYPES:
        from oe_ext.distributed import global_outlier_exposure_loss, is_sharded

        if process_group is not None or is_sharded(logits):
            if return_stats or return_scores:
                raise NotImplementedError(
                    "outlier_exposure_loss: return_stats and return_scores are of one process; "
                    "they cannot be had together with process_group or a DTensor"
                )
            return global_outlier_exposure_loss(
                logits, target, alpha, reduction, process_group, **marks
            )
    if return_stats or return_scores:
        return _with_stats(logits, target, alpha, reduction, return_stats, return_scores, **marks)
    operator = torch.ops.oe_ext.outlier_exposure_loss
    if torch.compiler.is_dynamo_compiling() and not isinstance(alpha, Tensor):
        # A number is a constant of the operator, and each new one would be compiled anew. The
        # compiler makes a variable of it where it multiplies a tensor.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        alpha = torch.ones((), dtype=dtype, device=logits.device) * alpha
    if isinstance(alpha, Tensor):
        loss: Tensor = operator.tensor_alpha(logits, target, alpha, reduction, **marks)
    else:
        loss = operator.default(logits, target, alpha, reduction, **marks)
    return loss


def _with_stats(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str,
    return_stats: bool,
    return_scores: bool,
    ignore_index: int | None,
    ood_index: int | None,
) -> tuple[Tensor, LossStats]:
    """The loss and what its own pass leaves behind: O(N) more work, and no look at the logits but
    at those of the labels."""
    # As a tensor, alpha makes the operator keep the cross-entropy of each row, also of outliers
    # that weigh nothing.
    if isinstance(alpha, Tensor):
        alpha_tensor = alpha
    else:
        if not math.isfinite(alpha):
            raise ValueError(f"outlier_exposure_loss: alpha must be a finite number, got {alpha}")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        alpha_tensor = torch.full((), alpha, dtype=dtype, device=logits.device)
    with_gradient = (
        torch.is_grad_enabled()
        and logits.requires_grad
        and reduction != "none"
        and logits.dtype != torch.float16
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(logits)
    )
    loss, cross_entropy, row_max, row_sum_exp, _, _ = (
        torch.ops.oe_ext._outlier_exposure_loss_forward.default(
            logits, target, 0.0, alpha_tensor, reduction, ignore_index, ood_index, with_gradient
        )
    )
    with torch.no_grad():
        inlier, outlier = inliers_and_outliers(target, ignore_index, ood_index)
        stats = LossStats()
        if return_stats:
            # where(), not products: an ignored row may hold anything
            num_inliers, num_outliers = inlier.sum(), outlier.sum()
            total = cross_entropy.new_zeros((), dtype=torch.float64)
            label = torch.where(inlier, target.long(), 0).unsqueeze(1)
            at_label = logits.detach().gather(1, label).squeeze(1).to(row_max.dtype)
            is_right = inlier & (at_label == row_max)
            stats = LossStats(
                inlier_loss=(torch.where(inlier, cross_entropy, total).sum() / num_inliers).to(
                    loss.dtype
                ),
                outlier_loss=(torch.where(outlier, cross_entropy, total).sum() / num_outliers).to(
                    loss.dtype
                ),
                num_inliers=num_inliers,
                num_outliers=num_outliers,
                inlier_accuracy=is_right.sum().to(loss.dtype) / num_inliers,
            )
        if return_scores:
            # The rows that are ignored were never read.
            nan = row_max.new_full((), float("nan"))
            counted = inlier | outlier
            stats = stats._replace(
                max_softmax=torch.where(counted, row_sum_exp.reciprocal(), nan),
                energy=torch.where(counted, row_max + row_sum_exp.log(), nan),
            )
    return loss, stats

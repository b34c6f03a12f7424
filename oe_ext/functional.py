"""The functional form of the loss."""

from __future__ import annotations

import sys
from typing import Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from oe_ext._checks import (
    TENSORS,
    ProcessGroup,
    as_group,
    as_number,
    as_reduction,
    as_special_label,
    check_tensors,
)
from oe_ext._stats import LossScores, LossStats, alpha_as_tensor, loss_with_stats

__all__ = ["LossScores", "LossStats", "outlier_exposure_loss"]

_LOSS = torch.ops.oe_ext.outlier_exposure_loss
# Logits that are surely a tensor, and not a DTensor.
_LOCAL_TYPES = (Tensor, torch.nn.Parameter)


def _is_dtensor(tensor: Tensor) -> bool:
    """Without importing what defines it, which takes a second, and which some builds lack."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@overload
def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = ...,
    reduction: str | None = ...,
    *,
    ignore_index: int | None = ...,
    ood_index: int | None = ...,
    process_group: ProcessGroup | str | None = ...,
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
    process_group: None = ...,
    return_stats: Literal[True],
    return_scores: Literal[False] = ...,
) -> tuple[Tensor, LossStats]: ...


@overload
def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = ...,
    reduction: str | None = ...,
    *,
    ignore_index: int | None = ...,
    ood_index: int | None = ...,
    process_group: ProcessGroup | str | None = ...,
    return_stats: bool = ...,
    return_scores: bool = ...,
) -> Tensor | tuple[Tensor | LossStats | LossScores, ...]: ...


def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    reduction: str | None = "mean",
    *,
    ignore_index: int | None = None,
    ood_index: int | None = None,
    process_group: ProcessGroup | str | None = None,
    return_stats: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor | LossStats | LossScores, ...]:
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
        target: shape ``[N]`` or ``[N, d1, ..., dk]``; int64, int32, int16, int8, uint8, uint16 or
            uint32. A class in ``[0, C)``, or a mark: a negative number is an outlier.
        alpha: weight of the outliers. A finite number, or a floating-point tensor that broadcasts
            against ``target`` (one weight for all, or one for each position), which gets a
            gradient: for weights that a network computes, or that other terms of the loss hold
            back. Alone, a learnable alpha has nothing that holds it: the loss grows with it, and
            training drives it to minus infinity.
        reduction: ``"none"`` (or ``None``): the loss of each position, 0 where it is ignored.
            ``"sum"``. ``"mean"``: the sum divided by the number of positions that are not ignored,
            inliers and outliers together. ``"group_mean"``: the mean over the inliers plus the
            (weighted) mean over the outliers, as the paper trains; an empty group counts 0. Where
            all positions are ignored, each is 0; ``"mean"`` of no positions at all is NaN, as
            torch's.
        ignore_index: positions with this label count for nothing; looked at before anything else.
            Nothing is ignored by default: -100 marks an outlier as any negative number does.
        ood_index: the label that marks an outlier, instead of the negative numbers.
        process_group: the processes that share a batch; each holds a part of it. ``"world"`` means
            all processes: those of the moment of the call, and this one alone before
            ``init_process_group()``, where ``dist.group.WORLD`` is None. ``"mean"`` and
            ``"group_mean"`` then divide by the positions of all parts. The losses of the processes,
            and their gradients, average to those of the whole batch, as
            :class:`~torch.nn.parallel.DistributedDataParallel` averages them, also where the parts
            hold different numbers of inliers and outliers. Three integers are sent.
        return_stats: also return :class:`LossStats`: the mean losses, the counts and the accuracy,
            from the same pass and without a synchronisation.
        return_scores: also return :class:`LossScores`: each position's maximum softmax probability
            (low for outliers) and energy (high for outliers), by which they are detected.

    Logits may be a :class:`~torch.distributed.tensor.DTensor` with a sharded batch, or with sharded
    classes (see :mod:`oe_ext.distributed`).

    Returns:
        float32, or float64 for float64 logits. A scalar, or ``target``'s shape for ``"none"``. With
        ``return_stats`` or ``return_scores`` a tuple of it, and of what was asked for.

    Raises:
        ValueError: a rank, a shape or a reduction that is not as above, no class at all, or an
            ``alpha`` that is not finite (``torch.compile`` takes such a number as it is).
        TypeError: a dtype that is not as above, soft labels among them; no tensor where there must
            be one; a mark that is no integer (False is none).
        IndexError: on the CPU, a label that is no class and no mark. On CUDA a device-side assert
            stops the kernel, as with :func:`torch.nn.functional.cross_entropy`.
    """
    if type(reduction) is not str:
        reduction = as_reduction(reduction)
    if ignore_index is not None and type(ignore_index) is not int:
        ignore_index = as_special_label("ignore_index", ignore_index)
    if ood_index is not None and type(ood_index) is not int:
        ood_index = as_special_label("ood_index", ood_index)
    is_local = type(logits) in _LOCAL_TYPES
    if not is_local or type(target) is not Tensor:
        check_tensors(logits, target)
    if process_group is not None:
        process_group = as_group(process_group)
    if process_group is not None or (not is_local and _is_dtensor(logits)):
        if return_stats or return_scores:
            raise NotImplementedError(
                "outlier_exposure_loss: return_stats and return_scores are of one process; "
                "they cannot be had together with process_group or a DTensor"
            )
        from oe_ext.distributed import global_outlier_exposure_loss

        return global_outlier_exposure_loss(
            logits,
            target,
            alpha,
            reduction,
            process_group,
            ignore_index=ignore_index,
            ood_index=ood_index,
        )
    if return_stats or return_scores:
        return loss_with_stats(
            logits, target, alpha, reduction, return_stats, return_scores, ignore_index, ood_index
        )
    operator = _LOSS.default
    if isinstance(alpha, TENSORS):
        operator = _LOSS.tensor_alpha
    elif is_dynamo_compiling():
        operator, alpha = _LOSS.tensor_alpha, alpha_as_tensor(alpha, logits)
    elif type(alpha) is not float:
        alpha = as_number(alpha)
    loss: Tensor = operator(
        logits, target, alpha, reduction, ignore_index=ignore_index, ood_index=ood_index
    )
    return loss

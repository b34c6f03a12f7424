"""The functional form of the loss."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from oe_ext._checks import (
    TENSORS,
    Counts,
    ProcessGroup,
    as_counts,
    as_group,
    as_label_smoothing,
    as_number,
    as_reduction,
    as_special_label,
    check_tensors,
    check_upsample,
    check_weight,
)
from oe_ext._reductions import count_groups
from oe_ext._stats import LossScores, LossStats, alpha_as_tensor, loss_with_stats
from oe_ext.reference import inliers_and_outliers

__all__ = ["LossScores", "LossStats", "count_labels", "outlier_exposure_loss"]


class _Operators(NamedTuple):
    loss: Any  # with an alpha that is a number
    loss_of_tensor: Any
    forward: Any


_LOSS = torch.ops.oe_ext.outlier_exposure_loss.default
_LOSS_OF_TENSOR = torch.ops.oe_ext.outlier_exposure_loss.tensor_alpha
_OPERATORS = _Operators(
    _LOSS, _LOSS_OF_TENSOR, torch.ops.oe_ext._outlier_exposure_loss_forward.default
)
_UPSAMPLED_OPERATORS = _Operators(
    torch.ops.oe_ext.upsampled_outlier_exposure_loss.default,
    torch.ops.oe_ext.upsampled_outlier_exposure_loss.tensor_alpha,
    torch.ops.oe_ext._upsampled_outlier_exposure_loss_forward.default,
)
# Types of logits that are tensors, and not a DTensor.
_LOCAL_TYPES = (Tensor, torch.nn.Parameter)


def _is_dtensor(tensor: Tensor) -> bool:
    """Does not import DTensor: that takes a second, and some builds of torch lack it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@overload
def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = ...,
    reduction: str | None = ...,
    *,
    weight: Tensor | None = ...,
    label_smoothing: float = ...,
    counts: Counts | None = ...,
    ignore_index: int | None = ...,
    ood_index: int | None = ...,
    upsample: Literal["bilinear"] | None = ...,
    align_corners: bool = ...,
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
    weight: Tensor | None = ...,
    label_smoothing: float = ...,
    counts: Counts | None = ...,
    ignore_index: int | None = ...,
    ood_index: int | None = ...,
    upsample: Literal["bilinear"] | None = ...,
    align_corners: bool = ...,
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
    weight: Tensor | None = ...,
    label_smoothing: float = ...,
    counts: Counts | None = ...,
    ignore_index: int | None = ...,
    ood_index: int | None = ...,
    upsample: Literal["bilinear"] | None = ...,
    align_corners: bool = ...,
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
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    counts: Counts | None = None,
    ignore_index: int | None = None,
    ood_index: int | None = None,
    upsample: Literal["bilinear"] | None = None,
    align_corners: bool = False,
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
                & \text{if } y \text{ is the label of an outlier}
        \end{cases}

    ``weight`` and ``label_smoothing`` change the inliers as in
    :func:`torch.nn.functional.cross_entropy`, which is this loss where there are no outliers.

    Source: Hendrycks, Mazeika and Dietterich, "Deep Anomaly Detection with Outlier Exposure",
    ICLR 2019, https://arxiv.org/abs/1812.04606.

    Args:
        logits: shape ``[N, C]`` or ``[N, C, d1, ..., dk]``; float16, bfloat16, float32 or float64.
            Any strides.
        target: shape ``[N]`` or ``[N, d1, ..., dk]``; int64, int32, int16, int8, uint8, uint16 or
            uint32. A class in ``[0, C)``, or a special label: by default, negative numbers are the
            labels of outliers.
        alpha: weight of the outliers: a finite number, or a floating-point tensor that broadcasts
            against ``target`` (one weight for all positions, or one for each). A tensor gets a
            gradient. Use one for weights that a network computes, or that another term of the loss
            bounds. Without such a term, training drives a learnable alpha to minus infinity, since
            the loss grows with it.
        weight: weights of the classes, shape ``[C]``, for the inliers of each class: a
            floating-point tensor on the device of the logits, converted to the dtype of the loss;
            finite and not negative, which only the CPU checks. Outliers have ``alpha``. Gets no
            gradient.
        label_smoothing: the part of an inlier's distribution that is uniform, in [0, 1] (Szegedy
            et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
            https://arxiv.org/abs/1512.00567). Together with ``weight``, which then weighs every
            class of the uniform part as in torch, the loss on CUDA is composed of torch's
            operators: several times slower, and with memory of the size of the logits.
        counts: what ``"mean"`` (their sum) and ``"group_mean"`` divide by, instead of the counts of
            this ``target``: a pair of numbers of inliers and of outliers, or a tensor of two on the
            device of the logits. With a ``weight``, the first is the inliers' summed weight. So the
            losses of several parts add up to the loss of all; :func:`oe_ext.count_labels` counts.
        reduction: ``"none"`` (or ``None``): the loss of each position, 0 for ignored ones.
            ``"sum"``. ``"mean"``: the sum divided by the number of positions that are not ignored,
            inliers and outliers together. ``"group_mean"``: the mean over the inliers plus the
            (weighted) mean over the outliers, as in the paper; an empty group adds 0. With a
            ``weight``, both divide by the inliers' summed weights instead of their number. A mean
            is 0 if it would divide by 0: all positions are ignored, or those that are not have a
            weight of 0. If there are no positions at all, ``"mean"`` is NaN, as in torch.
        ignore_index: positions with this label are ignored. It takes precedence over ``ood_index``
            and the classes. By default no position is ignored: -100 is the label of an outlier,
            like any negative number.
        ood_index: the label of outliers, instead of the negative numbers.
        upsample: ``"bilinear"``: ``logits`` ``[N, C, h, w]`` are of a lower resolution than
            ``target`` ``[N, H, W]``, as segmentation networks compute them. The loss, and its
            gradient, are those of ``F.interpolate(logits, size=(H, W), mode="bilinear")``, without
            logits of that size in memory, and in float32 for half types. Logits of the target's
            size give the loss itself. Where the target is smaller, for ``weight`` together with
            ``label_smoothing``, for derivatives beyond the first, and under ``torch.func``, the
            logits are interpolated by torch, in memory; so they are on CUDA for more classes than
            shared memory holds, some hundreds.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        process_group: the processes that share a batch; each holds a part of it. ``"world"`` means
            all processes at the time of the call; before ``init_process_group()``, when
            ``dist.group.WORLD`` is None, it means this process alone. ``"mean"`` and
            ``"group_mean"`` then divide by the positions of all parts. The average of the
            processes' losses is the loss of the whole batch, and likewise for the gradients, which
            :class:`~torch.nn.parallel.DistributedDataParallel` averages. This holds even if the
            parts contain different numbers of inliers and outliers. Three numbers are sent.
        return_stats: also return :class:`LossStats`: the mean losses, the counts and the accuracy,
            from the same pass and without a synchronisation.
        return_scores: also return :class:`LossScores`: the maximum softmax probability (low for
            outliers) and the energy (high for outliers) of each position, to detect outliers.

    Logits may be a :class:`~torch.distributed.tensor.DTensor` with a sharded batch, or with sharded
    classes (see :mod:`oe_ext.distributed`).

    Returns:
        The loss in float32, or in float64 for float64 logits; a scalar, or ``target``'s shape for
        ``"none"``. With ``return_stats`` or ``return_scores``, a tuple of the loss and the
        requested statistics.

    Raises:
        ValueError: an unsupported rank, shape or reduction, no class at all, an ``alpha`` that is
            not finite (``torch.compile`` accepts such a number), a ``weight`` that is negative or
            not finite (on the CPU), a ``label_smoothing`` outside [0, 1], or ``counts`` for a
            reduction that divides by none, or together with ``process_group``; with ``upsample``,
            logits or a target of another rank; another ``upsample`` than ``"bilinear"``.
        TypeError: an unsupported dtype, such as that of soft labels; a missing tensor; a special
            label that is not an integer (False is not one).
        NotImplementedError: a ``weight`` or ``counts`` that require a gradient; ``upsample`` for a
            DTensor.
        IndexError: on the CPU, a label that is neither a class nor a special label. On CUDA a
            device-side assert stops the kernel, as with
            :func:`torch.nn.functional.cross_entropy`.
    """
    if type(reduction) is not str:
        reduction = as_reduction(reduction)
    if ignore_index is not None and type(ignore_index) is not int:
        ignore_index = as_special_label("ignore_index", ignore_index)
    if ood_index is not None and type(ood_index) is not int:
        ood_index = as_special_label("ood_index", ood_index)
    is_plain = weight is None and counts is None and label_smoothing == 0.0
    if not is_plain:
        check_weight(weight)
        label_smoothing = as_label_smoothing(label_smoothing)
    is_local = type(logits) in _LOCAL_TYPES
    if not is_local or type(target) is not Tensor:
        check_tensors(logits, target)
    if counts is not None:
        if process_group is not None:
            raise ValueError(
                "outlier_exposure_loss: the processes of a process_group find their own counts; "
                "give one of the two"
            )
        counts = as_counts(counts, logits)
    resize = None  # the align_corners of logits that are upsampled
    if upsample is not None or align_corners is not False:
        check_upsample(upsample, align_corners)
        resize = align_corners
        if not is_local and _is_dtensor(logits):
            raise NotImplementedError(
                "outlier_exposure_loss: upsample='bilinear' does not take a DTensor; interpolate "
                "its logits first, or call the loss on each process's part with a process_group"
            )
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
            weight=weight,
            label_smoothing=label_smoothing,
            counts=counts,
            ignore_index=ignore_index,
            ood_index=ood_index,
            align_corners=resize,
        )
    if return_stats or return_scores:
        return loss_with_stats(
            logits,
            target,
            alpha,
            reduction,
            return_stats,
            return_scores,
            ignore_index,
            ood_index,
            weight,
            label_smoothing,
            counts,
            resize,
        )
    operator = _LOSS
    if is_dynamo_compiling() and not isinstance(alpha, TENSORS):
        operator, alpha = _LOSS_OF_TENSOR, alpha_as_tensor(alpha, logits)
    elif type(alpha) is not float:
        if isinstance(alpha, TENSORS):
            operator = _LOSS_OF_TENSOR
        else:
            alpha = as_number(alpha)
    loss: Tensor
    # Every argument takes time, also one with the value of a default.
    is_plain = is_plain and resize is None
    if is_plain and ignore_index is None and ood_index is None:
        loss = operator(logits, target, alpha, reduction)
    elif is_plain:
        loss = operator(
            logits, target, alpha, reduction, ignore_index=ignore_index, ood_index=ood_index
        )
    else:
        options = {
            "ignore_index": ignore_index,
            "ood_index": ood_index,
            "weight": weight,
            "label_smoothing": label_smoothing,
        }
        loss = call_operator(
            logits, target, alpha, reduction, options, counts, align_corners=resize
        )
    return loss


def call_operator(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str,
    options: dict[str, Any],
    counts: Tensor | None = None,
    *,
    by_forward: bool = False,
    align_corners: bool | None = None,
) -> Tensor:
    """Calls the operator of the loss or, ``by_forward`` and for ``counts``, that of its forward.
    ``align_corners``: of logits that are upsampled; else None."""
    is_tensor = isinstance(alpha, TENSORS)
    ops = _OPERATORS if align_corners is None else _UPSAMPLED_OPERATORS
    if align_corners is not None:
        options = options | {"align_corners": align_corners}
    loss: Tensor
    if by_forward or counts is not None:
        number, tensor = (0.0, alpha) if is_tensor else (alpha, None)
        loss, *_ = ops.forward(logits, target, number, tensor, reduction, **options, counts=counts)
    else:
        operator = ops.loss_of_tensor if is_tensor else ops.loss
        loss = operator(logits, target, alpha, reduction, **options)
    return loss


def count_labels(
    targets: Tensor | Iterable[Tensor],
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    ood_index: int | None = None,
) -> Tensor:
    """The ``counts`` of :func:`outlier_exposure_loss` for a batch that comes in parts.

    Args:
        targets: the labels of all parts, of any shape.
        weight, ignore_index, ood_index: as for :func:`outlier_exposure_loss`.

    Returns:
        The number of inliers, or their summed weights, and the number of outliers, as a float64
        tensor of two elements on the device of the (first) target. The device is not waited for.
    """
    check_weight(weight, "count_labels")
    parts = [targets] if isinstance(targets, Tensor) else list(targets)
    device = parts[0].device if parts else None
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for target in parts:
        inlier, outlier = inliers_and_outliers(target, ignore_index, ood_index)
        counts += count_groups(target, inlier, outlier, weight)
    return counts

"""The loss of logits whose classes are spread over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from oe_ext._checks import check_arguments
from oe_ext._sums import expand, sum_from_axis
from oe_ext.reference import inliers_and_outliers

__all__ = ["class_parallel_outlier_exposure_loss", "reduce_rows"]

_FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward.default
_BACKWARD = torch.ops.oe_ext._outlier_exposure_loss_backward.default

_NAME = "class_parallel_outlier_exposure_loss"
_CLASS_AXIS = 1
# Labels for the local operator, whose rows are those of one process.
_OUTLIER, _IGNORED = -1, -2


class _Rows(NamedTuple):
    """What stands at each position."""

    label: Tensor  #: numbered from the first class of this process; it may be another's
    inlier: Tensor
    outlier: Tensor
    num_classes: int  #: of all processes

    def is_here(self, logits: Tensor) -> Tensor:
        """Inliers whose label is one of the classes of this process."""
        return self.inlier & (self.label >= 0) & (self.label < logits.size(_CLASS_AXIS))


def _exchange_sizes(
    local_logits: Tensor, target: Tensor, error: Exception | None, group: dist.ProcessGroup | None
) -> list[int]:
    """How many classes each process has. If one of them was given what the loss cannot take, all
    raise: none waits for another that has left."""
    is_good = error is None
    mine = torch.tensor(
        [local_logits.size(_CLASS_AXIS) if is_good else 0, target.numel(), is_good],
        device=local_logits.device,
    )
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    class_sizes: list[int]
    class_sizes, row_counts, good = torch.stack(parts, dim=1).tolist()
    if error is not None:
        raise error
    if not all(good):
        raise RuntimeError(
            f"{_NAME}: process {good.index(0)} of the group was given bad arguments; its own error "
            "says which"
        )
    if len(set(row_counts)) > 1:
        raise ValueError(
            f"{_NAME}: each process must have the same rows, got targets of {row_counts} elements"
        )
    return class_sizes


def _check_labels(
    target: Tensor, rows: _Rows, anywhere: Tensor, is_bad: Tensor, ignore_index: int | None
) -> None:
    """``anywhere`` is not 0 where a process of the group has a label that is no class."""
    if target.device.type != "cpu":
        torch._assert_async(anywhere == 0, f"{_NAME}: a label is neither a class nor a mark")
        return
    if is_bad.any():
        position = is_bad.nonzero()[0].tolist()
        raise IndexError(
            f"{_NAME}: target must hold classes in [0, {rows.num_classes}), or a mark"
            f"{'' if ignore_index is None else f' (ignore_index = {ignore_index})'}; "
            f"got {target[is_bad][0].item()} at position {position}"
        )
    if anywhere != 0:
        raise IndexError(f"{_NAME}: target of another process holds a label that is no class")


def _global_maximum(
    row_max: Tensor, is_bad: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Of each row; and, on the same journey, whether a process has a bad label."""
    packed = torch.cat([row_max.flatten(), is_bad.any().to(row_max.dtype).unsqueeze(0)])
    dist.all_reduce(packed, dist.ReduceOp.MAX, group=group)
    return packed[:-1].view(row_max.shape), packed[-1]


def _local_statistics(logits: Tensor, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Of the classes of this process, by one pass of the fused operator over them: each row's
    maximum, its sum of exp(logit - maximum), and its mean of (logit - maximum)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.size(_CLASS_AXIS) == 0:
        nothing = torch.zeros(rows.label.shape, dtype=dtype, device=logits.device)
        return nothing - torch.inf, nothing, nothing
    # To this operator, all rows but those of no weight are outliers.
    labels = torch.where(rows.inlier | rows.outlier, _OUTLIER, _IGNORED)
    one = torch.ones((), dtype=dtype, device=logits.device)
    _, to_uniform, row_max, row_sum_exp, _, _ = _FORWARD(
        logits, labels, 1.0, one, "none", _IGNORED, None, False
    )
    # A row of nothing but -inf has no exponentials.
    mean = torch.where(row_sum_exp == 0, -torch.inf, row_sum_exp.log() - to_uniform)
    return row_max, row_sum_exp, mean


def _global_sums(
    logits: Tensor,
    rows: _Rows,
    statistics: tuple[Tensor, Tensor, Tensor],
    global_max: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Over the classes of all processes, of logits from which the row's maximum was taken: of the
    exponentials, of the logits themselves, and the logit at the label."""
    row_max, row_sum_exp, mean = statistics
    sums = row_max.new_zeros((3, *row_max.shape))
    num_classes = logits.size(_CLASS_AXIS)
    if num_classes > 0:
        raised = row_max - global_max
        sums[0] = row_sum_exp * raised.exp()
        sums[1] = num_classes * (mean + raised)
        is_here = rows.is_here(logits)
        here = torch.where(is_here, rows.label, 0).unsqueeze(_CLASS_AXIS)
        at_label = logits.gather(_CLASS_AXIS, here).squeeze(_CLASS_AXIS)
        sums[2] = torch.where(is_here, at_label.to(sums.dtype) - global_max, 0)
    dist.all_reduce(sums, group=group)
    return sums


class _RowCrossEntropy(torch.autograd.Function):
    """The cross-entropy of each row, from the statistics of all its classes, with the gradient of
    the logits that are here: the backward sends nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: _Rows, global_max: Tensor, sums: Tensor) -> Tensor:
        sum_exp, sum_shifted, at_label = sums.unbind()
        ctx.save_for_backward(logits, rows.label, rows.inlier, rows.outlier, global_max, sum_exp)
        ctx.num_classes = rows.num_classes
        log_sum = sum_exp.log()
        of_outlier = torch.where(rows.outlier, log_sum - sum_shifted / rows.num_classes, 0)
        return torch.where(rows.inlier, log_sum - at_label, of_outlier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True, which would get a gradient of zero
            raise RuntimeError(
                f"{_NAME} cannot be differentiated twice; "
                "oe_ext.outlier_exposure_loss of all classes can"
            )
        logits, label, inlier, outlier, global_max, sum_exp = ctx.saved_tensors
        num_local = logits.size(_CLASS_AXIS)
        if num_local == 0:
            return torch.zeros_like(logits), None, None, None
        rows = _Rows(label, inlier, outlier & (grad != 0), ctx.num_classes)
        is_here = rows.is_here(logits)
        # The operator's own gradient, grad * (exp(logit - maximum) / sum - q). For an outlier, its
        # q of 1 / num_local is to become 1 / num_classes: what it is too large by goes into grad
        # and out of the sum. An inlier with its label elsewhere is given class 0 here, for now.
        share = num_local / rows.num_classes
        labels = torch.where(rows.outlier, _OUTLIER, _IGNORED)
        labels = torch.where(inlier, torch.where(is_here, label, 0), labels)
        upstream = torch.where(rows.outlier, grad * share, torch.where(inlier, grad, 0))
        grad_logits = _BACKWARD(
            upstream,
            logits,
            labels,
            global_max,
            torch.where(rows.outlier, sum_exp * share, sum_exp),
            label.new_empty(0),
            1.0,
            None,
            "none",
            _IGNORED,
            None,
        )
        first = logits.select(_CLASS_AXIS, 0).to(grad.dtype)
        of_first = (grad * ((first - global_max).exp() / sum_exp)).to(grad_logits.dtype)
        grad_of_first = grad_logits.select(_CLASS_AXIS, 0)
        grad_of_first.copy_(torch.where(inlier & ~is_here, of_first, grad_of_first))
        return grad_logits, None, None, None


def reduce_rows(row_loss: Tensor, inlier: Tensor, outlier: Tensor, reduction: str) -> Tensor:
    """The losses of the positions, of which those that are ignored are 0, reduced."""
    if reduction == "none":
        return row_loss
    zero = torch.zeros_like(row_loss)
    inlier_sum = sum_from_axis(torch.where(inlier, row_loss, zero).double())
    outlier_sum = sum_from_axis(torch.where(inlier, zero, row_loss).double())
    if reduction == "sum":
        total = inlier_sum + outlier_sum
    elif reduction == "mean":
        num_counted = (inlier | outlier).sum()
        # 0 where all are ignored, NaN where there is nothing at all
        total = (inlier_sum + outlier_sum) / num_counted.clamp(min=min(row_loss.numel(), 1))
    else:
        total = inlier_sum / inlier.sum().clamp(min=1) + outlier_sum / outlier.sum().clamp(min=1)
    return total.to(row_loss.dtype)


def class_parallel_outlier_exposure_loss(
    local_logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    alpha: float | Tensor = 0.5,
    reduction: str | None = "mean",
    *,
    ignore_index: int | None = None,
    ood_index: int | None = None,
    class_sizes: Sequence[int] | None = None,
) -> Tensor:
    """The loss of logits whose classes are spread over a group of processes: a head that is too
    large for one, as of a vocabulary or of many faces.

    The processes hold neighbouring classes in the order of their ranks, each as many as it likes
    (also none), and each the same rows. Each runs the fused operator over its own classes. Two
    all-reduces make of that the statistics of all classes: a maximum a row, and then three sums
    (Shoeybi et al., "Megatron-LM", arXiv 1909.08053, do so for cross-entropy), in float32 (float64
    for float64 logits). The backward sends nothing. All get the same loss, and each the gradient of
    its own logits.

    Args:
        local_logits: ``[N, C_local]`` or ``[N, C_local, d1, ..., dk]``, as for
            :func:`oe_ext.outlier_exposure_loss`: the classes of this process.
        target: ``[N]`` or ``[N, d1, ..., dk]``: labels among all classes; the same everywhere.
        group: the processes; all of them by default.
        alpha, reduction, ignore_index, ood_index: as for :func:`oe_ext.outlier_exposure_loss`.
        class_sizes: the number of classes of each process. Without it the processes tell each
            other, for which the host waits; they also tell whether their arguments are good, so
            that an error of one is an error of all.

    Returns:
        The loss, as :func:`oe_ext.outlier_exposure_loss` of all classes in one process.

    Raises:
        ValueError, TypeError, IndexError: as :func:`oe_ext.outlier_exposure_loss`.
        RuntimeError: another process was given bad arguments; or ``create_graph=True`` in the
            backward: it cannot be differentiated twice.
    """
    reduction = "none" if reduction is None else reduction
    error: Exception | None = None
    try:
        checked = local_logits
        if local_logits.dim() >= 2 and local_logits.size(_CLASS_AXIS) == 0:  # which is fine here
            shape = list(local_logits.shape)
            shape[_CLASS_AXIS] = 1
            checked = local_logits.new_empty(shape, device="meta")
        check_arguments(checked, target, alpha, reduction)
    except (ValueError, TypeError) as bad:
        error = bad
    rank = dist.get_rank(group)
    if class_sizes is None:
        class_sizes = _exchange_sizes(local_logits, target, error, group)
    elif error is not None:
        raise error
    elif class_sizes[rank] != local_logits.size(_CLASS_AXIS):
        raise ValueError(
            f"{_NAME}: local_logits of process {rank} must have the {class_sizes[rank]} classes of "
            f"class_sizes {list(class_sizes)}, got shape {list(local_logits.shape)}"
        )
    num_classes = sum(class_sizes)
    if num_classes == 0:
        raise ValueError(f"{_NAME}: there must be at least one class, in whichever process")

    labels = target.long()
    inlier, outlier = inliers_and_outliers(labels, ignore_index, ood_index)
    dtype = torch.promote_types(local_logits.dtype, torch.float32)
    weight = expand(torch.as_tensor(alpha, dtype=dtype, device=labels.device), labels.shape)
    weighs = outlier if weight.requires_grad else outlier & (weight != 0)
    rows = _Rows(labels - sum(class_sizes[:rank]), inlier, weighs, num_classes)
    with torch.no_grad():
        is_bad = inlier & ((labels < 0) | (labels >= num_classes))
        statistics = _local_statistics(local_logits, rows)
        global_max, anywhere = _global_maximum(statistics[0], is_bad, group)
        _check_labels(labels, rows, anywhere, is_bad, ignore_index)
        sums = _global_sums(local_logits, rows, statistics, global_max, group)
    cross_entropy: Tensor = _RowCrossEntropy.apply(  # type: ignore[no-untyped-call]
        local_logits, rows, global_max, sums
    )
    # An outlier that weighs nothing contributes exactly 0, whatever its logits are.
    finite = torch.where((weight == 0) & ~cross_entropy.isfinite(), 0, cross_entropy)
    row_loss = torch.where(inlier, cross_entropy, torch.where(weighs, weight * finite, 0))
    return reduce_rows(row_loss, inlier, outlier, reduction)

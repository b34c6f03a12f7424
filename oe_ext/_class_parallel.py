"""The loss of logits whose classes are spread over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from oe_ext._checks import as_reduction, check_arguments
from oe_ext._reductions import reduce_rows
from oe_ext._sums import expand
from oe_ext.reference import inliers_and_outliers

__all__ = ["class_parallel_outlier_exposure_loss"]

_FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward.default
_BACKWARD = torch.ops.oe_ext._outlier_exposure_loss_backward.default

_NAME = "class_parallel_outlier_exposure_loss"
_CLASS_AXIS = 1
# What special labels become.
_OUTLIER, _IGNORED = -1, -2


class _Part(NamedTuple):
    """The rows, and which of their classes are those of this process."""

    labels: Tensor  #: int64: a class of all, or as above
    first_class: int
    num_classes: int  #: of all processes

    @property
    def settings(self) -> tuple[int, None]:
        """ignore_index and ood_index, by which the operator understands the labels."""
        return _IGNORED, None

    def mass_here(self, num_here: int) -> Tensor:
        """How much of each row's distribution q lies on so many classes here."""
        cls = self.labels - self.first_class
        is_here = (self.labels >= 0) & (cls >= 0) & (cls < num_here)
        return torch.where(self.labels == _OUTLIER, num_here / self.num_classes, is_here.double())


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
    target: Tensor, num_classes: int, anywhere: Tensor, is_bad: Tensor, ignore_index: int | None
) -> None:
    """``anywhere`` is not 0 where a process of the group has a label that is no class."""
    if target.device.type != "cpu":
        torch._assert_async(
            anywhere == 0, f"{_NAME}: a label is neither a class nor a special label"
        )
        return
    if is_bad.any():
        position = is_bad.nonzero()[0].tolist()
        raise IndexError(
            f"{_NAME}: target must hold classes in [0, {num_classes}), or a special label"
            f"{'' if ignore_index is None else f' (ignore_index = {ignore_index})'}; "
            f"got {target[is_bad][0].item()} at position {position}"
        )
    if anywhere != 0:
        raise IndexError(f"{_NAME}: target of another process holds a label that is no class")


def _global_maximum(
    row_max: Tensor, is_bad: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Of each row; and, in the same message, whether a process has a bad label."""
    packed = torch.cat([row_max.flatten(), is_bad.any().to(row_max.dtype).unsqueeze(0)])
    dist.all_reduce(packed, dist.ReduceOp.MAX, group=group)
    return packed[:-1].view(row_max.shape), packed[-1]


def _local_statistics(logits: Tensor, part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    """Of the classes of this process, by one pass of the fused operator over them: each row's
    maximum, its sum of exp(logit - maximum), and its <q, logit - maximum>."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    num_here = logits.size(_CLASS_AXIS)
    if num_here == 0:
        nothing = torch.zeros(part.labels.shape, dtype=dtype, device=logits.device)
        return nothing - torch.inf, nothing, nothing
    cross_entropy, _, row_max, row_sum_exp, _, _ = _FORWARD(
        logits,
        part.labels,
        1.0,
        None,
        "none",
        *part.settings,
        num_classes=part.num_classes,
        first_class=part.first_class,
    )
    # A row of nothing but -inf has no exponentials.
    of_q = torch.where(row_sum_exp == 0, -torch.inf, row_sum_exp.log() - cross_entropy)
    return row_max, row_sum_exp, of_q


def _global_sums(
    statistics: tuple[Tensor, Tensor, Tensor],
    mass: Tensor,
    global_max: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Over the classes of all processes, of logits from which the row's maximum was taken: the sum
    of the exponentials, and that of the logits times q."""
    row_max, row_sum_exp, of_q = statistics
    raised = row_max - global_max
    sums = torch.stack(
        [
            row_sum_exp * raised.exp(),
            torch.where(mass > 0, of_q + mass.to(raised.dtype) * raised, 0),
        ]
    )
    dist.all_reduce(sums, group=group)
    return sums


class _RowCrossEntropy(torch.autograd.Function):
    """The cross-entropy of each row, from the statistics of all its classes, with the gradient of
    the logits that are here: the backward sends nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, part: _Part, global_max: Tensor, sums: Tensor) -> Tensor:
        sum_exp, of_q = sums.unbind()
        ctx.save_for_backward(logits, part.labels, global_max, sum_exp)
        ctx.classes = part.first_class, part.num_classes
        return torch.where(part.labels == _IGNORED, 0, sum_exp.log() - of_q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True, which would get a gradient of zero
            raise RuntimeError(
                f"{_NAME} cannot be differentiated twice; "
                "oe_ext.outlier_exposure_loss of all classes can"
            )
        logits, labels, global_max, sum_exp = ctx.saved_tensors
        if logits.size(_CLASS_AXIS) == 0:
            return torch.zeros_like(logits), None, None, None
        # Of an outlier without a gradient the logits may be anything.
        skipped = (labels == _OUTLIER) & (grad == 0)
        part = _Part(labels.masked_fill(skipped, _IGNORED), *ctx.classes)
        grad_logits = _BACKWARD(
            grad,
            logits,
            part.labels,
            global_max,
            sum_exp,
            sum_exp.new_empty(0, dtype=torch.float64),  # no counts
            1.0,
            None,
            "none",
            *part.settings,
            part.num_classes,
            part.first_class,
        )
        return grad_logits, None, None, None


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
    all-reduces make of that the statistics of all classes: a maximum a row, and then two sums
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
    reduction = as_reduction(reduction, _NAME)
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
    with torch.no_grad():
        is_bad = inlier & ((labels < 0) | (labels >= num_classes))
        seen = torch.where(inlier & ~is_bad, labels, torch.where(weighs, _OUTLIER, _IGNORED))
        part = _Part(seen, sum(class_sizes[:rank]), num_classes)
        statistics = _local_statistics(local_logits.detach(), part)
        global_max, anywhere = _global_maximum(statistics[0], is_bad, group)
        _check_labels(labels, num_classes, anywhere, is_bad, ignore_index)
        mass = part.mass_here(local_logits.size(_CLASS_AXIS))
        sums = _global_sums(statistics, mass, global_max, group)
    cross_entropy: Tensor = _RowCrossEntropy.apply(  # type: ignore[no-untyped-call]
        local_logits, part, global_max, sums
    )
    # An outlier that weighs nothing contributes exactly 0, whatever its logits are.
    finite = torch.where((weight == 0) & ~cross_entropy.isfinite(), 0, cross_entropy)
    row_loss = torch.where(inlier, cross_entropy, torch.where(weighs, weight * finite, 0))
    return reduce_rows(row_loss, inlier, outlier, reduction)

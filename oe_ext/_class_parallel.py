"""The loss of logits whose classes are spread over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from oe_ext._checks import as_reduction, check_arguments, check_weight
from oe_ext._reductions import reduce_rows
from oe_ext._sums import expand
from oe_ext.reference import inliers_and_outliers, weights_of_inliers

__all__ = ["class_parallel_outlier_exposure_loss"]

_FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward.default
_BACKWARD = torch.ops.oe_ext._outlier_exposure_loss_backward.default

_NAME = "class_parallel_outlier_exposure_loss"
_CLASS_AXIS = 1
# The labels that replace special labels.
_OUTLIER, _IGNORED = -1, -2


class _Part(NamedTuple):
    """The labels of the rows, and the range of classes in this process."""

    labels: Tensor  #: int64: a class among all, _OUTLIER or _IGNORED
    first_class: int
    num_classes: int  #: of all processes
    label_smoothing: float

    @property
    def settings(self) -> tuple[int, None]:
        """ignore_index and ood_index of the operator, for these labels."""
        return _IGNORED, None

    @property
    def classes(self) -> dict[str, Any]:
        """The last arguments of the operator."""
        return {
            "num_classes": self.num_classes,
            "first_class": self.first_class,
            "label_smoothing": self.label_smoothing,
        }

    def mass_here(self, num_here: int) -> Tensor:
        """The share of each row's distribution q that falls on the ``num_here`` classes here."""
        cls = self.labels - self.first_class
        is_here = (self.labels >= 0) & (cls >= 0) & (cls < num_here)
        share = num_here / self.num_classes
        of_inlier = (1 - self.label_smoothing) * is_here.double() + self.label_smoothing * share
        return torch.where(self.labels == _OUTLIER, share, of_inlier)


def _exchange_sizes(
    local_logits: Tensor, target: Tensor, error: Exception | None, group: dist.ProcessGroup | None
) -> list[int]:
    """The number of classes of each process. If one process got bad arguments, all raise, so that
    none waits for a process that has left."""
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
    """Raises if a label is illegal. ``anywhere`` is not 0 if that is so in any process."""
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
    """The maximum of each row; the same message tells whether a process has a bad label."""
    packed = torch.cat([row_max.flatten(), is_bad.any().to(row_max.dtype).unsqueeze(0)])
    dist.all_reduce(packed, dist.ReduceOp.MAX, group=group)
    return packed[:-1].view(row_max.shape), packed[-1]


def _local_statistics(logits: Tensor, part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's maximum, sum of exp(logit - maximum), and <q, logit - maximum> over the classes of
    this process, from one pass of the fused operator."""
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
        **part.classes,
    )
    # The exponentials of a row with only -inf logits are all 0.
    of_q = torch.where(row_sum_exp == 0, -torch.inf, row_sum_exp.log() - cross_entropy)
    return row_max, row_sum_exp, of_q


def _global_sums(
    statistics: tuple[Tensor, Tensor, Tensor],
    mass: Tensor,
    global_max: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Sums over the classes of all processes: each row's sum of exp(logit - maximum), and its
    <q, logit - maximum>."""
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
    """The cross-entropy of each row from the statistics of all its classes. The backward computes
    the gradient of the local logits and sends nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, part: _Part, global_max: Tensor, sums: Tensor) -> Tensor:
        sum_exp, of_q = sums.unbind()
        ctx.save_for_backward(logits, part.labels, global_max, sum_exp)
        ctx.rest_of_part = part[1:]
        return torch.where(part.labels == _IGNORED, 0, sum_exp.log() - of_q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True would get a gradient of zero
            raise RuntimeError(
                f"{_NAME} cannot be differentiated twice; "
                "oe_ext.outlier_exposure_loss of all classes can"
            )
        logits, labels, global_max, sum_exp = ctx.saved_tensors
        if logits.size(_CLASS_AXIS) == 0:
            return torch.zeros_like(logits), None, None, None
        # The logits of an outlier with an upstream gradient of 0 may be anything.
        skipped = (labels == _OUTLIER) & (grad == 0)
        part = _Part(labels.masked_fill(skipped, _IGNORED), *ctx.rest_of_part)
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
            **part.classes,
        )
        return grad_logits, None, None, None


def class_parallel_outlier_exposure_loss(
    local_logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    alpha: float | Tensor = 0.5,
    reduction: str | None = "mean",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    ood_index: int | None = None,
    class_sizes: Sequence[int] | None = None,
) -> Tensor:
    """The loss of logits whose classes are spread over a group of processes, for a classification
    head that is too large for one, such as that of a vocabulary or of many faces.

    All processes hold the same rows. In the order of their ranks they hold consecutive ranges of
    classes, of any size (also empty). Each runs the fused operator over its own classes. Two
    all-reduces combine the results into the statistics of all classes: first one maximum per row,
    then two sums (as Shoeybi et al., "Megatron-LM", arXiv 1909.08053, for cross-entropy), in
    float32 (float64 for float64 logits). The backward sends nothing. All processes get the same
    loss, and each gets the gradient of its own logits.

    Args:
        local_logits: ``[N, C_local]`` or ``[N, C_local, d1, ..., dk]``, as for
            :func:`oe_ext.outlier_exposure_loss`: the logits of this process's classes.
        target: ``[N]`` or ``[N, d1, ..., dk]``: labels among all classes, the same in all
            processes.
        group: the processes; all of them by default.
        alpha, reduction, label_smoothing, ignore_index, ood_index: as for
            :func:`oe_ext.outlier_exposure_loss`.
        weight: the weights of all classes, ``[C]``, in each process.
        class_sizes: the number of classes of each process. Without it the processes exchange the
            numbers, and the host waits. They also exchange whether their arguments are valid: if
            one process raises, all do.

    Returns:
        The loss that :func:`oe_ext.outlier_exposure_loss` gives for all classes in one process.

    Raises:
        ValueError, TypeError, IndexError: as :func:`oe_ext.outlier_exposure_loss`.
        NotImplementedError: a ``weight`` together with ``label_smoothing``.
        RuntimeError: another process got bad arguments; or the backward ran with
            ``create_graph=True``, since the loss cannot be differentiated twice.
    """
    reduction = as_reduction(reduction, _NAME)
    error: Exception | None = None
    try:
        checked = local_logits
        if local_logits.dim() >= 2 and local_logits.size(_CLASS_AXIS) == 0:  # allowed here
            shape = list(local_logits.shape)
            shape[_CLASS_AXIS] = 1
            checked = local_logits.new_empty(shape, device="meta")
        check_arguments(checked, target, alpha, reduction, None, label_smoothing)
        check_weight(weight, _NAME)
        if weight is not None and label_smoothing != 0:
            raise NotImplementedError(
                f"{_NAME}: weight and label_smoothing together need all classes in one process"
            )
    except (ValueError, TypeError, NotImplementedError) as bad:
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
    if weight is not None and weight.shape != (num_classes,):
        raise ValueError(
            f"{_NAME}: weight must have one element per class of all processes, so shape "
            f"[{num_classes}], got {list(weight.shape)}"
        )

    labels = target.long()
    inlier, outlier = inliers_and_outliers(labels, ignore_index, ood_index)
    dtype = torch.promote_types(local_logits.dtype, torch.float32)
    alpha = expand(torch.as_tensor(alpha, dtype=dtype, device=labels.device), labels.shape)
    weighs = outlier if alpha.requires_grad else outlier & (alpha != 0)
    with torch.no_grad():
        is_bad = inlier & ((labels < 0) | (labels >= num_classes))
        seen = torch.where(inlier & ~is_bad, labels, torch.where(weighs, _OUTLIER, _IGNORED))
        part = _Part(seen, sum(class_sizes[:rank]), num_classes, label_smoothing)
        statistics = _local_statistics(local_logits.detach(), part)
        global_max, anywhere = _global_maximum(statistics[0], is_bad, group)
        _check_labels(labels, num_classes, anywhere, is_bad, ignore_index)
        mass = part.mass_here(local_logits.size(_CLASS_AXIS))
        sums = _global_sums(statistics, mass, global_max, group)
    cross_entropy: Tensor = _RowCrossEntropy.apply(  # type: ignore[no-untyped-call]
        local_logits, part, global_max, sums
    )
    # An outlier with an alpha of 0 contributes exactly 0, whatever its logits are.
    finite = torch.where((alpha == 0) & ~cross_entropy.isfinite(), 0, cross_entropy)
    inlier_weights = None
    of_inlier = cross_entropy
    if weight is not None:
        inlier_weights = weights_of_inliers(labels, inlier, weight.detach().to(dtype))
        of_inlier = cross_entropy * inlier_weights.to(dtype)
    row_loss = torch.where(inlier, of_inlier, torch.where(weighs, alpha * finite, 0))
    return reduce_rows(row_loss, inlier, outlier, reduction, inlier_weights=inlier_weights)

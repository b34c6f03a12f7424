"""The loss of a batch that several processes share, or of classes that they share.

- :func:`global_outlier_exposure_loss`: each process has a part of the batch.
- :func:`class_parallel_outlier_exposure_loss`: each process has a part of the classes.
- Importing this module tells :class:`~torch.distributed.tensor.DTensor` how to shard the operators.
  :func:`oe_ext.outlier_exposure_loss` does so where it is given one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from oe_ext.reference import inliers_and_outliers

__all__ = ["class_parallel_outlier_exposure_loss", "global_outlier_exposure_loss", "is_sharded"]

_LOSS = torch.ops.oe_ext.outlier_exposure_loss
_FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward.default
_BACKWARD = torch.ops.oe_ext._outlier_exposure_loss_backward.default

_CLASS_AXIS = 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


# ---- A shared batch


def _call(
    logits: Tensor, target: Tensor, alpha: float | Tensor, reduction: str, marks: dict[str, Any]
) -> Tensor:
    operator = _LOSS.tensor_alpha if isinstance(alpha, Tensor) else _LOSS.default
    loss: Tensor = operator(logits, target, alpha, reduction, **marks)
    return loss


def _divided(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str,
    marks: dict[str, Any],
    counts: tuple[Tensor, Tensor, Tensor],
    factor: int,
) -> Tensor:
    """``factor`` times the sum over these rows, divided by counts of (perhaps many) more: inliers,
    outliers, and positions of any kind."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    inliers, outliers, positions = counts
    if reduction == "mean":
        # 0 where all are ignored, NaN where there is nothing at all
        divisor = torch.maximum(inliers + outliers, positions.clamp(max=1)).to(dtype)
        return _call(logits, target, alpha, "sum", marks) * (factor / divisor)
    per_inlier = inliers.clamp(min=1).to(dtype)
    per_outlier = outliers.clamp(min=1).to(dtype)
    outlier_weight = (alpha * (per_inlier / per_outlier)).to(dtype)
    return _call(logits, target, outlier_weight, "sum", marks) * (factor / per_inlier)


def global_outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    *,
    ignore_index: int | None = None,
    ood_index: int | None = None,
) -> Tensor:
    """The loss of a batch whose parts are held by the processes of a group, or by a DTensor.

    What :func:`oe_ext.outlier_exposure_loss` calls where it is given a ``process_group`` or a
    DTensor; see there for the arguments.

    With a ``process_group``, ``"mean"`` and ``"group_mean"`` divide by the counts of all processes
    and multiply by their number: the average over the processes, of the losses or of the gradients,
    is that of the whole batch in one process. ``"sum"`` and ``"none"`` are those of the local part.
    One all-reduce of three integers is sent.

    With a DTensor the result is that of the whole batch; a batch that is sharded gives a sharded
    loss for ``"none"``, and partial sums otherwise. Logits with sharded classes (``Shard(1)``) go
    to :func:`class_parallel_outlier_exposure_loss`.

    Raises:
        ValueError: both a DTensor and a ``process_group``; classes that are sharded over one of
            several mesh dimensions.
    """
    marks = {"ignore_index": ignore_index, "ood_index": ood_index}
    if isinstance(logits, DTensor):
        if process_group is not None:
            raise ValueError(
                "outlier_exposure_loss: logits that are a DTensor know their processes; "
                "process_group must be None"
            )
        if any(p.is_shard(_CLASS_AXIS) for p in logits.placements):
            return _class_parallel_of_dtensor(logits, target, alpha, reduction, marks)
    if reduction not in ("mean", "group_mean"):
        return _call(logits, target, alpha, reduction, marks)
    inlier, outlier = inliers_and_outliers(target, ignore_index, ood_index)
    if isinstance(logits, DTensor):
        sums = (inlier.sum(), outlier.sum(), torch.ones_like(inlier).sum())
        return _divided(logits, target, alpha, reduction, marks, sums, 1)
    counts = torch.stack(
        [inlier.sum(), outlier.sum(), torch.full_like(inlier, True).sum()]  # int64
    )
    dist.all_reduce(counts, group=process_group)
    size = dist.get_world_size(process_group)
    inliers, outliers, positions = counts.unbind()
    return _divided(logits, target, alpha, reduction, marks, (inliers, outliers, positions), size)


# ---- Shared classes


class _RowCrossEntropy(torch.autograd.Function):
    """The cross-entropy of each row, whose classes are spread over a group.

    Each process runs the fused operator over its own classes, which gives each row's maximum, its
    sum of exponentials and, from the cross-entropy to the uniform distribution, its sum of logits.
    Two all-reduces make them those of all classes: N maxima, and then 3 N sums (Shoeybi et al.,
    "Megatron-LM", arXiv 1909.08053, do so for cross-entropy). The backward sends nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        label: Tensor,
        inlier: Tensor,
        outlier: Tensor,
        group: dist.ProcessGroup | None,
        num_classes: int,
    ) -> Tensor:
        local_classes = logits.size(_CLASS_AXIS)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        is_here = inlier & (label >= 0) & (label < local_classes)
        # To the local operator all rows but those of no weight are outliers.
        counted = inlier | outlier
        lowest = torch.finfo(dtype).min
        if local_classes > 0:
            as_outlier = torch.where(counted, -1, -2)
            one = torch.ones((), dtype=dtype, device=logits.device)
            _, to_uniform, row_max, row_sum_exp, _, _ = _FORWARD(
                logits, as_outlier, 1.0, one, "none", -2, None, False
            )
        else:
            row_max = torch.full(label.shape, lowest, dtype=dtype, device=logits.device)
            row_sum_exp, to_uniform = torch.zeros_like(row_max), torch.zeros_like(row_max)
        global_max = row_max.clone()
        dist.all_reduce(global_max, dist.ReduceOp.MAX, group=group)

        sums = torch.zeros((3, *label.shape), dtype=dtype, device=logits.device)
        if local_classes > 0:
            raised = row_max - global_max
            sums[0] = row_sum_exp * raised.exp()
            # mean of (logit - max) = log(sum of exponentials) - cross-entropy; a row of nothing but
            # -inf has no exponentials
            shifted = torch.where(row_sum_exp == 0, -torch.inf, row_sum_exp.log() - to_uniform)
            sums[1] = local_classes * (shifted + raised)
            at_label = logits.gather(1, torch.where(is_here, label, 0).unsqueeze(1)).squeeze(1)
            sums[2] = torch.where(is_here, at_label.to(dtype) - global_max, 0)
        dist.all_reduce(sums, group=group)
        sum_exp, sum_shifted, at_label = sums.unbind()
        log_sum = sum_exp.log()
        ctx.save_for_backward(logits, label, is_here, counted, outlier, global_max, sum_exp)
        ctx.num_classes = num_classes
        zero = log_sum.new_zeros(())
        of_outlier = torch.where(outlier, log_sum - sum_shifted / num_classes, zero)
        return torch.where(inlier, log_sum - at_label, of_outlier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True, which would get a gradient of zero
            raise RuntimeError(
                "class_parallel_outlier_exposure_loss cannot be differentiated twice; "
                "oe_ext.outlier_exposure_loss of all classes can"
            )
        logits, label, is_here, counted, outlier, global_max, sum_exp = ctx.saved_tensors
        if logits.size(_CLASS_AXIS) == 0:
            return torch.zeros_like(logits), None, None, None, None, None
        grad = torch.where(counted, grad, 0)
        # softmax(x) - q, with q at the label: the operator's own. Where the label is elsewhere it
        # stands at class 0, and is taken out again.
        here = torch.where(is_here, label, 0)
        grad_logits = _BACKWARD(
            grad.contiguous(),
            logits,
            torch.where(counted, here, -2),
            global_max,
            sum_exp,
            label.new_empty(0),
            1.0,
            None,
            "none",
            -2,
            None,
        )
        first = logits.select(_CLASS_AXIS, 0).to(grad.dtype)
        p = (first - global_max).exp() / sum_exp
        grad_of_first = torch.where(counted & ~is_here, grad * p, 0).to(grad_logits.dtype)
        first_grad = grad_logits.select(_CLASS_AXIS, 0)
        first_grad.copy_(torch.where(counted & ~is_here, grad_of_first, first_grad))
        uniform = torch.where(outlier, grad / ctx.num_classes, 0)
        grad_logits.sub_(uniform.unsqueeze(_CLASS_AXIS))
        return grad_logits, None, None, None, None, None


def class_parallel_outlier_exposure_loss(
    local_logits: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    alpha: float | Tensor = 0.5,
    reduction: str | None = "mean",
    *,
    ignore_index: int | None = None,
    ood_index: int | None = None,
) -> Tensor:
    """The loss of logits whose classes are spread over a group of processes: a head that is too
    large for one, as of a vocabulary or of many faces.

    The processes hold neighbouring classes in the order of their ranks, each as many as it likes
    (also none), and each the same rows. They exchange 4 values a row, in two all-reduces (a maximum
    and sums), in float32 (float64 for float64 logits), and the sizes of their parts; the backward
    exchanges nothing. All get the same loss, and each the gradient of its own logits.

    Args:
        local_logits: ``[N, C_local]`` or ``[N, C_local, d1, ..., dk]``, as for
            :func:`oe_ext.outlier_exposure_loss`: the classes of this process.
        target: ``[N]`` or ``[N, d1, ..., dk]``: labels among all classes; the same everywhere.
        group: the processes; all of them by default.
        alpha, reduction, ignore_index, ood_index: as for :func:`oe_ext.outlier_exposure_loss`.

    Returns:
        The loss, as :func:`oe_ext.outlier_exposure_loss` of all classes in one process.

    Raises:
        ValueError, TypeError, IndexError: as :func:`oe_ext.outlier_exposure_loss`.
        RuntimeError: ``create_graph=True`` in the backward: it cannot be differentiated twice.
    """
    reduction = "none" if reduction is None else reduction
    marks = {"ignore_index": ignore_index, "ood_index": ood_index}
    # The operator's own checks, of no rows at all; and the sizes of the parts.
    if local_logits.dim() < 2 or local_logits.size(_CLASS_AXIS) > 0:
        _call(
            local_logits[:0],
            target[:0],
            alpha if not isinstance(alpha, Tensor) else 0.0,
            reduction,
            marks,
        )
        if local_logits.dim() - 1 != target.dim() or local_logits.size(0) != target.size(0):
            _call(local_logits, target, 0.0, reduction, marks)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.tensor([local_logits.size(_CLASS_AXIS)], device=local_logits.device)
    sizes = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(sizes, mine, group=group)
    per_rank = torch.cat(sizes).tolist()
    num_classes, offset = sum(per_rank), sum(per_rank[:rank])

    labels = target.long()
    inlier, outlier = inliers_and_outliers(labels, ignore_index, ood_index)
    is_bad = inlier & ((labels < 0) | (labels >= num_classes))
    if labels.device.type == "cpu":
        if is_bad.any():
            position = is_bad.nonzero()[0].tolist()
            raise IndexError(
                f"class_parallel_outlier_exposure_loss: target must hold classes in "
                f"[0, {num_classes}), or a mark; got {labels[is_bad][0].item()} at position "
                f"{position}"
            )
    else:
        torch._assert_async(~is_bad.any())

    dtype = torch.promote_types(local_logits.dtype, torch.float32)
    weight = torch.as_tensor(alpha, dtype=dtype, device=labels.device).expand(labels.shape)
    counted_outlier = outlier if weight.requires_grad else outlier & (weight != 0)
    cross_entropy: Tensor = _RowCrossEntropy.apply(  # type: ignore[no-untyped-call]
        local_logits, labels - offset, inlier, counted_outlier, group, num_classes
    )
    zero = cross_entropy.new_zeros(())
    weighted = torch.where(counted_outlier, weight * cross_entropy, zero)
    loss = torch.where(inlier, cross_entropy, weighted)
    if reduction == "none":
        return loss
    inlier_sum = torch.where(inlier, loss, zero).sum(dtype=torch.float64)
    outlier_sum = torch.where(inlier, zero, loss).sum(dtype=torch.float64)
    if reduction == "sum":
        total = inlier_sum + outlier_sum
    elif reduction == "mean":
        num_counted = (inlier | outlier).sum()
        total = (inlier_sum + outlier_sum) / (
            num_counted.clamp(min=1) if labels.numel() > 0 else num_counted
        )
    else:
        total = inlier_sum / inlier.sum().clamp(min=1) + outlier_sum / outlier.sum().clamp(min=1)
    return total.to(dtype)


def _class_parallel_of_dtensor(
    logits: DTensor, target: Tensor, alpha: float | Tensor, reduction: str, marks: dict[str, Any]
) -> Tensor:
    mesh = logits.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            "outlier_exposure_loss: sharded classes need a device mesh of one dimension, got "
            f"logits with placements {logits.placements} on {mesh}"
        )

    def everywhere(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    loss = class_parallel_outlier_exposure_loss(
        logits.to_local(),
        everywhere(target),
        mesh.get_group(),
        everywhere(alpha) if isinstance(alpha, Tensor) else alpha,
        reduction,
        **marks,
    )
    return DTensor.from_local(loss, mesh, [Replicate()], run_check=False)


# ---- DTensor: how the operators may be sharded. A batch that is sharded stays so; a mean needs
# counts of all, and its caller divides a sum (see _divided).


def _alpha_placement(alpha: Any, target: Any, dim: int) -> list[Any]:
    """None for a number. A tensor is sharded where it has the axis that is."""
    if not hasattr(alpha, "shape"):
        return []
    axis = dim - (len(target.shape) - len(alpha.shape))
    has_axis = axis >= 0 and alpha.shape[axis] != 1
    return [Shard(axis) if has_axis else Replicate()]


def _position_axes(target: Any) -> list[tuple[int, int]]:
    """The axes along which rows may be sharded: in target, and in logits."""
    return [(dim, dim if dim == 0 else dim + 1) for dim in range(len(target.shape))]


@register_sharding([_LOSS.default, _LOSS.tensor_alpha])  # type: ignore[untyped-decorator]
def _shard_loss(
    logits: Any, target: Any, alpha: Any = 0.5, reduction: str = "mean", **marks: Any
) -> list[tuple[list[Any], list[Any]]]:
    replicated = [Replicate()] * (3 if hasattr(alpha, "shape") else 2)
    shardings: list[tuple[list[Any], list[Any]]] = [([Replicate()], replicated)]
    if reduction in ("none", "sum"):
        for dim, logits_dim in _position_axes(target):
            inputs = [Shard(logits_dim), Shard(dim), *_alpha_placement(alpha, target, dim)]
            shardings.append(([Shard(dim) if reduction == "none" else Partial()], inputs))
    return shardings


@register_sharding(_FORWARD)  # type: ignore[untyped-decorator]
def _shard_forward(
    logits: Any,
    target: Any,
    alpha: float,
    alpha_tensor: Any,
    reduction: str,
    ignore_index: int | None,
    ood_index: int | None,
    unit_gradient: bool,
) -> list[tuple[list[Any], list[Any]]]:
    replicated = [Replicate()] * (2 if alpha_tensor is None else 3)
    shardings: list[tuple[list[Any], list[Any]]] = [([Replicate()] * 6, replicated)]
    if reduction in ("none", "sum") and not unit_gradient:
        for dim, logits_dim in _position_axes(target):
            rows = Shard(dim)
            outputs = [
                rows if reduction == "none" else Partial(),
                Replicate() if alpha_tensor is None else rows,  # empty without a tensor
                rows,
                rows,
                Replicate() if reduction == "none" else Partial(),
                Replicate(),  # no gradient: empty
            ]
            inputs = [Shard(logits_dim), rows, *_alpha_placement(alpha_tensor, target, dim)]
            shardings.append((outputs, inputs))
    return shardings


@register_sharding(_BACKWARD)  # type: ignore[untyped-decorator]
def _shard_backward(
    grad: Any,
    logits: Any,
    target: Any,
    row_max: Any,
    row_sum_exp: Any,
    counts: Any,
    alpha: float,
    alpha_tensor: Any,
    reduction: str,
    ignore_index: int | None,
    ood_index: int | None,
) -> list[tuple[list[Any], list[Any]]]:
    replicated = [Replicate()] * (6 if alpha_tensor is None else 7)
    shardings: list[tuple[list[Any], list[Any]]] = [([Replicate()], replicated)]
    for dim, logits_dim in _position_axes(target):
        rows = Shard(dim)
        inputs = [
            rows if reduction == "none" else Replicate(),
            Shard(logits_dim),
            rows,
            rows,
            rows,
            Replicate(),  # of all rows: what a mean divides by
            *_alpha_placement(alpha_tensor, target, dim),
        ]
        shardings.append(([Shard(logits_dim)], inputs))
    return shardings


# DTensor keeps what it decided for an operator, and register_sharding() lets only integers among
# the arguments tell one call from another. Here the reduction does.
for _operator, _first_setting in {
    _LOSS.default: 2,
    _LOSS.tensor_alpha: 3,
    _FORWARD: 2,
    _BACKWARD: 6,
}.items():
    _propagator = DTensor._op_dispatcher.sharding_propagator
    _propagator.op_to_schema_info[_operator] = RuntimeSchemaInfo(
        _first_setting, ["reduction", "ignore_index", "ood_index"], needs_pytree=True
    )

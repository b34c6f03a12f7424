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
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from oe_ext import _sharding  # noqa: F401
from oe_ext._checks import check_alpha, check_arguments
from oe_ext._class_parallel import class_parallel_outlier_exposure_loss, reduce_rows
from oe_ext.reference import inliers_and_outliers

__all__ = ["class_parallel_outlier_exposure_loss", "global_outlier_exposure_loss"]

_LOSS = torch.ops.oe_ext.outlier_exposure_loss

_CLASS_AXIS = 1


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
        ValueError: both a DTensor and a ``process_group``; classes that are sharded over several
            dimensions of the mesh.
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
    if not torch.compiler.is_dynamo_compiling():
        try:
            check_alpha(alpha)
            if not isinstance(logits, DTensor):
                check_arguments(logits, target, alpha, reduction)
        except (ValueError, TypeError):
            if process_group is not None:  # the others wait for our counts
                nothing = torch.zeros(3, dtype=torch.int64, device=target.device)
                dist.all_reduce(nothing, group=process_group)
            raise
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


def _class_parallel_of_dtensor(
    logits: DTensor, target: Tensor, alpha: float | Tensor, reduction: str, marks: dict[str, Any]
) -> Tensor:
    """Classes that are sharded over one dimension of the mesh, and maybe a batch over others."""
    mesh = logits.device_mesh
    check_alpha(alpha)
    class_dims = [dim for dim, p in enumerate(logits.placements) if p.is_shard(_CLASS_AXIS)]
    if len(class_dims) != 1:
        raise ValueError(
            "outlier_exposure_loss: classes may be sharded over one dimension of the mesh, got "
            f"logits with placements {logits.placements} on {mesh}"
        )
    if any(p.is_partial() for p in logits.placements):
        whole = [Replicate() if p.is_partial() else p for p in logits.placements]
        logits = logits.redistribute(placements=whole)
    # Along the others: a sharded batch, or copies.
    rows: list[Placement] = []
    for placement in logits.placements:
        if isinstance(placement, Shard) and placement.dim != _CLASS_AXIS:
            rows.append(Shard(placement.dim - (placement.dim > _CLASS_AXIS)))
        else:
            rows.append(Replicate())
    copies: list[Placement] = [Replicate()] * mesh.ndim

    def with_rows(tensor: Tensor) -> DTensor:
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, mesh, copies, run_check=False)
        return tensor.redistribute(placements=rows)

    target = with_rows(target)
    if isinstance(alpha, Tensor):
        if not isinstance(alpha, DTensor):
            alpha = DTensor.from_local(alpha, mesh, copies, run_check=False)
        alpha = with_rows(alpha.expand(target.shape)).to_local()
    # As DTensor cuts an axis: parts of equal size, the last ones less or empty.
    num_classes, num_parts = logits.size(_CLASS_AXIS), mesh.size(class_dims[0])
    part = -(-num_classes // num_parts)
    class_sizes = [min(part, max(0, num_classes - i * part)) for i in range(num_parts)]
    local_loss = class_parallel_outlier_exposure_loss(
        logits.to_local(),
        target.to_local(),
        mesh.get_group(class_dims[0]),
        alpha,
        "none",
        **marks,
        class_sizes=class_sizes,
    )
    row_loss = DTensor.from_local(
        local_loss, mesh, rows, run_check=False, shape=target.shape, stride=target.stride()
    )
    return reduce_rows(row_loss, *inliers_and_outliers(target, **marks), reduction)

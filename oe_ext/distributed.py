"""The loss of a batch, or of classes, that several processes share.

- :func:`global_outlier_exposure_loss`: each process has a part of the batch.
- :func:`class_parallel_outlier_exposure_loss`: each process has a part of the classes.
- Importing this module tells :class:`~torch.distributed.tensor.DTensor` how to shard the operators.
  :func:`oe_ext.outlier_exposure_loss` imports it when it gets a DTensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from oe_ext import _sharding  # noqa: F401
from oe_ext._checks import check_alpha, check_arguments
from oe_ext._class_parallel import class_parallel_outlier_exposure_loss
from oe_ext._reductions import count_groups, find_reduction, reduce_rows
from oe_ext.functional import call_operator
from oe_ext.reference import inliers_and_outliers, weights_of_inliers

__all__ = ["class_parallel_outlier_exposure_loss", "global_outlier_exposure_loss"]

_CLASS_AXIS = 1


def _call(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str,
    options: dict[str, Any],
    counts: Tensor | None = None,
    align_corners: bool | None = None,
) -> Tensor:
    """Calls the operator. Its means divide by ``counts``, if given."""
    weight = _replicated(options["weight"], logits)
    return call_operator(
        logits,
        target,
        alpha,
        reduction,
        options | {"weight": weight},
        _replicated(counts, logits),
        by_forward=weight is not None,  # DTensor reads no rule for a tensor that is a keyword
        align_corners=align_corners,
    )


def _replicated(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """If ``like`` is a DTensor, a tensor that each process has becomes one, too."""
    if tensor is None or isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    copies = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(tensor, like.device_mesh, copies, run_check=False)


def global_outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    reduction: str = "mean",
    process_group: dist.ProcessGroup | None = None,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    counts: Tensor | None = None,
    ignore_index: int | None = None,
    ood_index: int | None = None,
    align_corners: bool | None = None,
) -> Tensor:
    """The loss of a batch that is spread over the processes of a group, or sharded as a DTensor.

    :func:`oe_ext.outlier_exposure_loss` calls this for a ``process_group`` or a DTensor, and
    documents the arguments. ``align_corners`` is that of logits that are upsampled; else None.

    With a ``process_group``, ``"mean"`` and ``"group_mean"`` divide by the average of the
    processes' counts (for inliers with a ``weight``, their summed weights). Averaged over the
    processes, the losses and the gradients then equal those of the whole batch in one process.
    ``"sum"`` and ``"none"`` apply to the local part. One all-reduce sends three numbers.

    With a DTensor, the result is that of the whole batch. A sharded batch gives a sharded loss for
    ``"none"``, and partial sums otherwise. Logits with sharded classes (``Shard(1)``) go to
    :func:`class_parallel_outlier_exposure_loss`.

    Raises:
        ValueError: a DTensor together with a ``process_group``, or classes that are sharded over
            several dimensions of the mesh.
    """
    special_labels = {"ignore_index": ignore_index, "ood_index": ood_index}
    options: dict[str, Any] = {
        **special_labels,
        "weight": weight,
        "label_smoothing": label_smoothing,
    }
    if isinstance(logits, DTensor):
        if process_group is not None:
            raise ValueError(
                "outlier_exposure_loss: logits that are a DTensor know their processes; "
                "process_group must be None"
            )
        if any(p.is_shard(_CLASS_AXIS) for p in logits.placements):
            return _class_parallel_of_dtensor(logits, target, alpha, reduction, options, counts)
    if counts is not None or not find_reduction(reduction).counts:
        return _call(logits, target, alpha, reduction, options, counts, align_corners)
    if not torch.compiler.is_dynamo_compiling():
        try:
            check_alpha(alpha)
            if not isinstance(logits, DTensor):
                check_arguments(
                    logits, target, alpha, reduction, weight, label_smoothing, align_corners
                )
        except (ValueError, TypeError):
            if process_group is not None:  # the other processes wait for our counts
                nothing = torch.zeros(3, dtype=torch.float64, device=target.device)
                dist.all_reduce(nothing, group=process_group)
            raise
    inlier, outlier = inliers_and_outliers(target, ignore_index, ood_index)
    in_loss_dtype = weight
    if weight is not None:
        in_loss_dtype = weight.to(torch.promote_types(logits.dtype, torch.float32))
    of_groups = count_groups(target, inlier, outlier, _replicated(in_loss_dtype, logits))
    # What a mean divides by, and positions of any kind.
    numbers = torch.cat([of_groups, torch.ones_like(inlier).sum().double().unsqueeze(0)])
    num_parts = 1
    if not isinstance(logits, DTensor):
        dist.all_reduce(numbers, group=process_group)
        num_parts = dist.get_world_size(process_group)
    counts = numbers[:2] / num_parts
    if find_reduction(reduction).empty_is_nan:
        counts = torch.where(numbers[2] == 0, torch.nan, counts)
    return _call(logits, target, alpha, reduction, options, counts, align_corners)


def _class_parallel_of_dtensor(
    logits: DTensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str,
    options: dict[str, Any],
    counts: Tensor | None,
) -> Tensor:
    """The loss of classes that are sharded over one mesh dimension. Others may shard the batch."""
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
    # The other mesh dimensions hold a sharded batch, or copies.
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
    weight = options["weight"]
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    # DTensor splits an axis into parts of equal size; the last ones are smaller or empty.
    num_classes, num_parts = logits.size(_CLASS_AXIS), mesh.size(class_dims[0])
    part = -(-num_classes // num_parts)
    class_sizes = [min(part, max(0, num_classes - i * part)) for i in range(num_parts)]
    local_loss = class_parallel_outlier_exposure_loss(
        logits.to_local(),
        target.to_local(),
        mesh.get_group(class_dims[0]),
        alpha,
        "none",
        **options | {"weight": weight},
        class_sizes=class_sizes,
    )
    row_loss = DTensor.from_local(
        local_loss, mesh, rows, run_check=False, shape=target.shape, stride=target.stride()
    )
    inlier, outlier = inliers_and_outliers(target, options["ignore_index"], options["ood_index"])
    inlier_weights = None
    if weight is not None:
        weight = _replicated(weight.to(local_loss.dtype), logits)
        inlier_weights = weights_of_inliers(target, inlier, weight)
    given = None if counts is None else _replicated(counts, logits)
    return reduce_rows(
        row_loss,
        inlier,
        outlier,
        reduction,
        inlier_weights=inlier_weights,
        counts=None if given is None else (given[0], given[1]),
    )

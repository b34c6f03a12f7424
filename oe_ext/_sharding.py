"""How a DTensor may shard the operators. Importing this module registers the rules.

A sharded batch stays sharded. A mean needs the counts of all parts; distributed.py passes them to
the forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from oe_ext._reductions import find_reduction

_LOSS = torch.ops.oe_ext.outlier_exposure_loss
_FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward.default
_BACKWARD = torch.ops.oe_ext._outlier_exposure_loss_backward.default


def _alpha_placement(alpha: Any, target: Any, dim: int) -> list[Any]:
    """Empty for a number. A tensor is sharded if it has the sharded axis."""
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
    logits: Any, target: Any, alpha: Any = 0.5, reduction: str = "mean", **options: Any
) -> list[tuple[list[Any], list[Any]]]:
    replicated = [Replicate()] * (3 if hasattr(alpha, "shape") else 2)
    shardings: list[tuple[list[Any], list[Any]]] = [([Replicate()], replicated)]
    rule = find_reduction(reduction)
    if not rule.counts:
        for dim, logits_dim in _position_axes(target):
            inputs = [Shard(logits_dim), Shard(dim), *_alpha_placement(alpha, target, dim)]
            shardings.append(([Partial() if rule.is_scalar else Shard(dim)], inputs))
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
    unit_gradient: bool | None = None,
    counts: Any = None,
    num_classes: int | None = None,
    first_class: int = 0,
    weight: Any = None,
    label_smoothing: float = 0.0,
) -> list[tuple[list[Any], list[Any]]]:
    others = [Replicate()] * ((counts is not None) + (weight is not None))
    replicated = [Replicate()] * ((2 if alpha_tensor is None else 3) + len(others))
    shardings: list[tuple[list[Any], list[Any]]] = [([Replicate()] * 6, replicated)]
    rule = find_reduction(reduction)
    if (counts is not None or not rule.counts) and not unit_gradient:
        for dim, logits_dim in _position_axes(target):
            rows = Shard(dim)
            # Given counts are returned unchanged; those of a sum are of these rows.
            outputs = [
                Partial() if rule.is_scalar else rows,
                Replicate() if alpha_tensor is None else rows,  # empty without a tensor
                rows,
                rows,
                Partial() if rule.is_scalar and counts is None else Replicate(),
                Replicate(),  # no gradient: empty
            ]
            inputs = [Shard(logits_dim), rows, *_alpha_placement(alpha_tensor, target, dim)]
            shardings.append((outputs, [*inputs, *others]))
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
    num_classes: int | None = None,
    first_class: int = 0,
    weight: Any = None,
    label_smoothing: float = 0.0,
) -> list[tuple[list[Any], list[Any]]]:
    of_weight = [] if weight is None else [Replicate()]
    replicated = [Replicate()] * ((6 if alpha_tensor is None else 7) + len(of_weight))
    shardings: list[tuple[list[Any], list[Any]]] = [([Replicate()], replicated)]
    for dim, logits_dim in _position_axes(target):
        rows = Shard(dim)
        inputs = [
            Replicate() if find_reduction(reduction).is_scalar else rows,
            Shard(logits_dim),
            rows,
            rows,
            rows,
            Replicate(),  # counts of all rows, which a mean divides by
            *_alpha_placement(alpha_tensor, target, dim),
            *of_weight,
        ]
        shardings.append(([Shard(logits_dim)], inputs))
    return shardings


# DTensor caches its decision for an operator. register_sharding() lets only integer arguments
# distinguish calls; here the reduction must, too.
_SETTINGS = ["reduction", "ignore_index", "ood_index", "num_classes", "first_class"]
for _operator, _first_setting in {
    _LOSS.default: 2,
    _LOSS.tensor_alpha: 3,
    _FORWARD: 2,
    _BACKWARD: 6,
}.items():
    _propagator = DTensor._op_dispatcher.sharding_propagator
    _propagator.op_to_schema_info[_operator] = RuntimeSchemaInfo(
        _first_setting, _SETTINGS, needs_pytree=True
    )

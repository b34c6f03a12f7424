"""Batching rules of the operators for ``torch.vmap``.

Rows are independent, so the batch joins the rows: one call of the operator with the reduction
"none", then one sum per sample. A class weight multiplies the loss of its inliers, so that each
sample may have other weights. Importing this module registers the rules; the loss itself uses that
of its forward (csrc/ops/outlier_exposure.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oe_ext._checks import check_arguments
from oe_ext._reductions import Reduction, find_reduction, reduce_rows
from oe_ext._sums import sum_from_axis
from oe_ext.reference import inliers_and_outliers

_FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward.default
_BACKWARD = torch.ops.oe_ext._outlier_exposure_loss_backward.default


def _batch_first(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _sample(tensor: Tensor, dim: int | None) -> Tensor:
    """The shape and dtype of one sample, without data: the batch may be empty."""
    shape = list(tensor.shape)
    if dim is not None:
        del shape[dim]
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def _dim(in_dims: tuple[int | None, ...], argument: int) -> int | None:
    """None for an argument that was not passed."""
    return in_dims[argument] if argument < len(in_dims) else None


class _Batch:
    """The inputs of the loss, with the batch joined to the rows."""

    def __init__(
        self,
        batch_size: int,
        logits: tuple[Tensor, int | None],
        target: tuple[Tensor, int | None],
        alpha: tuple[Tensor | None, int | None],
        weight: tuple[Tensor | None, int | None],
        reduction: str,
        ignore_index: int | None,
        ood_index: int | None,
        label_smoothing: float,
    ) -> None:
        # Checks one sample, because its shapes are those that the caller knows.
        check_arguments(
            _sample(*logits),
            _sample(*target),
            0.0 if alpha[0] is None else _sample(alpha[0], alpha[1]),
            reduction,
            None if weight[0] is None else _sample(weight[0], weight[1]),
            label_smoothing,
        )
        self.size = batch_size
        self.logits = self.rows(*logits)
        batched_target = _batch_first(*target, batch_size)
        self.shape = batched_target.shape
        self.target = batched_target.flatten(0, 1)
        self.alpha: Tensor | None = None
        if alpha[0] is not None:
            values = _batch_first(alpha[0], alpha[1], batch_size)
            missing = len(self.shape) - values.dim()
            values = values.reshape(batch_size, *[1] * missing, *values.shape[1:])
            self.alpha = values.expand(self.shape).flatten(0, 1)
        inlier, outlier = inliers_and_outliers(batched_target, ignore_index, ood_index)
        self.inlier, self.outlier = inlier.flatten(1), outlier.flatten(1)
        self.inlier_weights: Tensor | None = None  # [batch, positions]
        self.weight: Tensor | None = None  # for the operator
        if weight[0] is not None:
            dtype = torch.promote_types(logits[0].dtype, torch.float32)
            weights = _batch_first(weight[0], weight[1], batch_size).to(dtype).double()
            labels = torch.where(self.inlier, batched_target.flatten(1).long(), 0)
            labels = labels.clamp(0, weights.shape[1] - 1)
            self.inlier_weights = torch.where(self.inlier, weights.gather(1, labels), 0.0)
            if label_smoothing != 0:  # not of each sample (_by_sample), or there is no sample
                self.weight = weights.new_ones(weights.shape[1:]) if batch_size == 0 else weights[0]

    def rows(self, tensor: Tensor, dim: int | None) -> Tensor:
        return _batch_first(tensor, dim, self.size).flatten(0, 1)

    def samples(self, rows: Tensor) -> Tensor:
        """The inverse of rows()."""
        return rows.reshape(*self.shape[:2], *rows.shape[1:])

    def counts(self) -> Tensor:
        """What a mean of each sample divides by: [batch, 2]."""
        of_inliers = self.inlier.sum(1).double()
        if self.inlier_weights is not None:
            of_inliers = sum_from_axis(self.inlier_weights, 1)
        return torch.stack([of_inliers, self.outlier.sum(1).double()], dim=1)

    def weighted(self, per_row: Tensor) -> Tensor:
        """Multiplies the values of inliers by their class weights, unless the operator does."""
        if self.inlier_weights is None or self.weight is not None:
            return per_row
        factors = self.inlier_weights.to(per_row.dtype).reshape(self.shape).flatten(0, 1)
        return torch.where(self.inlier.reshape(factors.shape), per_row * factors, per_row)

    def divisors(self, reduction: Reduction, counts: Tensor) -> Tensor:
        """The divisor of each position's loss: [batch, positions]."""
        inliers, outliers = reduction.divisors(counts[:, :1], counts[:, 1:])
        return torch.where(self.outlier, outliers, inliers)

    def reduce(self, row_loss: Tensor, reduction: Reduction, given: Tensor | None = None) -> Tensor:
        """Reduces the losses of all rows to one loss per sample; ``given``: counts to divide by."""
        losses = self.samples(row_loss)
        if not reduction.is_scalar:
            return losses
        counts = None if given is None else (given[:, 0], given[:, 1])
        return reduce_rows(
            losses.flatten(1),
            self.inlier,
            self.outlier,
            reduction.name,
            first_axis=1,
            inlier_weights=self.inlier_weights,
            counts=counts,
        )


def _forward_rule(
    info: Any,
    in_dims: tuple[int | None, ...],
    logits: Tensor,
    target: Tensor,
    alpha: float,
    alpha_tensor: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    ood_index: int | None,
    unit_gradient: bool | None = None,
    counts: Tensor | None = None,
    num_classes: int | None = None,
    first_class: int = 0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    if unit_gradient:
        raise RuntimeError("_outlier_exposure_loss_forward: no unit_gradient under vmap")
    batch = _Batch(
        info.batch_size,
        (logits, in_dims[0]),
        (target, in_dims[1]),
        (alpha_tensor, in_dims[3]),
        (weight, _dim(in_dims, 11)),
        reduction,
        ignore_index,
        ood_index,
        label_smoothing,
    )
    row_loss, cross_entropy, row_max, row_sum_exp, no_counts, no_gradient = _FORWARD(
        batch.logits,
        batch.target,
        alpha,
        batch.alpha,
        "none",
        ignore_index,
        ood_index,
        False,
        None,
        num_classes,
        first_class,
        batch.weight,
        label_smoothing,
    )
    row_loss = batch.weighted(row_loss)
    rule = find_reduction(reduction)
    has_alpha = alpha_tensor is not None
    given = None if counts is None else _batch_first(counts, _dim(in_dims, 8), batch.size)
    used_counts = no_counts
    if rule.is_scalar:
        used_counts = batch.counts() if given is None else given.clone()
    outputs = (
        batch.reduce(row_loss, rule, given),
        batch.samples(batch.weighted(cross_entropy)) if has_alpha else cross_entropy,
        batch.samples(row_max),
        batch.samples(row_sum_exp),
        used_counts,
        no_gradient,
    )
    return outputs, (0, 0 if has_alpha else None, 0, 0, 0 if rule.is_scalar else None, None)


def _backward_rule(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    row_max: Tensor,
    row_sum_exp: Tensor,
    counts: Tensor,
    alpha: float,
    alpha_tensor: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    ood_index: int | None,
    num_classes: int | None = None,
    first_class: int = 0,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, int]:
    batch = _Batch(
        info.batch_size,
        (logits, in_dims[1]),
        (target, in_dims[2]),
        (alpha_tensor, in_dims[7]),
        (weight, _dim(in_dims, 13)),
        reduction,
        ignore_index,
        ood_index,
        label_smoothing,
    )
    upstream = _batch_first(grad, in_dims[0], info.batch_size)
    rule = find_reduction(reduction)
    if rule.is_scalar:
        sample_counts = _batch_first(counts, in_dims[5], info.batch_size)
        divisors = batch.divisors(rule, sample_counts).to(upstream.dtype)
        upstream = (upstream.unsqueeze(1) / divisors).reshape(batch.shape)
    grad_rows = _BACKWARD(
        batch.weighted(upstream.flatten(0, 1)),
        batch.logits,
        batch.target,
        batch.rows(row_max, in_dims[3]),
        batch.rows(row_sum_exp, in_dims[4]),
        counts.new_empty(0),
        alpha,
        batch.alpha,
        "none",
        ignore_index,
        ood_index,
        num_classes,
        first_class,
        batch.weight,
        label_smoothing,
    )
    return batch.samples(grad_rows), 0


def _by_sample(operator: Any, rule: Callable[..., Any], weight_index: int) -> Callable[..., Any]:
    """The rule; but one call per sample if samples smooth their labels with other weights, which
    are no factors of the rows. The smoothing follows the weight in the schema."""

    def chosen(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        smoothing = args[weight_index + 1 :]
        if _dim(in_dims, weight_index) is None or smoothing in ((), (0.0,)) or info.batch_size == 0:
            return rule(info, in_dims, *args)

        def sample(i: int) -> list[Any]:
            pairs = zip(args, in_dims, strict=True)
            return [x if dim is None else x.select(dim, i) for x, dim in pairs]

        results = [operator(*sample(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return chosen


_LIBRARY = torch.library.Library("oe_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
_RULES: dict[str, tuple[Any, Callable[..., Any], int]] = {
    "_outlier_exposure_loss_forward": (_FORWARD, _forward_rule, 11),
    "_outlier_exposure_loss_backward": (_BACKWARD, _backward_rule, 13),
}
for _name, _rule in _RULES.items():
    # A second import, after the first was removed from sys.modules, finds them registered.
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"oe_ext::{_name}", "FuncTorchBatched"):
        torch.library.register_vmap(f"oe_ext::{_name}", _by_sample(*_rule), lib=_LIBRARY)

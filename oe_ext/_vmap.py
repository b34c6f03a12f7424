"""Batching rules of the operators for ``torch.vmap``.

Rows are independent, so the batch joins the rows: one call of the operator with the reduction
"none", then one sum per sample. Importing this module registers the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oe_ext._checks import check_arguments
from oe_ext._reductions import Reduction, find_reduction, reduce_rows
from oe_ext.reference import inliers_and_outliers

_LOSS = torch.ops.oe_ext.outlier_exposure_loss
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


class _Batch:
    """The inputs of the loss, with the batch joined to the rows."""

    def __init__(
        self,
        batch_size: int,
        logits: tuple[Tensor, int | None],
        target: tuple[Tensor, int | None],
        alpha: tuple[float | Tensor | None, int | None],
        reduction: str,
        ignore_index: int | None,
        ood_index: int | None,
    ) -> None:
        # Checks one sample, because its shapes are those that the caller knows.
        check_arguments(
            _sample(*logits),
            _sample(*target),
            _sample(alpha[0], alpha[1]) if isinstance(alpha[0], Tensor) else alpha[0] or 0.0,
            reduction,
        )
        self.size = batch_size
        self.logits = self.rows(*logits)
        batched_target = _batch_first(*target, batch_size)
        self.shape = batched_target.shape
        self.target = batched_target.flatten(0, 1)
        self.alpha: Tensor | None = None
        if isinstance(alpha[0], Tensor):
            weight = _batch_first(alpha[0], alpha[1], batch_size)
            missing = len(self.shape) - weight.dim()
            weight = weight.reshape(batch_size, *[1] * missing, *weight.shape[1:])
            self.alpha = weight.expand(self.shape).flatten(0, 1)
        inlier, outlier = inliers_and_outliers(batched_target, ignore_index, ood_index)
        self.inlier, self.outlier = inlier.flatten(1), outlier.flatten(1)

    def rows(self, tensor: Tensor, dim: int | None) -> Tensor:
        return _batch_first(tensor, dim, self.size).flatten(0, 1)

    def samples(self, rows: Tensor) -> Tensor:
        """The inverse of rows()."""
        return rows.reshape(*self.shape[:2], *rows.shape[1:])

    def counts(self) -> Tensor:
        """The numbers of inliers and of outliers of each sample: [batch, 2]."""
        return torch.stack([self.inlier.sum(1), self.outlier.sum(1)], dim=1).double()

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
            counts=counts,
        )


def _loss_rule(
    info: Any,
    in_dims: tuple[int | None, ...],
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    reduction: str = "mean",
    *,
    ignore_index: int | None = None,
    ood_index: int | None = None,
) -> tuple[Tensor, int]:
    is_tensor = isinstance(alpha, Tensor)
    batch = _Batch(
        info.batch_size,
        (logits, in_dims[0]),
        (target, in_dims[1]),
        (alpha, in_dims[2] if is_tensor else None),  # a default has no dim
        reduction,
        ignore_index,
        ood_index,
    )
    operator = _LOSS.tensor_alpha if is_tensor else _LOSS.default
    row_loss = operator(
        batch.logits,
        batch.target,
        batch.alpha if is_tensor else alpha,
        "none",
        ignore_index=ignore_index,
        ood_index=ood_index,
    )
    return batch.reduce(row_loss, find_reduction(reduction)), 0


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
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    if unit_gradient:
        raise RuntimeError("_outlier_exposure_loss_forward: no unit_gradient under vmap")
    batch = _Batch(
        info.batch_size,
        (logits, in_dims[0]),
        (target, in_dims[1]),
        (alpha_tensor, in_dims[3]),
        reduction,
        ignore_index,
        ood_index,
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
    )
    rule = find_reduction(reduction)
    has_alpha = alpha_tensor is not None
    given = None if counts is None else _batch_first(counts, in_dims[8], batch.size)
    used_counts = no_counts
    if rule.is_scalar:
        used_counts = batch.counts() if given is None else given.clone()
    outputs = (
        batch.reduce(row_loss, rule, given),
        batch.samples(cross_entropy) if has_alpha else cross_entropy,
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
) -> tuple[Tensor, int]:
    batch = _Batch(
        info.batch_size,
        (logits, in_dims[1]),
        (target, in_dims[2]),
        (alpha_tensor, in_dims[7]),
        reduction,
        ignore_index,
        ood_index,
    )
    upstream = _batch_first(grad, in_dims[0], info.batch_size)
    rule = find_reduction(reduction)
    if rule.is_scalar:
        sample_counts = _batch_first(counts, in_dims[5], info.batch_size)
        divisors = batch.divisors(rule, sample_counts).to(upstream.dtype)
        upstream = (upstream.unsqueeze(1) / divisors).reshape(batch.shape)
    grad_rows = _BACKWARD(
        upstream.flatten(0, 1),
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
    )
    return batch.samples(grad_rows), 0


_LIBRARY = torch.library.Library("oe_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
_RULES: dict[str, Callable[..., Any]] = {
    "outlier_exposure_loss": _loss_rule,
    "outlier_exposure_loss.tensor_alpha": _loss_rule,
    "_outlier_exposure_loss_forward": _forward_rule,
    "_outlier_exposure_loss_backward": _backward_rule,
}
for _name, _rule in _RULES.items():
    torch.library.register_vmap(f"oe_ext::{_name}", _rule, lib=_LIBRARY)

"""The reductions: the one place in Python that knows their names and divisors, as
``csrc/core/reduction.h`` is for the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oe_ext._sums import sum_from_axis
from oe_ext.reference import weights_of_inliers

__all__ = ["REDUCTIONS", "Reduction", "count_groups", "find_reduction", "reduce_rows"]

_INLIERS, _OUTLIERS = 0, 1


class Reduction(NamedTuple):
    name: str
    #: False: one loss per position.
    is_scalar: bool = True
    #: The losses of each group are divided by the counts of these groups. Without groups they stay
    #: a sum.
    inliers_by: tuple[int, ...] = ()
    outliers_by: tuple[int, ...] = ()
    #: NaN if there are no positions at all, like torch's mean().
    empty_is_nan: bool = False

    @property
    def counts(self) -> bool:
        """Whether it divides by counts."""
        return bool(self.inliers_by or self.outliers_by)

    def divisors(self, num_inliers: Tensor, num_outliers: Tensor) -> tuple[Tensor, Tensor]:
        """The divisors of the losses of inliers and of outliers. Counts of 0 give infinity, so that
        the mean is 0: nothing is there, or all of it has a class weight of 0."""
        members = (num_inliers, num_outliers)

        def divisor(groups: tuple[int, ...]) -> Tensor:
            if not groups:
                return torch.ones_like(num_inliers)
            total = sum((members[group] for group in groups[1:]), members[groups[0]])
            return torch.where(total == 0, torch.inf, total)

        return divisor(self.inliers_by), divisor(self.outliers_by)


_ALL = (_INLIERS, _OUTLIERS)

REDUCTIONS = {
    reduction.name: reduction
    for reduction in (
        Reduction("none", is_scalar=False),
        Reduction("sum"),
        Reduction("mean", inliers_by=_ALL, outliers_by=_ALL, empty_is_nan=True),
        Reduction("group_mean", inliers_by=(_INLIERS,), outliers_by=(_OUTLIERS,)),
    )
}


def find_reduction(name: str, caller: str = "outlier_exposure_loss") -> Reduction:
    """
    Raises:
        ValueError: the name is unknown.
    """
    reduction = REDUCTIONS.get(name)
    if reduction is None:
        known = ", ".join(map(repr, REDUCTIONS))
        raise ValueError(f"{caller}: reduction must be one of {known}, got {name!r}")
    return reduction


def count_groups(target: Tensor, inlier: Tensor, outlier: Tensor, weight: Tensor | None) -> Tensor:
    """What a mean divides by: the number of inliers, or their summed class weights, and the number
    of outliers, in float64."""
    of_inliers = sum_from_axis(weights_of_inliers(target, inlier, weight))
    return torch.stack([of_inliers, outlier.sum().double()])


def reduce_rows(
    row_loss: Tensor,
    inlier: Tensor,
    outlier: Tensor,
    name: str,
    *,
    first_axis: int = 0,
    inlier_weights: Tensor | None = None,
    counts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Reduces the losses of positions, 0 for ignored ones, over the axes from ``first_axis`` on.
    The axes before it are a batch: one loss per sample. A mean divides by the sum of
    ``inlier_weights``, without them by the number of inliers, and by the number of outliers;
    ``counts`` replace both."""
    reduction = find_reduction(name)
    if not reduction.is_scalar:
        return row_loss
    zero = torch.zeros_like(row_loss)
    inlier_sum = sum_from_axis(torch.where(inlier, row_loss, zero).double(), first_axis)
    outlier_sum = sum_from_axis(torch.where(inlier, zero, row_loss).double(), first_axis)
    is_empty = counts is None and row_loss.shape[first_axis:].numel() == 0
    if counts is None:
        axes = list(range(first_axis, row_loss.dim()))
        weights = inlier_weights
        num_inliers = inlier.sum(axes) if weights is None else sum_from_axis(weights, first_axis)
        counts = num_inliers, outlier.sum(axes)
    of_inliers, of_outliers = reduction.divisors(*counts)
    if reduction.inliers_by == reduction.outliers_by:
        total = (inlier_sum + outlier_sum) / of_inliers
    else:
        total = inlier_sum / of_inliers + outlier_sum / of_outliers
    if reduction.empty_is_nan and is_empty:
        total = total / 0
    return total.to(row_loss.dtype)

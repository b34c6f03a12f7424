"""Sums of floats whose bits do not depend on the number of threads, as in csrc/autograd/sums.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["expand", "sum_from_axis"]


def sum_from_axis(values: Tensor, first: int = 0, *, rank: int | None = None) -> Tensor:
    """The sum over the axes from ``first`` on. ATen splits a single sum among its threads, but does
    not split two sums. torch.fx cannot infer ``rank`` and needs it."""
    rank = values.dim() if rank is None else rank
    twice = values.contiguous().unsqueeze(0).expand(2, *[-1] * rank)
    return twice.sum(list(range(first + 1, rank + 1))).select(0, 0)


def expand(values: Tensor, shape: Sequence[int]) -> Tensor:
    """``values.expand(shape)``, whose derivative is a ``sum_from_axis``."""
    rank = len(shape)
    values = values.reshape(*[1] * (rank - values.dim()), *values.shape)
    axes = sorted(range(rank), key=lambda axis: values.shape[axis] != shape[axis])
    # In two steps: the derivative of the second computes two sums at a time, over neighbours.
    twice = values.permute(axes).unsqueeze(0).expand(2, *[-1] * rank)
    expanded = twice.expand(2, *(shape[axis] for axis in axes)).select(0, 0)
    return expanded.permute([axes.index(axis) for axis in range(rank)])

"""Sums of floats with the same bits for any number of threads, as csrc/autograd/sums.h has them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["expand", "sum_from_axis"]


def sum_from_axis(values: Tensor, first: int = 0, *, rank: int | None = None) -> Tensor:
    """The sum over the axes from ``first`` on. ATen splits a lone sum among its threads; of two of
    them each stays whole. Where torch.fx traces, it knows no ``rank``."""
    rank = values.dim() if rank is None else rank
    twice = values.contiguous().unsqueeze(0).expand(2, *[-1] * rank)
    return twice.sum(list(range(first + 1, rank + 1))).select(0, 0)


def expand(values: Tensor, shape: Sequence[int]) -> Tensor:
    """``values.expand(shape)``, with a derivative that is a sum of the above."""
    rank = len(shape)
    values = values.reshape(*[1] * (rank - values.dim()), *values.shape)
    axes = sorted(range(rank), key=lambda axis: values.shape[axis] != shape[axis])
    # In two steps, the derivative of the second of which sums two at a time, over neighbours.
    twice = values.permute(axes).unsqueeze(0).expand(2, *[-1] * rank)
    expanded = twice.expand(2, *(shape[axis] for axis in axes)).select(0, 0)
    return expanded.permute([axes.index(axis) for axis in range(rank)])

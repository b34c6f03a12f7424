"""Sums of floats with the same bits for any number of threads, as csrc/sums.h has them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["sum_from_axis"]


def sum_from_axis(values: Tensor, first: int = 0, *, rank: int | None = None) -> Tensor:
    """The sum over the axes from ``first`` on. ATen splits a lone sum among its threads; of two of
    them each stays whole. Where torch.fx traces, it knows no ``rank``."""
    rank = values.dim() if rank is None else rank
    twice = values.contiguous().unsqueeze(0).expand(2, *[-1] * rank)
    return twice.sum(list(range(first + 1, rank + 1))).select(0, 0)

"""Checks that Python makes before the operator would: where its own would come too late, or could
not name what the caller handed in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_alpha", "check_arguments"]

_LOSS = torch.ops.oe_ext.outlier_exposure_loss


def check_alpha(alpha: float | Tensor) -> None:
    """For callers that make another tensor of alpha, in which the operator would not notice."""
    if not isinstance(alpha, Tensor):
        if not math.isfinite(alpha):
            raise ValueError(f"outlier_exposure_loss: alpha must be a finite number, got {alpha}")
    elif not alpha.is_floating_point():
        raise TypeError(
            "outlier_exposure_loss: a tensor alpha must have a floating-point dtype, got "
            f"{alpha.dtype}"
        )


def check_arguments(logits: Tensor, target: Tensor, alpha: float | Tensor, reduction: str) -> None:
    """Raises what the operator raises for shapes, dtypes and settings: its kernel for tensors
    without data checks all but the labels."""
    with torch.no_grad():
        if isinstance(alpha, Tensor):
            alpha = alpha.to("meta")
            _LOSS.tensor_alpha(logits.to("meta"), target.to("meta"), alpha, reduction)
        else:
            _LOSS.default(logits.to("meta"), target.to("meta"), alpha, reduction)

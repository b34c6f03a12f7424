"""The byte model: what a loss moves between the processor and its memory, at the least.

It counts passes, each one read or one write of all logits. What has just been read comes from a
cache when it is read again, and does not count twice.
"""

from __future__ import annotations

import math

import torch
from cases import Shape


def passes(rival: str, dtype: str, reduction: str, inference: bool) -> int:
    """Of one forward and backward, or of the forward alone; 0 for a rival without a model."""
    if rival == "clone":
        return 2
    if rival == "ours":
        if inference:
            return 1
        # The forward writes the gradient of a scalar loss while it has the logits at hand.
        # Elsewhere, and in float16, the backward reads them again.
        return 3 if reduction == "none" or dtype == "float16" else 2
    if rival == "cross_entropy":
        # log_softmax reads and writes; the gradient of nll_loss is filled with zeros; that of
        # log_softmax reads this and the result of the forward, and writes.
        return 2 if inference else 6
    if rival == "quack":
        return 1 if inference else 3  # the backward reads the logits again
    if rival == "liger":
        return 1 if inference else 2  # the forward writes the gradient over the logits
    return 0


def model_bytes(
    rival: str, shape: Shape, dtype: str, target_dtype: str, reduction: str, inference: bool
) -> int:
    """The passes over the logits, and one read of the labels; 0 for a rival without a model."""
    count = passes(rival, dtype, reduction, inference)
    elements = math.prod(shape)
    logits = count * elements * getattr(torch, dtype).itemsize
    if rival == "clone" or count == 0:
        return logits
    # The others take labels of int64 alone.
    label_bytes = getattr(torch, target_dtype).itemsize if rival == "ours" else 8
    return logits + elements // shape[1] * label_bytes

"""The byte model: the least that a loss moves between the processor and its memory.

It counts passes: each is one read or one write of all logits. A second read right after the first
comes from a cache and does not count.
"""

from __future__ import annotations

import math

import torch
from cases import Shape


def passes(rival: str, dtype: str, reduction: str, inference: bool) -> int:
    """Passes of a forward and backward, or of the forward alone; 0 for a rival without a model."""
    if rival == "clone":
        return 2
    if rival == "ours":
        if inference:
            return 1
        # The forward also writes the gradient of a scalar loss, while it has the logits at hand.
        # For other losses, and in float16, the backward reads them again.
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
    # The others take only int64 labels.
    label_bytes = getattr(torch, target_dtype).itemsize if rival == "ours" else 8
    return logits + elements // shape[1] * label_bytes

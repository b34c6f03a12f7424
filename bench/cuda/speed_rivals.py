"""The rivals on a GPU, the reasons to leave one out of a case, and the step of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from cases import Case, Inputs
from rivals import EXACT, DisagreementError, Step, check, make_losses, make_steps, relative_error
from torch import Tensor

#: Up to this size the gaps between launches may take longer than the work.
GRAPH_BYTES = 64 * 2**20

Loss = Callable[[Tensor, Tensor], Tensor]


def load_liger() -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def load_quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda logits, classes: cross_entropy(logits, classes, reduction="mean")


#: The cross-entropy kernels of other projects. Like F.cross_entropy, they compute less than we do.
CROSS_ENTROPIES: dict[str, Callable[[], Loss]] = {"liger": load_liger, "quack": load_quack}


def reason_against(case: Case, name: str) -> str:
    """The reason to leave a rival out of a case; empty if there is none."""
    if name == "pytorch-ood":
        if case.dtype != torch.float32:
            return "float32 only"
        if not case.target_dtype.is_signed:
            return "has no ood_index"
    if name == "compiled":
        if case.reduction != "mean" or not case.target_dtype.is_signed:
            return "its form is of the mean, with signed labels"
        if case.dtype == torch.float16:
            return "not compiled in float16, to save time"
    if name in CROSS_ENTROPIES:
        if len(case.shape) != 2:
            return "takes (N, C) logits only"
        if case.reduction != "mean":
            return "measured with the mean only"
    return ""


def reason_against_graph(name: str, try_capture: Callable[[str], str]) -> str:
    """The reason why a rival cannot be captured in a graph; empty if it can."""
    waits = {"pytorch-ood": "Tensor.any() in an if", "liger": "Tensor.item()"}
    if name in waits:
        return f"the host waits for the GPU ({waits[name]})"
    return try_capture(name) if name in ("compiled", "quack") else ""


def is_small(case: Case) -> bool:
    return torch.Size(case.shape).numel() * case.dtype.itemsize <= GRAPH_BYTES


def cross_entropy_step(case: Case, inputs: Inputs, loss: Loss) -> Step:
    """Checks a kernel whose only float64 reference here is F.cross_entropy."""
    # Liger writes the gradient over its logits. Each step has its own logits, and the next call
    # reads the result of the last one, which takes as long.
    logits = inputs.logits.detach().clone().requires_grad_(not case.inference)
    value = loss(logits, inputs.classes).detach()
    expected = F.cross_entropy(inputs.logits.detach().float(), inputs.classes)
    error = relative_error(value.float(), expected)
    if not error <= 1e-2:  # Liger's loss has the dtype of the logits
        raise DisagreementError(f"the loss differs from F.cross_entropy by {error:.2g}")
    if case.inference:
        return lambda: loss(logits, inputs.classes)
    return lambda: torch.autograd.grad(loss(logits, inputs.classes), logits)[0]


def make_step(case: Case, inputs: Inputs, name: str) -> Step:
    """One forward and backward, or one forward, of a rival that has been checked.

    Raises:
        DisagreementError: the rival does not compute what it claims to.
        Exception: of any kind, if the rival is not installed or cannot do the case.
    """
    if name in CROSS_ENTROPIES:
        return cross_entropy_step(case, inputs, CROSS_ENTROPIES[name]())
    pair = replace(case, rivals=tuple(dict.fromkeys(("ours", name))))
    losses = make_losses(pair, inputs)
    if name in EXACT:
        check(pair, inputs, losses)
    return make_steps(pair, inputs, losses)[name]

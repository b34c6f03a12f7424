"""Everything that a call and its derivatives return, for bitwise comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oe_ext import outlier_exposure_loss


def all_returned(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str | None,
    **options: Any,
) -> dict[str, Tensor]:
    """The loss, its statistics and scores, both first derivatives, the second derivatives, and a
    tangent."""
    logits = logits.detach().requires_grad_()
    leaves = {"logits": logits}
    if isinstance(alpha, Tensor):
        leaves["alpha"] = alpha = alpha.detach().requires_grad_()

    def random_like(tensor: Tensor, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        return torch.randn(tensor.shape, generator=random).to(tensor.dtype)

    loss, stats, scores = outlier_exposure_loss(
        logits, target, alpha, reduction, **options, return_stats=True, return_scores=True
    )
    result = {"loss": loss, **stats._asdict(), **scores._asdict()}
    upstream = random_like(loss, 1).requires_grad_()
    plain = torch.autograd.grad(loss, leaves.values(), upstream, retain_graph=True)
    first = torch.autograd.grad(loss, leaves.values(), upstream, create_graph=True)
    directions = [random_like(grad, 2 + i) for i, grad in enumerate(first)]
    second = torch.autograd.grad(first, [*leaves.values(), upstream], directions, allow_unused=True)
    for order, grads in {"plain": plain, "first": first, "second": second}.items():
        for name, grad in zip([*leaves, "upstream"], grads, strict=False):
            if grad is not None:
                result[f"{order} {name}"] = grad

    def of_leaves(*values: Tensor) -> Tensor:
        return outlier_exposure_loss(
            values[0], target, values[1] if len(values) > 1 else alpha, reduction, **options
        )

    primals = tuple(leaf.detach() for leaf in leaves.values())
    if any(0 in primal.stride() for primal in primals):  # torch makes no dual numbers of these
        primals = tuple(primal.contiguous() for primal in primals)
    _, result["tangent"] = torch.func.jvp(of_leaves, primals, tuple(directions))
    return {name: tensor.detach() for name, tensor in result.items()}

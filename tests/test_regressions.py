"""What the properties found, each by its smallest case."""

import torch
from inputs import make_logits
from oracles import exact, max_error

from oe_ext import outlier_exposure_loss


def test_classes_that_are_all_the_same_memory(device):
    """Logits with stride 0 along the classes were walked across images in one step, as their
    gradient cannot be: half of it was never written."""
    for dtype in (torch.float64, torch.bfloat16):
        logits = make_logits((3, 1, 1, 2), dtype, device).expand(3, 4, 1, 2)
        target = torch.tensor([1, -1, 2, 0, -1, 3], device=device).view(3, 1, 2)
        for reduction in ("sum", "none"):
            weight = torch.ones_like(target, dtype=torch.float64) if reduction == "none" else None
            _, expected = exact(logits, target, 0.5, reduction, weight=weight)
            for upstream in (1.0, 2.0):
                leaf = logits.detach().requires_grad_()
                loss = outlier_exposure_loss(leaf, target, 0.5, reduction)
                (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
                assert max_error(grad, upstream * expected) <= upstream * torch.finfo(dtype).eps

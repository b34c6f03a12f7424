"""Failures that test_properties.py found, each reduced to its smallest case."""

import torch
from inputs import LAYOUTS, make_logits
from oracles import exact, loss_and_grad, max_error

from oe_ext import outlier_exposure_loss

INF = float("inf")


def test_classes_that_are_all_the_same_memory(device):
    """Logits with stride 0 along the classes have one stride across images; their gradient has not.
    Half of the gradient was never written."""
    for dtype in (torch.float64, torch.bfloat16):
        logits = make_logits((3, 1, 1, 2), dtype, device).expand(3, 4, 1, 2)
        target = torch.tensor([1, -1, 2, 0, -1, 3], device=device).view(3, 1, 2)
        for reduction in ("sum", "none"):
            weight = torch.ones_like(target, dtype=torch.float64) if reduction == "none" else None
            _, expected = exact(logits, target, 0.5, reduction, upstream=weight)
            for upstream in (1.0, 2.0):
                leaf = logits.detach().requires_grad_()
                loss = outlier_exposure_loss(leaf, target, 0.5, reduction)
                (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
                assert max_error(grad, upstream * expected) <= upstream * torch.finfo(dtype).eps


def test_an_inlier_has_no_part_in_the_gradient_of_alpha(device):
    """A logit of -inf at the label gives a loss of inf, and inf * 0 was NaN."""
    logits = make_logits((3, 4), device=device)
    logits[0, 2] = -INF
    target = torch.tensor([2, -1, 1], device=device)
    for shape in [(), (3,)]:
        alpha = torch.full(shape, 0.5, dtype=torch.float64, device=device, requires_grad=True)
        loss = outlier_exposure_loss(logits.requires_grad_(), target, alpha, "sum")
        assert loss == INF
        (grad,) = torch.autograd.grad(loss, alpha, retain_graph=True)
        of_outlier = outlier_exposure_loss(logits[1:2].detach(), target[1:2], 1.0, "sum")
        torch.testing.assert_close(grad.sum(), of_outlier)
        if shape:
            assert grad[[0, 2]].tolist() == [0, 0]


def test_no_derivative_of_alpha_meets_a_row_of_nan(device):
    """The same in forward mode and in double backward."""
    logits = make_logits((3, 4), device=device)
    logits[0] = float("nan")
    target = torch.tensor([2, -1, 1], device=device)
    alpha = torch.full((3,), 0.5, dtype=torch.float64, device=device)

    def losses(x, a):
        return outlier_exposure_loss(x, target, a, "none")

    primals, tangents = (logits, alpha), (torch.zeros_like(logits), torch.ones_like(alpha))
    _, along_alpha = torch.func.jvp(lambda a: losses(logits, a), (alpha,), (tangents[1],))
    assert along_alpha[0] == 0
    assert along_alpha[1] > 0
    leaves = [tensor.clone().requires_grad_() for tensor in primals]
    (grad,) = torch.autograd.grad(losses(*leaves).sum(), leaves[0], create_graph=True)
    (second,) = torch.autograd.grad(grad[1:].square().sum(), leaves[1])
    assert second[[0, 2]].tolist() == [0, 0]
    assert second[1] > 0


def test_a_crop_of_channels_last_images_keeps_its_format(device):
    """The copy had the other memory format, and so had the gradient."""
    wide = make_logits((2, 3, 4, 6), torch.float32, device)
    logits = LAYOUTS["channels_last"](wide)[..., 1:-1]
    target = torch.zeros(2, 4, 4, dtype=torch.int64, device=device)
    _, grad = loss_and_grad(outlier_exposure_loss, logits, target)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert max_error(grad, exact(logits, target)[1]) <= 1e-7

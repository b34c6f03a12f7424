"""The forward operator with counts from outside, and with the logits of some of the classes."""

from __future__ import annotations

import itertools

import pytest
import torch
from inputs import IGNORE, LAYOUTS, make_logits, make_target

from oe_ext import reference

FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward
BACKWARD = torch.ops.oe_ext._outlier_exposure_loss_backward
SPECIAL_LABELS = {"ignore_index": IGNORE, "ood_index": None}


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14, equal_nan=True)


def divided(losses, target, reduction, counts):
    """What the counts make of the losses of the positions."""
    inliers, outliers = losses[target >= 0].sum(), losses[(target < 0) & (target != IGNORE)].sum()
    if reduction == "mean":
        return (inliers + outliers) / counts.sum()
    return inliers / counts[0] + outliers / counts[1]


@pytest.mark.parametrize("alpha", [0.7, "tensor"])
@pytest.mark.parametrize("reduction", ["mean", "group_mean"])
@pytest.mark.parametrize("shape", [(23, 7), (9, 90), (2, 5, 4, 6)])
def test_counts(device, shape, reduction, alpha):
    """The loss, and its derivatives in both modes, to the second order."""
    logits = make_logits(shape, torch.float64).to(device)
    target = make_target(shape).to(device)
    counts = torch.tensor([7.5, 4.0], dtype=torch.float64, device=device)
    weight = torch.rand(target.shape, dtype=torch.float64, device=device)
    tensors = (logits, weight) if alpha == "tensor" else (logits,)

    def ours(logits, weight=None):
        number = 0.0 if weight is not None else alpha
        loss, _, _, _, used, _ = FORWARD(
            logits, target, number, weight, reduction, **SPECIAL_LABELS, counts=counts
        )
        assert torch.equal(used, counts)
        return loss

    def theirs(logits, weight=alpha):
        losses = reference.outlier_exposure_loss(
            logits, target, weight, "none", ignore_index=IGNORE
        )
        return divided(losses, target, reduction, counts)

    same(ours(*tensors), theirs(*tensors))
    directions = tuple(torch.randn_like(tensor) for tensor in tensors)

    def penalty(function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        grads = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        size = sum((grad * grad).sum() for grad in grads)
        return *grads, *torch.autograd.grad(size, leaves)

    for actual, expected in zip(penalty(ours), penalty(theirs), strict=True):
        same(actual, expected)
    _, tangent = torch.func.jvp(ours, tensors, directions)
    _, expected = torch.func.jvp(theirs, tensors, directions)
    same(tangent, expected)


def test_counts_of_an_empty_part(device):
    """It adds nothing to a batch that others fill."""
    logits = torch.zeros(0, 5, dtype=torch.float64, device=device)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    for counts, expected in [((3.0, 2.0), 0.0), ((0.0, 0.0), 0.0)]:
        given = torch.tensor(counts, dtype=torch.float64, device=device)
        loss, *_ = FORWARD(logits, target, 0.5, None, "mean", None, None, counts=given)
        assert loss.item() == expected


def test_a_batch_of_counts(device):
    logits = make_logits((4, 6, 5), torch.float64).to(device)
    target = make_target((4, 5, 6)).to(device)
    counts = torch.rand(4, 2, dtype=torch.float64, device=device) + 1

    def loss(logits, target, counts):
        return FORWARD(logits, target, 0.5, None, "group_mean", IGNORE, None, counts=counts)[0]

    ours = torch.vmap(loss)(logits, target, counts)
    same(ours, torch.stack([loss(*sample) for sample in zip(logits, target, counts, strict=True)]))
    grads = torch.vmap(torch.func.grad(loss))(logits, target, counts)
    expected = [torch.func.grad(loss)(*one) for one in zip(logits, target, counts, strict=True)]
    same(grads, torch.stack(expected))


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("num_classes", "cuts"), [(7, (2, 3)), (90, (64,)), (200, (1, 130))])
def test_parts_of_the_classes(device, num_classes, cuts, layout, label_dtype):
    """Each part's loss is that of its logits; its gradient, from the statistics of all, is its part
    of the whole."""
    logits = make_logits((19, num_classes), torch.float64).to(device)
    target = make_target((19, num_classes)).to(device)
    options = (1.0, None, "none", IGNORE, None)
    leaf = logits.clone().requires_grad_()
    upstream = torch.rand(19, dtype=torch.float64, device=device)
    losses = reference.outlier_exposure_loss(leaf, target, 1.0, "none", ignore_index=IGNORE)
    (expected_grad,) = torch.autograd.grad(losses, leaf, upstream)
    row_max = logits.amax(1)
    sum_exp = (logits - row_max[:, None]).exp().sum(1)
    no_counts = torch.empty(0, dtype=torch.float64, device=device)
    stored = target.to(label_dtype)

    bounds = [0, *cuts, num_classes]
    for first, end in itertools.pairwise(bounds):
        part = LAYOUTS[layout](logits[:, first:end])
        where = {"num_classes": num_classes, "first_class": first}
        loss, _, max_here, sum_here, _, _ = FORWARD(part, stored, *options, **where)
        here = (target >= first) & (target < end)
        at_label = part.gather(1, torch.where(here, target - first, 0)[:, None])[:, 0]
        shifted = part - part.amax(1, keepdim=True)
        q_x = torch.where(here, at_label - part.amax(1), 0)
        q_x = torch.where(target < 0, shifted.sum(1) / num_classes, q_x)
        counted = target != IGNORE
        same(loss, torch.where(counted, shifted.exp().sum(1).log() - q_x, 0))
        same(max_here[counted], part.amax(1)[counted])
        same(sum_here[counted], shifted.exp().sum(1)[counted])
        grad = BACKWARD(
            upstream, part, stored, row_max, sum_exp, no_counts, *options, *where.values()
        )
        same(grad, expected_grad[:, first:end])


def test_errors():
    logits, target = torch.zeros(4, 5), torch.tensor([0, 1, -1, 2])
    counts = torch.ones(2, dtype=torch.float64)
    for options, error, text in [
        ({"counts": counts.float()}, RuntimeError, "counts must be float64 with 2 elements"),
        ({"counts": counts[:1]}, RuntimeError, r"with 2 elements, got Double of shape \[1\]"),
        ({"counts": counts.to("meta")}, RuntimeError, "logits and counts must be on the same"),
        ({"num_classes": 4}, ValueError, "5 classes from first_class = 0 on .* got 4"),
        ({"num_classes": 9, "first_class": 5}, ValueError, "first_class = 5"),
        ({"num_classes": 9, "first_class": -1}, ValueError, "first_class = -1"),
        ({"first_class": 2}, ValueError, "first_class needs num_classes, got 2"),
    ]:
        with pytest.raises(error, match=text):
            FORWARD(logits, target, 0.5, None, "mean", None, None, **options)
        if "counts" in options:
            continue
        with pytest.raises(error, match=text):  # without data
            FORWARD(logits.to("meta"), target.to("meta"), 0.5, None, "mean", None, None, **options)
    for reduction in ("none", "sum"):
        with pytest.raises(ValueError, match=f"divides by them, got '{reduction}'"):
            FORWARD(logits, target, 0.5, None, reduction, None, None, counts=counts)
    with pytest.raises(IndexError, match=r"\[0, 9\)"):
        FORWARD(logits, target + 8, 0.5, None, "sum", None, None, num_classes=9)
    leaf = logits.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="has no derivative of its own"):
        FORWARD(leaf, target, 0.5, None, "none", None, None, num_classes=9)

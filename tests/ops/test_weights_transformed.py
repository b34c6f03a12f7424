"""Class weights and label smoothing under derivatives, vmap, statistics, compiling, exporting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import IGNORE, OPTIONS, REDUCTIONS, make_logits, make_options, make_target
from oracles import loss_and_grad

from oe_ext import OutlierExposureLoss, outlier_exposure_loss, reference


@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(device, reduction, names):
    """Both modes, to the second order, with a learnable alpha."""
    logits = make_logits((5, 4), device=device, scale=1.0)
    target = torch.tensor([0, -1, 3, IGNORE, 2], device=device)
    alpha = torch.tensor(0.3, dtype=torch.float64, device=device)
    options = make_options(names, 4, device=device)
    tensors = (logits, alpha)
    directions = (torch.randn_like(logits), torch.ones_like(alpha))

    def call(function):
        return lambda x, a: function(x, target, a, reduction, ignore_index=IGNORE, **options)

    def results(function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss = function(*leaves)
        upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        grads = torch.autograd.grad(loss, leaves, upstream.to(loss.device), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in grads), leaves)
        tangent = torch.func.jvp(function, tensors, directions)[1]
        return [loss, *grads, *second, tangent]

    ours, theirs = (
        results(call(outlier_exposure_loss)),
        results(call(reference.outlier_exposure_loss)),
    )
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("names", OPTIONS)
def test_finite_differences(names):
    logits = make_logits((4, 3), scale=1.0).requires_grad_()
    target = torch.tensor([0, -1, 2, 1])
    options = make_options(names, 3)

    def loss(x):
        return outlier_exposure_loss(x, target, **options)

    assert torch.autograd.gradcheck(loss, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, logits, check_fwd_over_rev=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (0, 0, None), (None, None, 0), (0, None, 1), (1, 0, 0)]
)
def test_vmap(device, dims, reduction, smoothing):
    """Over logits, targets and weights in any combination: losses and gradients."""
    size = 3
    values = (make_logits((6, 5)), make_target((6, 5)), torch.rand(5, dtype=torch.float64))
    batches = [
        value if dim is None else torch.stack([value * (i + 1) for i in range(size)], dim)
        for value, dim in zip(values, dims, strict=True)
    ]
    if dims[1] is not None:  # multiples of labels are no labels
        batches[1] = torch.stack([make_target((6, 5)) for _ in range(size)], dims[1])
    batches = [value.to(device) for value in batches]

    def call(function):
        def loss(x, y, w):
            options = {"weight": w, "label_smoothing": smoothing, "ignore_index": IGNORE}
            return function(x, y, 0.5, reduction, **options)

        return loss

    def gradient(function):
        return torch.func.grad(lambda x, y, w: call(function)(x, y, w).sum())

    for make in (call, gradient):
        actual = torch.vmap(make(outlier_exposure_loss), dims)(*batches)
        expected = [
            make(reference.outlier_exposure_loss)(
                *(
                    batch if dim is None else batch.select(dim, i)
                    for batch, dim in zip(batches, dims, strict=True)
                )
            )
            for i in range(size)
        ]
        torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=1e-13)


def test_vmap_over_nothing():
    def loss(x, w):
        return outlier_exposure_loss(x, torch.tensor([0, -1]), weight=w, label_smoothing=0.1)

    assert torch.vmap(loss)(torch.zeros(0, 2, 3), torch.ones(0, 3)).shape == (0,)


def test_stats():
    """Numbers stay numbers, and the mean of the inliers is that of their weights."""
    logits, target = make_logits((50, 6)), make_target((50, 6))
    parts = []
    for names in OPTIONS:
        options = make_options(names, 6)
        loss, stats, scores = outlier_exposure_loss(
            logits,
            target,
            ignore_index=IGNORE,
            return_stats=True,
            return_scores=True,
            **options,
        )
        inlier = target >= 0
        same = torch.testing.assert_close
        same(loss, outlier_exposure_loss(logits, target, ignore_index=IGNORE, **options))
        same(stats.inlier_loss, F.cross_entropy(logits[inlier], target[inlier], **options))
        assert stats.num_inliers.dtype == torch.int64
        assert stats.num_inliers == inlier.sum()
        weights = options.get("weight", torch.ones(6, dtype=torch.float64))
        same(stats.inlier_weight, weights[target[inlier]].sum())
        plain = outlier_exposure_loss(
            logits, target, ignore_index=IGNORE, return_stats=True, return_scores=True
        )
        for name in ("outlier_loss", "inlier_accuracy", "num_outliers"):
            same(getattr(stats, name), getattr(plain[1], name))
        same(scores, plain[2], equal_nan=True)
        parts = [
            outlier_exposure_loss(x, y, ignore_index=IGNORE, return_stats=True, **options)[1]
            for x, y in zip(logits.split(20), target.split(20), strict=True)
        ]
        merged = parts[0].merge(parts[1]).merge(parts[2])
        for ours, whole in zip(merged, stats, strict=True):
            same(ours, whole)


@pytest.mark.parametrize("names", OPTIONS)
def test_compiled(names):
    logits, target = make_logits((20, 6)), make_target((20, 6))
    options = make_options(names, 6)

    def step(x):
        return outlier_exposure_loss(x * 2, target, ignore_index=IGNORE, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        loss_and_grad(compiled, logits), loss_and_grad(step, logits), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("names", OPTIONS)
def test_exported(names):
    options = make_options(names, 6)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = OutlierExposureLoss(**options)

        def forward(self, x, y):
            return self.criterion(x, y)

    inputs = make_logits((8, 6)), make_target((8, 6), "inliers")
    program = torch.export.export(Model(), inputs)
    torch.testing.assert_close(program.module()(*inputs), outlier_exposure_loss(*inputs, **options))


@pytest.mark.parametrize("names", OPTIONS)
def test_opcheck(names):
    logits = make_logits((5, 4)).requires_grad_()
    args = (logits, make_target((5, 4)), 0.5, "mean")
    options = {"ignore_index": IGNORE, **make_options(names, 4)}
    torch.library.opcheck(torch.ops.oe_ext.outlier_exposure_loss.default, args, options)

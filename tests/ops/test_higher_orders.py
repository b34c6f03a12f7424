"""Derivatives up to the third order with respect to the logits, alpha and the upstream gradient, in
reverse and forward mode: with an alpha of 0, an empty group, and arbitrary values in rows that do
not count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import IGNORE, REDUCTIONS
from strategies import examples
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from oe_ext import outlier_exposure_loss, reference

D = torch.float64
NAN, INF = float("nan"), float("inf")
LABELS = [0, 1, 2, -1, IGNORE]


@dataclass(frozen=True)
class Batch:
    """Cases small enough for third derivatives, of any mix: empty groups are common."""

    shape: tuple[int, ...]
    alpha_shape: tuple[int, ...]
    labels: tuple[int, ...]  # the values of the target
    alphas: tuple[float, ...]  # the values of alpha
    reduction: str
    seed: int

    def make(self) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.seed)

        def choose(values: tuple[float, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            index = torch.randint(0, len(values), shape, generator=random)
            return torch.tensor(values, dtype=dtype)[index]

        logits = torch.randn(self.shape, generator=random, dtype=D)
        target = choose(self.labels, (self.shape[0], *self.shape[2:]), torch.int64)
        return logits, target, choose(self.alphas, self.alpha_shape, D)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    shape = draw(st.sampled_from([(4, 3), (1, 3), (3, 3, 2), (2, 3, 2, 2), (0, 3)]))
    target_shape = (shape[0], *shape[2:])
    trailing = target_shape[draw(st.integers(0, len(target_shape))) :]
    ones = draw(st.tuples(*[st.booleans()] * len(trailing)))
    return Batch(
        shape=shape,
        alpha_shape=tuple(1 if one else n for n, one in zip(trailing, ones, strict=True)),
        labels=tuple(draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=3))),
        alphas=tuple(draw(st.lists(st.sampled_from([0.0, 0.7, -0.3]), min_size=1, max_size=2))),
        reduction=draw(st.sampled_from(REDUCTIONS)),
        seed=draw(st.integers(0, 2**16)),
    )


def along(values: list[Tensor], seed: int) -> Tensor:
    """The inner product of the values with random directions."""
    random = torch.Generator().manual_seed(seed)
    return sum(
        (value * torch.randn(value.shape, generator=random, dtype=D)).sum() for value in values
    )


def three_orders(function: Any, target: Tensor, reduction: str, leaves: list[Tensor]) -> list:
    """The derivatives of the loss with respect to logits, alpha and the upstream gradient; those of
    the first derivatives along a direction; and those of the second along another direction."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    logits, alpha, upstream = leaves
    loss = function(logits, target, alpha, reduction, ignore_index=IGNORE)
    value, orders = (upstream * loss).sum(), []
    for order in range(3):
        grads = torch.autograd.grad(
            value, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        orders.append([grad.detach() for grad in grads])
        value = along(list(grads), order)
        if not value.requires_grad:
            break
    return orders


def with_upstream(batch: Batch, logits: Tensor, target: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(batch.seed + 1)
    shape = target.shape if batch.reduction == "none" else ()
    return torch.randn(shape, generator=random, dtype=D)


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@examples(100)
@given(batches())
def test_three_orders_in_reverse(batch):
    logits, target, alpha = batch.make()
    leaves = [logits, alpha, with_upstream(batch, logits, target)]
    if batch.reduction == "mean" and target.numel() == 0:
        return  # NaN
    ours = three_orders(outlier_exposure_loss, target, batch.reduction, leaves)
    theirs = three_orders(reference.outlier_exposure_loss, target, batch.reduction, leaves)
    close(ours, theirs)


def mixed(function: Any, target: Tensor, reduction: str, primals: list, tangents: list) -> list:
    """Tangents of the loss, of its gradients and of its tangents, and gradients of those."""

    def loss(x: Tensor, a: Tensor, g: Tensor) -> Tensor:
        return (g * function(x, target, a, reduction, ignore_index=IGNORE)).sum()

    def jvp_of(f: Any) -> Any:
        return lambda *args: torch.func.jvp(f, args, tuple(tangents))[1]

    argnums = (0, 1, 2)
    gradient = torch.func.grad(loss, argnums)
    tangent = jvp_of(loss)
    return [
        tangent(*primals),
        jvp_of(gradient)(*primals),
        jvp_of(tangent)(*primals),
        torch.func.grad(tangent, argnums)(*primals),
        jvp_of(torch.func.grad(tangent, argnums))(*primals),
        torch.func.grad(jvp_of(tangent), argnums)(*primals),
    ]


@examples(40)
@given(batches())
def test_orders_in_forward_mode(batch):
    logits, target, alpha = batch.make()
    if batch.reduction == "mean" and target.numel() == 0:
        return  # NaN
    primals = [logits, alpha, with_upstream(batch, logits, target)]
    random = torch.Generator().manual_seed(batch.seed + 2)
    tangents = [torch.randn(p.shape, generator=random, dtype=D) for p in primals]
    ours = mixed(outlier_exposure_loss, target, batch.reduction, primals, tangents)
    theirs = mixed(reference.outlier_exposure_loss, target, batch.reduction, primals, tangents)
    close(ours, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "labels", [[0, -1, -1, 2], [0, 1, 1, 2], [-1] * 4, [IGNORE] * 4, [IGNORE, -1, -1, 0]], ids=str
)
@pytest.mark.parametrize("alpha", [0.0, [0.0, 0.0, 0.5, 0.0]], ids=str)
def test_finite_differences_where_alpha_is_0(reduction, labels, alpha):
    """Checks the loss, its gradients, and their gradients."""
    logits = torch.randn(4, 3, dtype=D, requires_grad=True)
    alpha = torch.tensor(alpha, dtype=D, requires_grad=True)
    target = torch.tensor(labels)

    def loss(x, a):
        return outlier_exposure_loss(x, target, a, reduction, ignore_index=IGNORE)

    def gradients(x, a):
        value = loss(x, a)
        weight = torch.linspace(0.3, 1.7, value.numel(), dtype=D).reshape(value.shape)
        return torch.autograd.grad(value, (x, a), weight, create_graph=True)

    assert gradcheck(loss, (logits, alpha), check_forward_ad=True)
    assert gradgradcheck(loss, (logits, alpha), check_fwd_over_rev=True, check_rev_over_rev=True)
    assert gradgradcheck(gradients, (logits, alpha))


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 0.4])
def test_the_slope_along_alpha_of_a_tangent(alpha):
    logits, v = torch.randn(4, 3, dtype=D), torch.randn(4, 3, dtype=D)
    target = torch.tensor([0, -1, -1, 2])

    def tangent(a):
        return torch.func.jvp(
            lambda z: outlier_exposure_loss(z, target, a, "sum"), (logits,), (v,)
        )[1]

    slope = torch.func.grad(tangent)(torch.tensor(alpha, dtype=D))
    expected = ((logits.softmax(1) - 1 / 3) * v)[1:3].sum()
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("reduction", ["mean", "group_mean"])
@pytest.mark.parametrize("labels", [[0, 1, 1, 2], [IGNORE] * 4], ids=str)
def test_a_group_without_members_has_derivatives_of_0(reduction, labels):
    logits, v = torch.randn(4, 3, dtype=D), torch.randn(4, 3, dtype=D)
    target = torch.tensor(labels)

    def tangent(x, a):
        return torch.func.jvp(
            lambda z: outlier_exposure_loss(z, target, a, reduction, ignore_index=IGNORE),
            (x,),
            (v,),
        )[1]

    in_x, in_a = torch.func.grad(tangent, (0, 1))(logits, torch.tensor(0.3, dtype=D))
    assert in_a == 0
    assert in_x.isfinite().all()
    batched = torch.vmap(torch.func.grad(tangent, (0, 1)), (0, None))(
        logits.unsqueeze(0), torch.tensor(0.3, dtype=D)
    )
    close(batched, (in_x.unsqueeze(0), in_a.unsqueeze(0)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("whole_row", [False, True])
def test_rows_that_take_no_part_may_hold_anything(reduction, garbage, whole_row):
    """Ignored rows, and outliers of weight 0, have zero derivatives; the others have those of a
    clean batch."""
    target = torch.tensor([0, -1, -1, IGNORE, 2])
    alpha = torch.tensor([NAN, 0.0, 0.5, INF, -INF], dtype=D)  # only that of outliers is read
    clean = torch.randn(5, 3, dtype=D)
    dirty = clean.clone()
    dirty[[1, 3], : 3 if whole_row else 1] = garbage
    upstream = torch.tensor([1.0, 2.0, 0.5, NAN, 3.0], dtype=D)
    if reduction != "none":
        upstream = torch.tensor(1.5, dtype=D)

    def loss(x):
        value = outlier_exposure_loss(x, target, alpha, reduction, ignore_index=IGNORE)
        return torch.where(value == 0, 0, value * upstream.nan_to_num()).sum()

    def norm(x):
        return torch.func.grad(loss)(x).square().sum()

    v = torch.randn(5, 3, dtype=D)
    for f in (loss, norm, lambda x: torch.func.jvp(norm, (x,), (v,))[1]):
        ours, expected = torch.func.grad_and_value(f)(dirty), torch.func.grad_and_value(f)(clean)
        counted = [0, 2, 4]
        close((ours[0][counted], ours[1]), (expected[0][counted], expected[1]))
        assert (ours[0][[1, 3]] == 0).all()
    close(torch.func.jvp(loss, (dirty,), (v,)), torch.func.jvp(loss, (clean,), (v,)))
    dirt = v.clone()
    dirt[3] = NAN  # directions there do not count either
    close(torch.func.jvp(norm, (dirty,), (dirt,)), torch.func.jvp(norm, (clean,), (v,)))


def test_a_learnable_alpha_sees_garbage_only_at_first_order():
    """Only the gradient of alpha is NaN there: it is the cross-entropy."""
    target = torch.tensor([0, -1, -1, 2])
    x = torch.randn(4, 3, dtype=D)
    x[1, 0] = NAN
    x.requires_grad_()
    alpha = torch.tensor([0.1, 0.0, 0.5, 0.3], dtype=D, requires_grad=True)
    loss = outlier_exposure_loss(x, target, alpha, "sum")
    in_x, in_alpha = torch.autograd.grad(loss, (x, alpha), create_graph=True)
    assert in_alpha.isnan().tolist() == [False, True, False, False]
    second = torch.autograd.grad(in_x.square().sum() + in_alpha.sum(), (x, alpha))
    assert all(grad.isfinite().all() for grad in second)
    assert (second[0][1] == 0).all()


def test_what_an_inlier_holds_is_nothing_to_alpha():
    """An inlier of NaN does not affect derivatives with respect to alpha, in either mode."""
    target = torch.tensor([2, -1, 1])
    logits = torch.randn(3, 4, dtype=D)
    logits[0] = NAN
    alpha, v = torch.tensor([0.5, 0.0, 0.3], dtype=D), torch.randn(3, dtype=D)

    def gradient(a):
        return torch.func.grad(lambda x: outlier_exposure_loss(x, target, a, "none").sum())(logits)

    _, tangent = torch.func.jvp(gradient, (alpha,), (v,))
    assert (tangent[[0, 2]] == 0).all()
    torch.testing.assert_close(tangent[1], v[1] * (logits[1].softmax(0) - 1 / 4))
    slope = torch.func.grad(lambda a: (gradient(a)[1:] * torch.ones(4, dtype=D).cumsum(0)).sum())
    assert (slope(alpha)[[0, 2]] == 0).all()
    assert slope(alpha)[1].isfinite()

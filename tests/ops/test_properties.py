"""Properties of any input: value and gradients against the reference, errors, symmetries.

``make test`` runs 1,000 examples, always the same; ``make fuzz`` runs 20,000 new ones. Failures
that they found are in test_regressions.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import simt_device
import torch
from budgets import Results, check_results
from hypothesis import given
from hypothesis import strategies as st
from inputs import is_read_in_place
from returned import all_returned
from strategies import Case, Inputs, Layout, cases, examples, kind_of

from oe_ext import outlier_exposure_loss


def loss_of(case: Case, inputs: Inputs) -> torch.Tensor:
    return outlier_exposure_loss(
        inputs.logits, inputs.target, inputs.alpha, case.reduction, **case.options(inputs)
    )


def storage_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all bytes behind a tensor, including those in its gaps."""
    storage = tensor.detach().untyped_storage()
    return torch.tensor([], dtype=torch.uint8).set_(storage).clone()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def has_layout_of(grad: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the gradient has the strides of the logits without their gaps, or, if no single
    stride covers the pixels, those of a memory format."""
    allowed = [torch.empty_like(logits)]
    if not is_read_in_place(logits):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for memory_format in (torch.contiguous_format, formats.get(logits.dim())):
            if memory_format is not None:
                allowed.append(torch.empty(logits.shape).to(memory_format=memory_format))
    return any(
        all(
            size == 1 or actual == expected
            for size, actual, expected in zip(
                logits.shape, grad.stride(), like.stride(), strict=True
            )
        )
        for like in allowed
    )


def check_case(case: Case) -> None:
    """Checks all promises for one call."""
    inputs = case.make()
    logits, target, alpha, _ = inputs
    before = storage_of(logits), storage_of(target)
    leaves = [logits.requires_grad_()]
    if isinstance(alpha, torch.Tensor):
        leaves.append(alpha.requires_grad_())
    loss = loss_of(case, inputs)
    assert loss.dtype == case.acc_dtype
    assert loss.shape == (case.target_shape if case.reduction in (None, "none") else ())

    # The first backward keeps the graph, the second releases it.
    upstream = case.make_upstream(loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    copies = [grad.clone() for grad in first]
    last = torch.autograd.grad(loss, leaves, upstream)
    for leaf, *grads in zip(leaves, first, copies, last, strict=True):
        assert all(grad.dtype == leaf.dtype for grad in grads)
        assert all(grad.shape == leaf.shape for grad in grads)
        assert_same_bits(grads[0], grads[1])
        assert_same_bits(grads[2], grads[1])
    assert has_layout_of(first[0], logits)
    assert has_layout_of(last[0], logits)
    for tensor, stored in zip((logits, target), before, strict=True):
        assert torch.equal(storage_of(tensor), stored), "the caller's own was written to"

    alpha_grad = last[1] if len(last) > 1 else None
    check_results(case, inputs, upstream, Results(loss.detach(), last[0], alpha_grad))
    with torch.no_grad():
        alone = loss_of(case, inputs)
    if any(case.layout.expanded):
        # Where the logits repeat, the gradient has separate memory, so rows may be summed in
        # another order.
        check_results(case, inputs, upstream, Results(alone, last[0], None))
    else:
        assert_same_bits(alone, loss.detach())


@examples(500)
@given(cases())
def test_against_the_reference(case):
    check_case(case)


@examples(60)
@given(cases(max_logits=400))
def test_against_the_reference_on_simt(case):
    with simt_device.active():
        check_case(case)


@examples(20)
@given(cases(max_logits=200_000), st.integers(2, 9))
def test_any_number_of_threads_gives_the_same_bits(case, threads):
    """All returned tensors: the loss, statistics, scores, gradients of both orders, a tangent."""
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            inputs = case.make()
            options = case.options(inputs)
            results.append(all_returned(*inputs[:3], case.reduction, **options))
    finally:
        torch.set_num_threads(before)
    for name, one in results[0].items():
        torch.testing.assert_close(
            results[1][name], one, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@examples(120)
@given(st.data())
def test_an_illegal_label_is_named(data):
    case = data.draw(cases())
    inputs = case.make()
    logits, target, _, _ = inputs
    info = torch.iinfo(case.label_dtype)
    candidates = {-1, -7, case.shape[1], case.shape[1] + 1, 255, info.max, info.min, *case.labels}
    illegal = sorted(
        label
        for label in candidates
        if info.min <= label <= info.max
        and kind_of(label, case.shape[1], *case.special_labels.values()) == "illegal"
    )
    if not illegal or target.numel() == 0:
        return
    label = data.draw(st.sampled_from(illegal))
    where = tuple(data.draw(st.integers(0, size - 1)) for size in target.shape)
    target = target.clone()
    target[where] = label
    logits.requires_grad_(data.draw(st.booleans()))
    with pytest.raises(IndexError) as error:
        loss_of(case, inputs._replace(target=target))
    text = str(error.value)
    for part in (f"[0, {case.shape[1]})", f"got {label} ", f"position {list(where)}"):
        assert part in text
    assert f"C = {case.shape[1]}" in text
    assert logits.grad is None


@examples(60)
@given(cases(finite=True), st.sampled_from([1.0, -3.0, 1024.0, -65536.0]))
def test_a_shift_changes_no_bit(case, shift):
    """Logits that are multiples of 1/64, and stay exact when they are shifted."""
    case = dataclasses.replace(case, scale=1.0, offset=0.0, dtype=torch.float32)
    inputs = case.make()
    coarse = (inputs.logits * 64).round() / 64
    results = []
    for logits in (coarse, coarse + shift):
        logits = case.layout.place(logits, 0.0).requires_grad_()
        loss = loss_of(case, inputs._replace(logits=logits))
        (grad,) = torch.autograd.grad(loss, logits, case.make_upstream(loss))
        results.append((loss.detach(), grad))
    for shifted, plain in zip(*results, strict=True):
        assert_same_bits(shifted, plain)


def rows_of(case: Case, inputs: Inputs, index: torch.Tensor) -> Inputs:
    """A part of the batch, in another order."""
    alpha = inputs.alpha
    if isinstance(alpha, torch.Tensor) and alpha.dim() == inputs.target.dim() and len(alpha) > 1:
        alpha = alpha[index]
    logits = case.layout.place(inputs.logits[index], 0.0)
    return Inputs(logits, inputs.target[index], alpha, inputs.weight)


@examples(80)
@given(cases(), st.randoms(use_true_random=False))
def test_a_position_knows_nothing_of_the_others(case, random):
    """A part of the batch, in any order, has the losses and gradients of the whole."""
    contiguous = Layout.dense(*range(len(case.shape)))  # else a part may take another path
    case = dataclasses.replace(case, reduction="none", upstream="one", layout=contiguous)
    inputs = case.make()
    size = len(inputs.target)
    chosen = torch.tensor(random.sample(range(size), random.randint(0, size)), dtype=torch.int64)
    results = []
    for some in (inputs, rows_of(case, inputs, chosen)):
        logits = some.logits.detach().requires_grad_()
        loss = loss_of(case, some._replace(logits=logits))
        (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
        results.append((loss.detach(), grad))
    for whole, part in zip(*results, strict=True):
        assert_same_bits(part, whole[chosen])


@examples(60)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_classes_does_not_matter(case, random):
    """Except for the rounding of their sums."""
    classes = range(case.shape[1])
    ignore_index, ood_index = (None if m in classes else m for m in case.special_labels.values())
    case = dataclasses.replace(case, ignore_index=ignore_index, ood_index=ood_index)
    inputs = case.make()
    order = torch.tensor(random.sample(classes, len(classes)))
    labels = inputs.target.long()
    is_class = (labels >= 0) & (labels < len(classes))
    moved = torch.where(is_class, order.argsort()[torch.where(is_class, labels, 0)], labels)
    logits = inputs.logits[:, order].requires_grad_()
    weight = None if inputs.weight is None else inputs.weight[order]
    loss = loss_of(case, Inputs(logits, moved, inputs.alpha, weight))
    upstream = case.make_upstream(loss)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    results = Results(loss.detach(), grad[:, order.argsort()], None)
    check_results(case, inputs, upstream, results)


@examples(60)
@given(cases())
def test_how_labels_are_stored_does_not_matter(case):
    inputs = case.make()
    results = []
    for target in (inputs.target, inputs.target.long().contiguous()):
        logits = inputs.logits.detach().requires_grad_()
        loss = loss_of(case, inputs._replace(logits=logits, target=target))
        (grad,) = torch.autograd.grad(loss, logits, case.make_upstream(loss))
        results.append((loss.detach(), grad))
    for stored, plain in zip(*results, strict=True):
        assert_same_bits(stored, plain)

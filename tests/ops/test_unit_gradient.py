"""The gradient that the forward pass writes, for an upstream gradient of 1.

However the graph is used afterwards, the results must be as if the backward had computed it.
"""

import pytest
import torch
from inputs import IGNORE, LAYOUTS, make_logits, make_target
from oracles import exact, max_error
from torch.profiler import ProfilerActivity, profile

from oe_ext import outlier_exposure_loss, reference

SCALAR = ["sum", "mean", "group_mean"]
SHAPES = [(13, 5), (7, 64), (2, 5, 4, 8)]
FROM_UNIT = "oe_ext::_outlier_exposure_loss_backward_from_unit"
RECOMPUTED = "oe_ext::_outlier_exposure_loss_backward"


def backward_operators(function) -> list[str]:
    """The backward operators that a function runs."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    names = [event.name for event in record.events()]
    return [name for name in names if name in (FROM_UNIT, RECOMPUTED)]


def make_case(shape, dtype=torch.float32, device="cpu", layout="contiguous"):
    logits = LAYOUTS[layout](make_logits(shape, dtype, device)).detach().requires_grad_()
    return logits, make_target(shape, device=device)


def recomputed(logits, target, upstream, **kwargs):
    """The gradient recomputed from the statistics, as for a graph that is kept."""
    loss = outlier_exposure_loss(logits, target, **kwargs)
    (grad,) = torch.autograd.grad(loss, logits, upstream, retain_graph=True)
    return grad


@pytest.mark.parametrize("reduction", SCALAR)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "cropped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_same_bits_as_recomputed(device, dtype, shape, layout, reduction):
    logits, target = make_case(shape, dtype, device, layout)
    before = logits.detach().clone()
    kwargs = {"reduction": reduction, "ignore_index": IGNORE}
    for scale in [1.0, -0.37, 65536.0, 0.0, float("inf"), float("nan")]:
        loss = outlier_exposure_loss(logits, target, **kwargs)
        upstream = torch.full_like(loss, scale)
        (grad,) = torch.autograd.grad(loss, logits, upstream)
        assert torch.equal(logits, before)
        assert grad.stride() == torch.empty_like(logits).stride()
        expected = recomputed(logits, target, upstream, **kwargs)
        torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", ["weight", "smoothing", "both"])
@pytest.mark.parametrize("reduction", SCALAR)
@pytest.mark.parametrize("shape", [(5000, 10), (700, 7), (300, 70), (3, 7, 40, 50)], ids=str)
def test_same_bits_with_class_weights(device, shape, reduction, options):
    """The bits of a sum of weights depend on its order, which must be one for the loss, with and
    without a gradient, and for both ways to its gradient."""
    logits, target = make_case(shape, torch.float64, device)
    kwargs = {"reduction": reduction, "ignore_index": IGNORE}
    if options != "smoothing":
        kwargs["weight"] = torch.rand(shape[1], dtype=torch.float64, device=device)
    if options != "weight":
        kwargs["label_smoothing"] = 0.1
    loss = outlier_exposure_loss(logits, target, **kwargs)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (from_unit,) = torch.autograd.grad(loss, logits)
    assert torch.equal(from_unit, grad)
    assert torch.equal(outlier_exposure_loss(logits.detach(), target, **kwargs), loss.detach())


def test_which_way_is_taken():
    """Shows that the test above compares two different paths."""
    for dtype, expected in [(torch.float32, FROM_UNIT), (torch.float16, RECOMPUTED)]:
        logits, target = make_case((13, 5), dtype)
        loss = outlier_exposure_loss(logits, target)
        assert backward_operators(lambda loss=loss: loss.backward(retain_graph=True)) == [
            RECOMPUTED
        ]
        assert backward_operators(loss.backward) == [expected]
    logits, target = make_case((13, 5))
    losses = outlier_exposure_loss(logits, target, reduction="none")
    assert backward_operators(losses.sum().backward) == [RECOMPUTED]


@pytest.mark.parametrize("options", [{"return_stats": True}, {"return_scores": True}])
def test_statistics_do_not_cost_a_second_read(options):
    """Python sees what the forward returns, and must not see the gradient: the node gives it away
    only if nobody else has it."""
    logits, target = make_case((13, 5))
    loss = outlier_exposure_loss(logits, target, **options)[0]
    assert backward_operators(loss.backward) == [FROM_UNIT]
    grad, logits.grad = logits.grad, None
    outlier_exposure_loss(logits, target).backward()
    assert torch.equal(grad, logits.grad)


def test_a_second_backward_of_a_retained_graph(device):
    logits, target = make_case((13, 5), device=device)
    loss = outlier_exposure_loss(logits, target)
    grads = []
    for upstream, retain in [(2.0, True), (1.0, True), (3.0, False)]:
        upstream = torch.full_like(loss, upstream)
        grads.append(torch.autograd.grad(loss, logits, upstream, retain_graph=retain)[0])
    _, truth = exact(logits, target)
    for grad, scale in zip(grads, [2.0, 1.0, 3.0], strict=True):
        assert max_error(grad, scale * truth) <= 1e-6
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_are_tensors_of_their_own(device):
    """No later backward changes the result of an earlier one."""
    logits, target = make_case((13, 5), device=device)
    loss = outlier_exposure_loss(logits, target)
    one = torch.ones_like(loss)
    (first,) = torch.autograd.grad(loss, logits, one, retain_graph=True)
    kept = first.clone()
    (last,) = torch.autograd.grad(loss, logits, 5 * one)
    assert torch.equal(first, kept)
    first.zero_()
    assert max_error(last, 5 * exact(logits, target)[1]) <= 1e-6


def test_an_expanded_upstream_gradient(device):
    logits, target = make_case((13, 5), device=device)
    loss = outlier_exposure_loss(logits, target)
    (loss.expand(4) * torch.arange(4.0, device=device)).sum().backward()
    assert max_error(logits.grad, 6 * exact(logits, target)[1]) <= 1e-6


def test_the_graph_of_the_gradient(device):
    """create_graph: the stored gradient is never differentiated again."""
    logits, target = make_case((6, 4), torch.float64, device)
    loss = outlier_exposure_loss(logits, target)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert grad.grad_fn is not None
    (second,) = torch.autograd.grad(grad.square().sum(), logits)
    expected = logits.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(
        reference.outlier_exposure_loss(expected, target), expected, create_graph=True
    )
    (expected_second,) = torch.autograd.grad(first.square().sum(), expected)
    torch.testing.assert_close(second, expected_second, rtol=1e-10, atol=1e-14)


def test_hooks_on_the_logits(device):
    logits, target = make_case((13, 5), device=device)
    logits.register_hook(lambda grad: grad.mul_(2))
    outlier_exposure_loss(logits, target).backward()
    assert max_error(logits.grad, 2 * exact(logits, target)[1]) <= 1e-6


def test_hooks_on_saved_tensors_see_all_that_is_kept():
    """save_on_cpu and checkpointing decide what is kept: nothing else of the logits' size is."""
    logits, target = make_case((200, 50))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = outlier_exposure_loss(logits, target)
    assert sum(t.numel() == logits.numel() for t in kept) == 1
    assert backward_operators(loss.backward) == [RECOMPUTED]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(device, use_reentrant):
    logits, target = make_case((13, 5), device=device)
    torch.utils.checkpoint.checkpoint(
        outlier_exposure_loss, logits, target, use_reentrant=use_reentrant
    ).backward()
    assert max_error(logits.grad, exact(logits, target)[1]) <= 1e-6


def test_whoever_holds_the_unit_gradient_keeps_it(device):
    """The internal operator returns it, so a backward must not write to it."""
    logits, target = make_case((13, 5), device=device)
    forward = torch.ops.oe_ext._outlier_exposure_loss_forward
    loss, *_, unit_gradient = forward(logits, target, 0.5, None, "mean", None, None, True)
    kept = unit_gradient.clone()
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 3.0))
    assert torch.equal(unit_gradient, kept)
    assert max_error(grad, 3 * unit_gradient.double()) <= 1e-6


def test_only_alpha_needs_a_gradient(device):
    """An unrequested gradient of the logits is not written."""
    logits, target = make_case((200, 50), device=device)
    alpha = torch.tensor(0.5, device=device, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        outlier_exposure_loss(logits.detach(), target, alpha).backward()
    assert alpha.grad is not None
    assert max(event.self_cpu_memory_usage for event in record.events()) < logits.nbytes / 2


@pytest.mark.parametrize("reduction", SCALAR)
def test_memory_of_forward_and_backward(reduction):
    """Allocates, beside the logits, their gradient once and O(N) more."""
    logits, target = make_case((500, 1000))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        outlier_exposure_loss(logits, target, reduction=reduction).backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in record.events())
    assert logits.nbytes < allocated < 1.05 * logits.nbytes


def test_bad_calls_of_the_internal_operators():
    logits, target = make_case((4, 3))
    logits = logits.detach()
    forward = torch.ops.oe_ext._outlier_exposure_loss_forward
    from_unit = torch.ops.oe_ext._outlier_exposure_loss_backward_from_unit
    with pytest.raises(ValueError, match="scalar, got reduction 'none'"):
        forward(logits, target, 0.5, None, "none", None, None, True)
    options = (0.5, None, "mean", None, None)
    loss, _, *statistics, unit_gradient = forward(logits, target, *options, True)
    for bad in (unit_gradient[:2], unit_gradient.double()):
        with pytest.raises(RuntimeError, match="unit_gradient must be"):
            from_unit(bad, loss, logits, target, *statistics, *options)
    with pytest.raises(ValueError, match="scalar, got reduction 'none'"):
        from_unit(unit_gradient, loss, logits, target, *statistics, 0.5, None, "none", None, None)

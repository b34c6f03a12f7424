"""Accuracy as a budget, independent oracles, and the same bits every time."""

import pytest
import torch
import torch.nn.functional as F
from inputs import IGNORE, LAYOUTS, REDUCTIONS, make_logits, make_target
from oracles import exact, loss_and_grad, max_error
from returned import all_returned

from oe_ext import _sums, outlier_exposure_loss, reference


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(50, 7), (4, 19, 8, 8)])
def test_outlier_rows_are_label_smoothing_of_1(device, shape, dtype):
    """An oracle that shares no code with the reference."""
    logits = make_logits(shape, dtype, device)
    target = make_target(shape, "outliers", device=device)
    ours = loss_and_grad(outlier_exposure_loss, logits, target, alpha=1.0)
    theirs = loss_and_grad(F.cross_entropy, logits, target.clamp(min=0), label_smoothing=1.0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_inlier_rows_are_cross_entropy(device, reduction):
    shape = (4, 9, 5, 6)
    logits = make_logits(shape, device=device)
    target = make_target(shape, "inliers", device=device)
    weight = torch.rand(target.shape, device=device).double() if reduction == "none" else None
    ours = loss_and_grad(outlier_exposure_loss, logits, target, 0.5, reduction, upstream=weight)
    theirs = loss_and_grad(F.cross_entropy, logits, target, reduction=reduction, upstream=weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def torch_eager(logits, target, alpha=0.5, reduction="mean"):
    """The loss as a PyTorch user would write it, in the dtype of the logits."""
    outlier = target < 0
    per_row = torch.where(
        outlier,
        alpha * F.cross_entropy(logits, target.clamp(min=0), reduction="none", label_smoothing=1.0),
        F.cross_entropy(logits, target.clamp(min=0), reduction="none"),
    )
    return per_row if reduction == "none" else per_row.mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(256, 10), (64, 1000), (2, 19, 16, 16)])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_error_is_no_larger_than_torchs(device, shape, dtype, scale):
    logits = make_logits(shape, dtype, device, scale=scale)
    target = make_target(shape, device=device)
    ours = loss_and_grad(outlier_exposure_loss, logits, target, reduction="none")
    theirs = loss_and_grad(torch_eager, logits, target, reduction="none")
    truth = exact(logits, target, reduction="none")
    for our, their, true in zip(ours, theirs, truth, strict=True):
        # float32 gets one more rounding: the last one, which goes either way.
        ulp = torch.finfo(torch.float32).eps * true.abs().max().item()
        assert max_error(our, true) <= max_error(their, true) + ulp


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "positions", "sliced"])
@pytest.mark.parametrize("num_classes", [3, 64, 65, 1000, 5000, 20_000, 128_256])
def test_a_sum_of_exponentials_keeps_its_digits(num_classes, layout):
    """For any number of classes in any layout. The error of a row's sum shifts all its gradients,
    while errors of the exponentials have different signs. Only on the CPU: the CUDA kernels lose
    more (docs/RELIABILITY.md)."""
    rows = 64 if num_classes < 128_256 else 8
    logits = torch.randn(rows, num_classes + (layout == "sliced")).double()
    logits = logits[:, :num_classes]
    target = torch.zeros(rows, dtype=torch.long)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout == "positions":
        logits = logits.t().contiguous()[None]
        target = target[None]
    logits = logits.float()
    _, ours = loss_and_grad(outlier_exposure_loss, logits, target, reduction="sum")
    true = logits.double().softmax(1)
    relative = (ours.double() / true - 1)[:, 1:]  # at the label, the gradient is softmax - 1
    of_row = relative.mean(1).abs().max().item()
    assert of_row <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_half_gradients_are_rounded_once(device, dtype, layout):
    """At least 99.9 % of the elements equal the float64 gradient, correctly rounded."""
    shape = (512, 100)
    logits = LAYOUTS[layout](make_logits(shape, dtype, device))
    target = make_target(shape, device=device)
    _, grad = loss_and_grad(outlier_exposure_loss, logits, target, reduction="sum")
    _, expected = exact(logits, target, reduction="sum")
    assert (grad == expected.to(dtype)).double().mean() >= 0.999


@pytest.mark.no_simt("four million logits")
def test_a_scaled_fp16_gradient_does_not_vanish(device):
    """The scale 65536 of a GradScaler multiplies in float32, before the cast to float16."""
    shape = (4096, 1000)
    logits = make_logits(shape, torch.float16, device, scale=1.0)
    target = make_target(shape, device=device)
    leaf = logits.clone().requires_grad_()
    (outlier_exposure_loss(leaf, target) * 65536).backward()
    expected = exact(logits, target)[1] * 65536
    assert (expected.to(torch.float16) != 0).double().mean() > 0.99
    unscaled = (expected / 65536).to(torch.float16)
    assert (unscaled == 0).double().mean() > 0.05, "what scaling after the cast would lose"
    assert max_error(leaf.grad, expected) <= 2**-11 * expected.abs().max().item()
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_shift_invariance(device, layout, offset):
    """Adding a constant to a row changes only the rounding of the input."""
    shape = (200, 50)
    logits = make_logits(shape, torch.float32, device, scale=4.0)
    shifted = logits + offset
    target = make_target(shape, device=device)
    loss, grad = loss_and_grad(outlier_exposure_loss, LAYOUTS[layout](shifted), target)
    same_values = shifted.double() - offset
    expected, expected_grad = exact(same_values, target)
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()
    assert max_error(grad, expected_grad) <= 1e-6 * expected_grad.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3000, 10), (3, 5, 90, 70), (7, 20000)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_bits_for_any_number_of_threads(shape, dtype, reduction):
    logits = make_logits(shape, dtype)
    target = make_target(shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(outlier_exposure_loss, logits, target, 0.5, reduction))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.no_simt("a million rows take the harness an hour")
def test_the_sum_of_many_rows_keeps_its_digits(device):
    """Row losses are added in float64: 10^6 equal float32 terms would drift."""
    logits = torch.zeros(1_000_000, 3, device=device)
    target = torch.zeros(1_000_000, dtype=torch.int8, device=device)
    loss = outlier_exposure_loss(logits, target, reduction="sum")
    one = F.cross_entropy(logits[:1], target[:1].long()).double()
    assert abs(loss.item() / (1e6 * one.item()) - 1) < 1e-7


def test_the_reference_is_differentiable_in_alpha():
    """Tests the oracle by finite differences."""
    logits = make_logits((6, 4)).requires_grad_()
    target = make_target((6, 4))
    alpha = torch.rand(6, dtype=torch.float64, requires_grad=True)
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda x, a, r=reduction: reference.outlier_exposure_loss(x, target, a, r),
            (logits, alpha),
        )


def same_bits(actual, expected):
    return torch.equal(actual.nan_to_num(-7.0), expected.nan_to_num(-7.0))


@pytest.mark.parametrize(
    ("shape", "alpha_shape"),
    [
        ((200_000, 5), ()),
        ((200_003, 3), (200_003,)),
        ((1, 300_000), (1,)),
        ((2, 5, 300, 301), (301,)),
        ((50_000, 5, 7), (50_000, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_number_of_threads_shows_in_no_bit(shape, alpha_shape, layout):
    """Holds for all returned tensors. At these sizes ATen splits its own sums among threads."""
    logits = LAYOUTS[layout](make_logits(shape, torch.float32))
    target, alpha = make_target(shape), torch.rand(alpha_shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(all_returned(logits, target, alpha, "group_mean", ignore_index=IGNORE))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        differing = [n for n, one in results[0].items() if not same_bits(other[n], one)]
        assert differing == []


@pytest.mark.parametrize("shape", [(), (1,), (7,), (30_000, 1), (30_000, 7), (1, 7)], ids=str)
def test_expanded_by_a_number_of_threads(shape):
    """As alpha is expanded if processes share the classes."""
    values = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(30_000, 7)
    expanded = _sums.expand(values, upstream.shape)
    assert torch.equal(expanded, values.expand(upstream.shape))
    before = torch.get_num_threads()
    grads = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            grads += torch.autograd.grad(expanded, values, upstream, retain_graph=True)
    finally:
        torch.set_num_threads(before)
    exact = upstream.double().sum_to_size(shape)
    torch.testing.assert_close(grads[0].double(), exact, rtol=1e-4, atol=1e-3)
    assert all(torch.equal(grad, grads[0]) for grad in grads)

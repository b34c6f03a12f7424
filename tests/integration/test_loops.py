"""Training loops as people write them: Accelerate's, accumulation, GradScaler, checkpointing."""

import optional
import pytest
import torch
from inputs import make_target
from torch.utils.checkpoint import checkpoint

from oe_ext import OutlierExposureLoss, outlier_exposure_loss, reference

FEATURES, CLASSES = 6, 4


def make_model():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 16), torch.nn.Tanh(), torch.nn.Linear(16, CLASSES)
    )


def make_batches(count=8, size=12):
    torch.manual_seed(4)
    return [(torch.randn(size, FEATURES), make_target((size, CLASSES))) for _ in range(count)]


def plain_loop(criterion, accumulate, steps=3):
    """The weights that the loops below must reach."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(steps):
        for index, (x, y) in enumerate(make_batches()):
            (criterion(model(x), y) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return list(model.parameters())


@pytest.fixture
def accelerate():
    """The package, with fresh settings: they belong to the process."""
    package = optional.module("accelerate")
    names = ("AcceleratorState", "GradientState", "PartialState")
    states = [getattr(optional.module("accelerate.state"), name) for name in names]
    for state in states:
        state._reset_state()
    yield package
    for state in states:
        state._reset_state()


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-6), ("bf16", 1e-2)])
def test_accelerate(accelerate, precision, tolerance):
    """Gradient accumulation and mixed precision, against the reference in float32."""
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision=precision
    )
    model = make_model()
    criterion = OutlierExposureLoss(reduction="group_mean")
    loader = torch.utils.data.DataLoader(make_batches(), batch_size=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model, optimizer, loader, criterion = accelerator.prepare(model, optimizer, loader, criterion)
    for _ in range(3):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(x), y)
                assert loss.dtype == torch.float32
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    expected = plain_loop(
        lambda x, y: reference.outlier_exposure_loss(x, y, 0.5, "group_mean"), accumulate=2
    )
    start = make_model().parameters()
    for ours, theirs, before in zip(model.parameters(), expected, start, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert (ours - before).abs().max() > 5 * tolerance


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    """One checkpoint holds the model and its loss."""
    criterion = OutlierExposureLoss()
    model = make_model()
    (x, y), *_ = make_batches()
    x.requires_grad_()
    checkpoint(lambda z: criterion(model(z), y), x, use_reentrant=use_reentrant).backward()
    other = make_model()
    criterion(other(x), y).backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    """Logits from autocast are read in their dtype; the loss is float32."""
    layer = torch.nn.Linear(FEATURES, CLASSES)
    (x, y), *_ = make_batches()
    with torch.autocast("cpu", dtype=dtype):
        logits = layer(x)
        loss = OutlierExposureLoss()(logits, y)
    assert (logits.dtype, loss.dtype) == (dtype, torch.float32)
    assert loss.grad_fn.next_functions[0][0] is logits.grad_fn, "no cast in between"
    loss.backward()
    exact = reference.outlier_exposure_loss(layer(x), y)
    theirs = torch.autograd.grad(exact, list(layer.parameters()))
    ours = [p.grad for p in layer.parameters()]
    torch.testing.assert_close(ours, list(theirs), rtol=0.05, atol=5e-3)


def test_grad_scaler_where_the_reference_vanishes_or_overflows():
    """A mean over many pixels has gradients below the range of float16; a scale of 65536 lifts them
    into it. The reference converts the scale to float16 before it multiplies."""
    shape = (1, 19, 256, 256)
    logits = 4 * torch.randn(shape).half().double()
    target = make_target(shape)

    def gradient(criterion, dtype, scale):
        leaf = logits.clone().to(dtype).requires_grad_()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        loss = criterion(leaf, target)
        scaler.scale(loss).backward()
        return loss.detach(), leaf.grad.double() / scale

    theirs = optional.pytorch_ood_class()(alpha=0.5)
    exact = gradient(reference.outlier_exposure_loss, torch.float64, 1.0)[1]
    loss, ours = gradient(OutlierExposureLoss(), torch.float16, 65536.0)
    assert loss.isfinite()
    torch.testing.assert_close(ours, exact, rtol=5e-3, atol=1e-9)
    _, unscaled = gradient(theirs, torch.float16, 1.0)
    assert ((unscaled == 0) & (exact.abs() > 0)).double().mean() > 0.1, "vanishes"
    # For a sum, 65536 itself arrives: inf in float16. Only values that large may be inf.
    exact = gradient(
        lambda x, y: reference.outlier_exposure_loss(x, y, 0.5, "sum"), torch.float64, 1.0
    )[1]
    fits = exact.abs() * 65536 < torch.finfo(torch.float16).max
    _, ours = gradient(OutlierExposureLoss(reduction="sum"), torch.float16, 65536.0)
    # float32's own error where p is near 1
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours[fits], exact[fits], rtol=5e-3, atol=eps)
    their_sum = optional.pytorch_ood_class()(alpha=0.5, reduction="sum")
    _, scaled = gradient(their_sum, torch.float16, 65536.0)
    assert (~scaled[fits].isfinite()).double().mean() > 0.1, "overflows"


def test_double_backward_of_half_logits():
    """Each dtype, against float64: the error of one rounding."""
    logits = torch.randn(9, CLASSES).to(torch.bfloat16).to(torch.float16)
    target = make_target((9, CLASSES))

    def second(function, dtype, reduction):
        x = logits.to(dtype).requires_grad_()
        loss = function(x, target, 0.7, reduction).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        direction = (torch.arange(grad.numel()) % 5 - 2).view_as(grad)  # exact in each dtype
        return torch.autograd.grad((grad * direction).sum(), x)[0].double()

    for reduction in ("none", "sum", "mean", "group_mean"):
        exact = second(reference.outlier_exposure_loss, torch.float64, reduction)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            ours = second(outlier_exposure_loss, dtype, reduction)
            error = (ours - exact).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max(), (dtype, reduction)

"""Class weights and label smoothing: without outliers, torch's own cross-entropy is the oracle."""

from __future__ import annotations

import copy
import itertools

import optional
import pytest
import torch
import torch.nn.functional as F
from inputs import (
    IGNORE,
    LAYOUTS,
    OPTIONS,
    REDUCTIONS,
    make_logits,
    make_options,
    make_target,
)
from oracles import exact, loss_and_grad, max_error

from oe_ext import OutlierExposureLoss, outlier_exposure_loss, reference

INF, NAN = float("inf"), float("nan")
# By code path: rows in scratch memory, pixels, more classes than a sum of parts has, long rows, and
# classes in chunks.
SHAPES = [(40, 7), (2, 19, 6, 5), (3, 40, 9), (7, 100), (3, 1031), (2, 3000, 3)]


def cross_entropy(logits, target, reduction, **options):
    """torch's, of the inliers alone; it has no group_mean."""
    reduction = "mean" if reduction == "group_mean" else reduction
    return F.cross_entropy(logits, target, ignore_index=IGNORE, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_inliers_are_torchs(device, shape, names, reduction):
    logits = make_logits(shape, device=device)
    target = make_target(shape, "inliers", device=device)
    target[0] = IGNORE
    options = make_options(names, shape[1], device=device)
    upstream = torch.rand(target.shape if reduction == "none" else (), dtype=torch.float64)
    upstream = upstream.to(device)
    for function in (outlier_exposure_loss, reference.outlier_exposure_loss):

        def ours(logits, function=function):
            return function(logits, target, 0.5, reduction, ignore_index=IGNORE, **options)

        def theirs(logits):
            return cross_entropy(logits, target, reduction, **options)

        actual = loss_and_grad(ours, logits, upstream=upstream)
        expected = loss_and_grad(theirs, logits, upstream=upstream)
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_outliers(device, layout, names, reduction):
    shape = (3, 5, 4, 7)
    logits = LAYOUTS[layout](make_logits(shape, device=device))
    target = make_target(shape, device=device)
    options = make_options(names, 5, device=device)
    args = (target, 0.7, reduction)
    kwargs = {"ignore_index": IGNORE, **options}
    actual = loss_and_grad(outlier_exposure_loss, logits, *args, **kwargs)
    for x, y in zip(actual, exact(logits, *args, **kwargs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_no_larger_than_torchs(dtype, names):
    shape = (400, 19)
    logits = make_logits(shape, dtype, offset=100.0)
    target = make_target(shape, "inliers")
    acc_options = make_options(names, 19, torch.float32)
    torch_options = {
        key: value.to(dtype) if key == "weight" else value for key, value in acc_options.items()
    }

    def errors(function, options):
        loss, grad = loss_and_grad(function, logits, target, reduction="none", **options)
        wide = {k: v.double() if k == "weight" else v for k, v in options.items()}
        true_loss, true_grad = loss_and_grad(
            F.cross_entropy, logits.double(), target, reduction="none", **wide
        )
        return max_error(loss, true_loss), max_error(grad, true_grad)

    ours = errors(outlier_exposure_loss, acc_options)
    theirs = errors(F.cross_entropy, torch_options)
    for our, their in zip(ours, theirs, strict=True):
        assert our <= 1.2 * their


def torch_samples():
    """What torch tests its cross-entropy with, as a function and as a module."""
    optional.require("expecttest")  # torch's tests need it
    from torch.testing._internal import common_methods_invocations, common_modules  # seconds

    operators = common_methods_invocations.op_db
    operator = next(op for op in operators if op.name == "nn.functional.cross_entropy")
    for sample in operator.sample_inputs("cpu", torch.float64, requires_grad=False):
        yield sample.input, sample.args[0], sample.kwargs
    make = common_modules.module_inputs_torch_nn_CrossEntropyLoss
    for sample in make(None, "cpu", torch.float64, requires_grad=False, training=False):
        yield *sample.forward_input.args, sample.constructor_input.kwargs


def test_torchs_own_samples():
    """Their random weights are negative, too; the loss refuses those, and is then compared with
    their magnitudes. Also a single row is refused: torch's classes are its first axis."""
    seen = dict.fromkeys(["weight", "label_smoothing", "soft labels", "negative", "single"], 0)
    for logits, target, kwargs in torch_samples():
        options = dict(kwargs)
        reduction = options.pop("reduction", "mean")
        if target.is_floating_point():
            seen["soft labels"] += 1
            with pytest.raises(TypeError, match="soft labels are not supported"):
                outlier_exposure_loss(logits, target, 0.5, reduction)
            continue
        if logits.dim() == 1:
            seen["single"] += 1
            with pytest.raises(ValueError, match="logits must have shape"):
                outlier_exposure_loss(logits, target, 0.5, reduction)
            logits, target = logits.unsqueeze(0), target.unsqueeze(0)
        weight = options.get("weight")
        if weight is not None and (weight < 0).any():
            seen["negative"] += 1
            with pytest.raises(ValueError, match="weight must be finite and not negative"):
                outlier_exposure_loss(logits, target, 0.5, reduction, **options)
            options["weight"] = weight.abs()
        seen["weight"] += weight is not None
        seen["label_smoothing"] += "label_smoothing" in options
        ours = loss_and_grad(outlier_exposure_loss, logits, target, 0.5, reduction, **options)
        theirs = loss_and_grad(F.cross_entropy, logits, target, reduction=reduction, **options)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    assert min(seen.values()) > 0, seen


@pytest.mark.parametrize("names", OPTIONS)
@pytest.mark.parametrize("num_classes", [5, 100])
@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_a_class_of_weight_0(device, special, num_classes, names):
    """Infinite and NaN logits give what they give in torch, row by row."""
    target = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    logits = make_logits((6, num_classes), device=device)
    for row, cls in enumerate([0, 1, 3, 0, 1, 3]):
        logits[row, cls] = special
    options = make_options(names, num_classes, device=device)
    if "weight" in options:
        options["weight"][:2] = torch.tensor([0.0, 2.0])
    ours = loss_and_grad(outlier_exposure_loss, logits, target, 0.5, "none", **options)
    theirs = loss_and_grad(F.cross_entropy, logits, target, reduction="none", **options)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("names", ["weight", "both"])
@pytest.mark.parametrize("reduction", ["mean", "group_mean"])
def test_a_mean_over_weights_of_0_is_0(device, reduction, names):
    """Where torch divides by 0. Other classes have weights."""
    logits = make_logits((4, 5), device=device).requires_grad_()
    target = torch.tensor([0, 1, 1, 0], device=device)
    options = make_options(names, 5, device=device)
    options["weight"] = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0], device=device)
    loss = outlier_exposure_loss(logits, target, 0.5, reduction, **options)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert loss.item() == 0
    assert not grad.any()
    assert not torch.autograd.grad(grad.sum(), logits)[0].any()
    target[0] = -1
    with_outlier = outlier_exposure_loss(logits, target, 0.5, "group_mean", **options)
    alone = outlier_exposure_loss(logits[:1], target[:1], 0.5, "mean", **options)
    torch.testing.assert_close(with_outlier, alone)


class TestModule:
    def test_the_weight_is_a_buffer(self):
        weight = torch.rand(5)
        module = OutlierExposureLoss(weight=weight, label_smoothing=0.1)
        theirs = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
        assert module.state_dict().keys() == theirs.state_dict().keys()
        assert list(module.parameters()) == []
        assert module.double().weight.dtype == torch.float64
        other = OutlierExposureLoss(weight=torch.ones(5))
        other.load_state_dict(theirs.state_dict())
        assert torch.equal(other.weight, weight)
        assert torch.equal(copy.deepcopy(module).weight, module.weight)
        assert "weight" not in OutlierExposureLoss().state_dict()

    def test_it_passes_its_options_on(self):
        logits, target = make_logits((20, 5)), make_target((20, 5), "inliers")
        options = make_options("both", 5)
        module = OutlierExposureLoss(**options)
        torch.testing.assert_close(
            module(logits, target), F.cross_entropy(logits, target, **options)
        )
        module.weight, module.label_smoothing = None, 0.0
        torch.testing.assert_close(module(logits, target), F.cross_entropy(logits, target))

    def test_repr(self):
        module = OutlierExposureLoss(weight=torch.ones(5), label_smoothing=0.1)
        assert "weight=<of 5 classes>, label_smoothing=0.1" in repr(module)
        assert "weight" not in repr(OutlierExposureLoss())


BAD = [
    (
        {"weight": torch.ones(4)},
        ValueError,
        r"weight must have one element per class, so shape \[5\], got \[4\]",
    ),
    ({"weight": torch.ones(5, 1)}, ValueError, r"one axis, got shape \[5, 1\]"),
    (
        {"weight": torch.ones(5, dtype=torch.int64)},
        TypeError,
        "floating-point dtype, got torch.int64",
    ),
    ({"weight": [1.0] * 5}, TypeError, "weight must be a tensor or None, got list"),
    ({"weight": torch.tensor([1.0, -1, 1, 1, 1])}, ValueError, "not negative, got -1 for class 1"),
    (
        {"weight": torch.tensor([1.0, 1, NAN, 1, 1])},
        ValueError,
        "finite and not negative, got nan for class 2",
    ),
    ({"weight": torch.ones(5, device="meta")}, RuntimeError, "same device, got cpu and meta"),
    (
        {"weight": torch.ones(5, requires_grad=True)},
        NotImplementedError,
        "weight, which must not require",
    ),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0.1"),
    ({"label_smoothing": NAN}, ValueError, "label_smoothing must be a finite number, got nan"),
    ({"label_smoothing": "0.1"}, TypeError, "label_smoothing must be a number, got str"),
    ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got None"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options, error, message):
    target = torch.tensor([0, -1])
    with pytest.raises(error, match=message):
        outlier_exposure_loss(torch.zeros(2, 5, requires_grad=True), target, **options)
    if "weight" not in options or error is TypeError:
        with pytest.raises(error, match=message):
            OutlierExposureLoss(**options)


def test_bad_options_of_the_operator():
    operator = torch.ops.oe_ext.outlier_exposure_loss
    logits, target = torch.zeros(2, 5), torch.tensor([0, -1])
    for smoothing in (1.5, -0.1, NAN):
        with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got"):
            operator(logits, target, label_smoothing=smoothing)
    with pytest.raises(
        TypeError, match="floating-point dtype, such as Float of the loss, got Long"
    ):
        operator(logits, target, weight=torch.ones(5, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_of_any_floating_dtype(dtype):
    """It is converted to the dtype of the loss."""
    logits, target = make_logits((9, 4), torch.bfloat16), make_target((9, 4))
    weight = torch.tensor([0.3, 1.7, 0.1, 2.9]).to(dtype)
    loss = outlier_exposure_loss(logits, target, ignore_index=IGNORE, weight=weight)
    expected = outlier_exposure_loss(logits, target, ignore_index=IGNORE, weight=weight.float())
    assert torch.equal(loss, expected)
    strided = torch.stack([weight, weight], dim=1)[:, 0]
    assert torch.equal(
        outlier_exposure_loss(logits, target, ignore_index=IGNORE, weight=strided), expected
    )


def test_defaults_change_no_bit():
    for shape, dtype in itertools.product(SHAPES, [torch.float32, torch.bfloat16]):
        logits, target = make_logits(shape, dtype), make_target(shape)
        plain = loss_and_grad(outlier_exposure_loss, logits, target)
        for options in ({"weight": torch.ones(shape[1])}, {"label_smoothing": 0}):
            same = loss_and_grad(outlier_exposure_loss, logits, target, **options)
            assert all(map(torch.equal, plain, same))

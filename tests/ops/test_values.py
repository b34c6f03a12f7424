"""Values and gradients against the definition in float64, for all legal arguments."""

import pytest
import torch
from inputs import (
    CLASS_COUNTS,
    DTYPES,
    IGNORE,
    INT_DTYPES,
    LAYOUTS,
    REDUCTIONS,
    SHAPES,
    make_logits,
    make_target,
)
from oracles import exact, loss_and_grad, max_error

from oe_ext import outlier_exposure_loss

# Allowed errors relative to max(1, |value|). float64 is the promise of 1e-12. float32 computes with
# an epsilon of 1.2e-7. Half types compute in float32 too, so their losses are as accurate, and only
# the last rounding adds to the error of their gradients (half an ulp: 2^-9 and 2^-12 of the value).
LOSS_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
}
GRAD_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def check(logits, target, **kwargs):
    weight = None
    if kwargs.get("reduction") == "none":
        weight = torch.rand(target.shape, dtype=torch.float64, device=logits.device)
        weight = weight.to(torch.promote_types(logits.dtype, torch.float32))
    loss, grad = loss_and_grad(outlier_exposure_loss, logits, target, upstream=weight, **kwargs)
    expected_loss, expected_grad = exact(logits, target, upstream=weight, **kwargs)
    assert loss.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert loss.shape == expected_loss.shape
    assert grad.dtype == logits.dtype
    assert grad.shape == logits.shape
    scale = max(1.0, expected_loss.abs().max().item())
    assert max_error(loss, expected_loss) <= LOSS_TOLERANCE[logits.dtype] * scale
    scale = expected_grad.abs().max().item()
    assert max_error(grad, expected_grad) <= GRAD_TOLERANCE[logits.dtype] * scale
    return grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mix", ["mixed", "inliers", "outliers", "ignored"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_layouts_and_mixes(device, dtype, rank, layout, mix, reduction):
    shape = SHAPES[rank]
    logits = LAYOUTS[layout](make_logits(shape, dtype, device))
    target = make_target(shape, mix, device=device)
    check(logits, target, alpha=0.7, reduction=reduction, ignore_index=IGNORE)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("num_classes", CLASS_COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_counts(device, dtype, num_classes, layout):
    shape = (11, num_classes)
    logits = LAYOUTS[layout](make_logits(shape, dtype, device))
    target = make_target(shape, device=device)
    check(logits, target, reduction="group_mean", ignore_index=IGNORE)


# Around a tile of the CPU kernels: one row less, one more, and several tiles.
@pytest.mark.parametrize("num_rows", [1, 255, 257, 1500])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_row_counts(device, layout, num_rows):
    shape = (num_rows, 6)
    logits = LAYOUTS[layout](make_logits(shape, torch.float32, device))
    for reduction in REDUCTIONS:
        check(logits, make_target(shape, device=device), reduction=reduction, ignore_index=IGNORE)


@pytest.mark.parametrize("shape", [(3, 4, 20, 30), (2, 150, 33, 9), (300, 3, 2)])
def test_segmentation_tiles(device, shape):
    logits = make_logits(shape, torch.float32, device)
    check(logits, make_target(shape, device=device), reduction="mean", ignore_index=IGNORE)


@pytest.mark.parametrize("label_dtype", INT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 6), (5, 6, 3, 4)])
def test_label_dtypes(device, shape, label_dtype):
    logits = make_logits(shape, torch.float32, device)
    target = make_target(shape, device=device)
    special_labels = {"ignore_index": IGNORE}
    if not label_dtype.is_signed:
        special_labels = {"ignore_index": 255, "ood_index": 254}
        target = torch.where(target == IGNORE, 255, torch.where(target < 0, 254, target))
    grad = check(logits, target.to(label_dtype), reduction="group_mean", **special_labels)
    assert torch.equal(grad, check(logits, target, reduction="group_mean", **special_labels))


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_extreme_labels_are_outliers(device, label_dtype):
    lowest = torch.iinfo(label_dtype).min
    logits = make_logits((3, 4), device=device)
    target = torch.tensor([lowest, 1, lowest + 1], dtype=label_dtype, device=device)
    check(logits, target, reduction="none")


def test_labels_whose_last_bits_are_a_class_are_outliers(device):
    logits = make_logits((40, 4), device=device)
    wide = [-(2**31), -(2**31) - 1, -(2**32) + 1, -(2**40) + 2, -(2**63), -(2**31) + 3, 3, 0]
    target = torch.tensor(wide * 5, device=device)
    check(logits, target, reduction="none")
    check(logits, target, reduction="none", ignore_index=-(2**32) + 1)


def test_special_labels(device):
    """ignore_index takes precedence; ood_index replaces negative labels, and may be a class."""
    logits = make_logits((6, 4), device=device)
    target = torch.tensor([0, 3, 2, 2, 1, 3], device=device)
    check(logits, target, reduction="none", ood_index=3)
    check(logits, target, reduction="none", ood_index=3, ignore_index=2)
    check(logits, target, reduction="none", ood_index=3, ignore_index=3)
    check(logits, target, reduction="none", ignore_index=1)
    negative = torch.tensor([-1, 3, -100, 2, -1, 0], device=device)
    check(logits, negative, reduction="none", ignore_index=-1)
    check(logits, negative, reduction="none")  # -100 is an outlier like any negative label


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 7.5, -2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_alphas(device, alpha, reduction):
    shape = (20, 5)
    logits = make_logits(shape, device=device)
    target = make_target(shape, device=device)
    check(logits, target, alpha=alpha, reduction=reduction, ignore_index=IGNORE)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "strided"])
def test_target_layouts(device, layout):
    logits = make_logits((6, 4, 5), device=device)
    target = make_target((6, 4, 5), device=device)
    if layout == "transposed":
        target = target.t().contiguous().t()
    elif layout == "expanded":
        target = target[:1].expand(6, 5)
    elif layout == "strided":
        target = torch.stack([target, target + 1000], dim=-1).flatten(1)[:, ::2]
    check(logits, target, reduction="none", ignore_index=IGNORE)


def test_defaults_are_the_mean_with_half_weight(device):
    logits = make_logits((9, 4), device=device)
    target = make_target((9, 4), device=device)
    explicit = outlier_exposure_loss(logits, target, 0.5, "mean")
    assert torch.equal(outlier_exposure_loss(logits, target), explicit)
    assert torch.equal(
        outlier_exposure_loss(logits, target, reduction=None),
        outlier_exposure_loss(logits, target, reduction="none"),
    )

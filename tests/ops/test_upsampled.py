"""The loss of upsampled logits against torch's interpolation and the loss, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from inputs import DTYPES, IGNORE, INT_DTYPES, LAYOUTS, REDUCTIONS, make_logits
from oracles import loss_and_grad, max_error

from oe_ext import outlier_exposure_loss, reference

# Every way to cut a row into patches, if a column is cut alike, as (w, W, align_corners): four
# centered pixels, in one patch a cell and in several, and more cells than a strip has; two of them;
# four and two pixels from a corner on; single pixels, with a whole scale and without one; cells of
# more pixels than a strip has; a single column; one scale only on the other axis.
COLUMNS = [
    (5, 20, False),
    (131, 524, False),
    (4, 32, False),
    (2, 128, False),
    (7, 14, False),
    (150, 300, False),
    (3, 18, False),
    (6, 21, True),
    (5, 33, True),
    (7, 13, True),
    (4, 19, True),
    (5, 15, False),
    (17, 50, False),
    (17, 50, True),
    (3, 1300, False),
    (2, 600, True),
    (1, 9, False),
    (1, 9, True),
    (9, 9, False),
]
ROWS = [(3, 12), (2, 5), (1, 4), (4, 4), (6, 13), (2, 16), (3, 18), (3, 9), (3, 5)]

# Relative to the largest loss or gradient. In float32 the gradient is a sum of terms that are
# larger. Half types have the error of its last rounding.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def make_labels(num_classes, shape, *, blocks=False, dtype=torch.int64):
    """Random labels: -1 is an outlier, IGNORE is ignored. ``blocks``: most neighbours are equal."""
    small = (shape[0], -(-shape[1] // 5), -(-shape[2] // 7)) if blocks else shape
    labels = torch.randint(-1, num_classes, small)
    labels = torch.where(torch.rand(small) < 0.1, IGNORE, labels)
    if blocks:
        labels = labels.repeat_interleave(5, 1).repeat_interleave(7, 2)
    return labels[:, : shape[1], : shape[2]].to(dtype)


def exact(logits, target, **options):
    """The loss and the gradient in float64."""
    return loss_and_grad(
        reference.outlier_exposure_loss, logits.double(), target, upsample="bilinear", **options
    )


def check(logits, target, upstream=None, tolerance=None, **options):
    options = {"ignore_index": IGNORE} | options
    loss, grad = loss_and_grad(
        outlier_exposure_loss, logits, target, upsample="bilinear", upstream=upstream, **options
    )
    wide = None if upstream is None else upstream.double()
    expected_loss, expected_grad = exact(logits, target, upstream=wide, **options)
    assert loss.dtype == torch.promote_types(logits.dtype, torch.float32)
    assert loss.shape == expected_loss.shape
    assert (grad.dtype, grad.shape) == (logits.dtype, logits.shape)
    in_loss_dtype = TOLERANCE[loss.dtype]
    scale = max(1.0, expected_loss.abs().max().item() if loss.numel() else 0.0)
    assert max_error(loss, expected_loss) <= (tolerance or in_loss_dtype) * scale
    scale = expected_grad.abs().max().item()
    assert max_error(grad, expected_grad) <= (tolerance or TOLERANCE[logits.dtype]) * scale + 1e-30
    return grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "wide", "align_corners"), COLUMNS)
def test_sizes(width, wide, align_corners, dtype):
    for (height, high), blocks in itertools.product(ROWS, [False, True]):
        logits = make_logits((2, 5, height, width), dtype)
        target = make_labels(5, (2, high, wide), blocks=blocks)
        check(logits, target, align_corners=align_corners)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 8, 9, 19, 150, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_classes(dtype, num_classes):
    logits = make_logits((1, num_classes, 3, 9), dtype)
    target = make_labels(num_classes, (1, 12, 36))
    grad = check(logits, target)
    if num_classes == 1:
        assert not grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype, layout):
    logits = LAYOUTS[layout](make_logits((2, 19, 5, 6), dtype))
    grad = check(logits, make_labels(19, (2, 20, 24)))
    if logits.is_contiguous(memory_format=torch.channels_last):
        assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(reduction, align_corners):
    logits = make_logits((2, 7, 5, 6), torch.float32)
    weight = torch.rand(7)
    alphas = (torch.rand(2, 1, 1), torch.rand(24), torch.rand(2, 20, 24), torch.tensor(0.0))
    for options in (
        {"alpha": 0.0},
        {"alpha": -1.5},
        {"ignore_index": 3},
        {"ood_index": 2},
        {"ignore_index": -1, "ood_index": 0},
        {"weight": weight},
        {"label_smoothing": 0.1},
        {"weight": weight, "label_smoothing": 0.1},
        {"counts": (3.5, 2.0)} if "mean" in reduction else {},
        *({"alpha": alpha} for alpha in alphas),
    ):
        target = make_labels(7, (2, 20, 24))
        if "ood_index" in options:  # other negative labels are illegal
            target = target.where(target >= 0, options.get("ignore_index", options["ood_index"]))
        upstream = torch.randn(target.shape) if reduction == "none" else None
        check(logits, target, upstream, reduction=reduction, align_corners=align_corners, **options)


@pytest.mark.parametrize("dtype", INT_DTYPES, ids=str)
def test_types_of_labels(dtype):
    logits = make_logits((2, 5, 3, 9), torch.float32)
    labels = torch.randint(0, 5, (2, 12, 36))
    losses = [
        outlier_exposure_loss(logits, target, ood_index=4, ignore_index=3, upsample="bilinear")
        for target in (labels, labels.to(dtype), labels.to(dtype).mT.contiguous().mT)
    ]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_alpha(reduction):
    logits = make_logits((2, 5, 3, 9), torch.float64)
    target = make_labels(5, (2, 12, 36))
    for shape in [(), (36,), (2, 1, 1), (2, 12, 36)]:
        grads = []
        for function in (outlier_exposure_loss, reference.outlier_exposure_loss):
            alpha = torch.linspace(-1, 2, max(1, torch.Size(shape).numel()), dtype=torch.float64)
            alpha = alpha.reshape(shape).requires_grad_()
            loss = function(
                logits, target, alpha, reduction, ignore_index=IGNORE, upsample="bilinear"
            )
            grads.append(torch.autograd.grad(loss.sum(), alpha)[0])
        assert max_error(*grads) <= 1e-12 * max(1, grads[1].abs().max().item())


def test_equal_sizes_are_the_loss():
    logits = make_logits((2, 5, 6, 8), torch.float32)
    target = make_labels(5, (2, 6, 8))
    for align_corners in (False, True):
        ours = loss_and_grad(
            outlier_exposure_loss,
            logits,
            target,
            upsample="bilinear",
            align_corners=align_corners,
        )
        for value, expected in zip(
            ours, loss_and_grad(outlier_exposure_loss, logits, target), strict=True
        ):
            assert torch.equal(value, expected)


def test_smaller_targets():
    logits = make_logits((2, 5, 16, 16), torch.float32)
    for size in [(8, 8), (8, 32), (32, 5), (1, 1)]:
        check(logits, make_labels(5, (2, *size)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0)])
def test_nothing(shape, reduction):
    logits = make_logits((shape[0], 3, 4, 4), torch.float32).requires_grad_()
    target = torch.zeros(shape, dtype=torch.int64)
    loss = outlier_exposure_loss(logits, target, reduction=reduction, upsample="bilinear")
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    expected = {"none": torch.empty(shape), "mean": torch.tensor(torch.nan)}
    assert torch.equal(loss.isnan(), expected.get(reduction, torch.tensor(0.0)).isnan())
    assert not loss.nansum()
    assert grad.shape == logits.shape
    assert not grad.any()


def test_ignored_pixels_hide_nan():
    """Those whose logits depend on a NaN; torch interpolates to the same pixels."""
    for value in (torch.nan, torch.inf):
        for columns, align_corners in (((9, 36), False), ((9, 33), True), ((9, 30), False)):
            logits = make_logits((1, 19, 4, columns[0]), torch.float32)
            logits[0, 3, 2, 5] = value
            target = make_labels(19, (1, 16, columns[1]))
            size = target.shape[1:]
            full = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
            hidden = target.where(full.isfinite().all(1), IGNORE)
            grad = check(logits, hidden, align_corners=align_corners, tolerance=2e-6)
            assert grad.isfinite().all()
            loss = outlier_exposure_loss(
                logits,
                target.clamp(min=0),
                reduction="none",
                upsample="bilinear",
                align_corners=align_corners,
            )
            may_be_nan = ~full.isfinite().all(1)
            if align_corners:  # torch multiplies a NaN by 0 where a pixel lies on an element
                assert not loss[~may_be_nan].isnan().any()
            else:
                assert torch.equal(loss.isnan(), may_be_nan)


def test_infinite_logits_without_weight_are_not_looked_at():
    """Torch multiplies them by 0: at the edges its pixels are NaN."""
    logits = make_logits((1, 5, 4, 9), torch.float32)
    logits[:, 2] = -torch.inf  # a class that is masked
    for width, align_corners in ((36, False), (33, True), (18, False), (17, True), (30, False)):
        target = torch.randint(0, 2, (1, 16, width))
        inliers = {"upsample": "bilinear", "align_corners": align_corners}
        loss, grad = loss_and_grad(outlier_exposure_loss, logits, target, **inliers)
        without = logits[:, [0, 1, 3, 4]]
        expected = loss_and_grad(
            reference.outlier_exposure_loss, without.double(), target, **inliers
        )
        assert not grad[:, 2].any()
        assert max_error(loss, expected[0]) <= 1e-6
        assert max_error(grad[:, [0, 1, 3, 4]], expected[1]) <= 1e-6 * expected[1].abs().max()
    assert outlier_exposure_loss(logits, target * 0 + 2, **inliers) == torch.inf
    assert outlier_exposure_loss(logits, target * 0 - 1, **inliers) == torch.inf


@pytest.mark.parametrize("gap", [50.0, 110.0, 116.0, 117.0, 125.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_classes_that_dominate_one_corner_each(dtype, gap):
    """Between such corners all exponentials are small. At half of the gap they are 2^-84, the limit
    below which float32 is computed with each pixel's own maximum, at a gap of 116.4."""
    for columns, align_corners in (((9, 36), False), ((9, 33), True), ((9, 30), False)):
        logits = torch.full((1, 6, 5, columns[0]), -gap, dtype=dtype)
        logits.scatter_(1, torch.randint(0, 6, (1, 1, 5, columns[0])), 0.0)
        target = make_labels(6, (1, 20, columns[1]))
        check(logits, target, align_corners=align_corners)


def test_equal_logits_of_outliers_have_a_gradient_of_zero():
    for num_classes, width in itertools.product([2, 3, 7, 19], [36, 18, 30]):
        logits = make_logits((2, 1, 4, 9), torch.float32).expand(2, num_classes, 4, 9)
        target = torch.full((2, 16, width), -1)
        _, grad = loss_and_grad(outlier_exposure_loss, logits, target, upsample="bilinear")
        assert not grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_unfused(dtype):
    """In float32, and without roundings between interpolation and loss."""
    for scale, offset in [(0.1, 0), (1, 0), (5, 0), (20, 0), (60, 0), (1, 1e4)]:
        if offset and dtype not in (torch.float32, torch.float64):
            continue
        for times in (2, 4, 16):
            height, width = 7, 9
            shape = (1, 19, height, width)
            logits = make_logits(shape, dtype, scale=scale, offset=offset)
            target = make_labels(19, (1, height * times, width * times))
            ours = loss_and_grad(outlier_exposure_loss, logits, target, upsample="bilinear")
            wide = logits.to(torch.promote_types(dtype, torch.float32))
            theirs = loss_and_grad(
                reference.outlier_exposure_loss, wide, target, upsample="bilinear"
            )
            loss, grad = exact(logits, target)
            of_loss = 0 if dtype == torch.float64 else 1e-7 * loss.abs()
            assert max_error(ours[0], loss) <= max_error(theirs[0], loss) + of_loss + 1e-12
            error = max_error(theirs[1].to(dtype), grad)
            assert max_error(ours[1], grad) <= max(error, 3e-7 * grad.abs().max())


def test_certain_labels():
    """A trained network: the exponential at the label and what it subtracts cancel."""
    labels = torch.randint(0, 19, (1, 9, 13))
    logits = make_logits((1, 19, 9, 13), torch.float32, scale=1.0)
    logits.scatter_add_(1, labels.unsqueeze(1), torch.full((1, 1, 9, 13), 12.0))
    for times in (4, 8, 16):
        target = labels.repeat_interleave(times, 1).repeat_interleave(times, 2)
        check(logits, target, tolerance=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_for_any_number_of_threads(reduction):
    logits = make_logits((3, 19, 33, 40), torch.float32)
    target = make_labels(19, (3, 132, 160))
    upstream = torch.randn(target.shape) if reduction == "none" else None
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                loss_and_grad(
                    outlier_exposure_loss,
                    logits,
                    target,
                    reduction=reduction,
                    upstream=upstream,
                    upsample="bilinear",
                )
            )
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_upstream_gradients():
    logits = make_logits((2, 5, 6, 8), torch.float32).requires_grad_()
    target = make_labels(5, (2, 24, 32))
    loss = outlier_exposure_loss(logits, target, ignore_index=IGNORE, upsample="bilinear")
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (again,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (three,) = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)
    (last,) = torch.autograd.grad(loss, logits, torch.tensor(3.0))
    assert torch.equal(one, again)
    assert torch.equal(three, one * 3)
    assert torch.equal(last, three)


def test_a_loss_scaler_keeps_small_gradients():
    logits = make_logits((2, 5, 6, 8), torch.float16)
    target = make_labels(5, (2, 24, 32))
    options = {"ignore_index": IGNORE, "upsample": "bilinear"}
    _, exact_grad = exact(logits, target, ignore_index=IGNORE)
    leaf = logits.detach().requires_grad_()
    loss = outlier_exposure_loss(leaf, target, **options) * 1e-4
    (grad,) = torch.autograd.grad(loss * 65536, leaf)
    expected = exact_grad * 65536 * 1e-4
    assert max_error(grad, expected) <= 2**-11 * expected.abs().max()

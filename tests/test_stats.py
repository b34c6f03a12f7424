"""return_stats and return_scores: what a training loop logs, from the same pass."""

import pytest
import torch
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from torch.utils._python_dispatch import TorchDispatchMode

from oe_ext import LossStats, OutlierExposureLoss, outlier_exposure_loss, reference

SHAPES = [(30, 6), (2, 6, 5, 4)]


def expected_stats(logits, target):
    """In float64, with masks."""
    inlier, outlier = reference.inliers_and_outliers(target, IGNORE, None)
    rows = reference.outlier_exposure_loss(
        logits.detach().double(), target, 1.0, "none", ignore_index=IGNORE
    )
    right = logits.detach().argmax(1) == target
    return {
        "inlier_loss": rows[inlier].mean(),
        "outlier_loss": rows[outlier].mean(),
        "num_inliers": inlier.sum(),
        "num_outliers": outlier.sum(),
        "inlier_accuracy": right[inlier].double().mean(),
    }


@pytest.mark.parametrize("alpha", [0.3, 0.0, torch.tensor(0.3)], ids=["0.3", "0", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_stats(device, shape, reduction, dtype, alpha):
    logits = make_logits(shape, torch.float64, device).to(dtype).requires_grad_()
    target = make_target(shape, device=device)
    options = {"ignore_index": IGNORE}
    alpha = alpha.to(device) if isinstance(alpha, torch.Tensor) else alpha
    plain = outlier_exposure_loss(logits, target, alpha, reduction, **options)
    loss, stats = outlier_exposure_loss(
        logits, target, alpha, reduction, **options, return_stats=True
    )
    assert torch.equal(loss, plain)
    assert torch.equal(*(torch.autograd.grad(x.sum(), logits)[0] for x in (loss, plain)))
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 2e-6, "atol": 0}
    for name, theirs in expected_stats(logits, target).items():
        ours = getattr(stats, name)
        assert ours.shape == ()
        assert not ours.requires_grad
        if name.startswith("num"):
            assert torch.equal(ours, theirs)
        else:
            assert ours.dtype == loss.dtype
            torch.testing.assert_close(ours.double(), theirs, **tolerance)
    assert stats.max_softmax is None
    assert stats.energy is None


@pytest.mark.parametrize("shape", SHAPES)
def test_scores(device, shape):
    logits = make_logits(shape, torch.float32, device)
    target = make_target(shape, device=device)
    loss, stats = outlier_exposure_loss(logits, target, ignore_index=IGNORE, return_scores=True)
    assert torch.equal(loss, outlier_exposure_loss(logits, target, ignore_index=IGNORE))
    counted = target != IGNORE
    exact = logits.double()
    for ours, theirs in (
        (stats.max_softmax, exact.softmax(1).amax(1)),
        (stats.energy, exact.logsumexp(1)),
    ):
        assert ours.shape == target.shape
        torch.testing.assert_close(ours[counted].double(), theirs[counted], rtol=1e-6, atol=1e-6)
        assert ours[~counted].isnan().all()
    assert stats.inlier_loss is None


def test_what_there_is_none_of(device):
    logits = make_logits((6, 4), torch.float32, device)
    target = torch.full((6,), -1, device=device)
    _, stats = outlier_exposure_loss(logits, target, return_stats=True)
    assert stats.inlier_loss.isnan()
    assert stats.inlier_accuracy.isnan()
    assert (stats.num_inliers, stats.num_outliers) == (0, 6)


def test_ignored_rows_may_hold_anything(device):
    logits = make_logits((6, 4), torch.float32, device)
    target = torch.tensor([0, 1, IGNORE, -1, IGNORE, 2], device=device)
    options = {"ignore_index": IGNORE, "return_stats": True}
    expected = outlier_exposure_loss(logits, target, **options)
    logits[target == IGNORE] = float("nan")
    torch.testing.assert_close(outlier_exposure_loss(logits, target, **options), expected)


class LargeReads(TorchDispatchMode):
    """The operators that are given a tensor of as many elements as the logits."""

    def __init__(self, numel):
        super().__init__()
        self.numel = numel
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        large = [a for a in args if isinstance(a, torch.Tensor) and a.numel() >= self.numel]
        if large and func not in (torch.ops.aten.detach.default, torch.ops.aten.gather.default):
            self.seen.append(str(func))
        assert func is not torch.ops.aten._local_scalar_dense.default, "a synchronisation"
        return func(*args, **(kwargs or {}))


def test_no_second_pass_and_no_synchronisation():
    """One operator reads the logits; gather() takes one of each row. Nothing becomes a number."""
    logits = make_logits((20, 50), torch.float32)
    target = make_target((20, 50))
    with LargeReads(logits.numel()) as reads:
        outlier_exposure_loss(logits, target, return_stats=True, return_scores=True)
    assert reads.seen == ["oe_ext._outlier_exposure_loss_forward.default"]


@pytest.mark.no_simt("no kernel matters here")
def test_compiled(device):
    logits = make_logits((8, 5), torch.float32, device)
    target = make_target((8, 5), device=device)

    def function(x, y):
        return outlier_exposure_loss(x, y, return_stats=True, return_scores=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), function(logits, target))
    assert isinstance(compiled(logits, target)[1], LossStats)


def test_bad_input_is_told():
    logits, target = make_logits((8, 5)), make_target((8, 5))
    with pytest.raises(ValueError, match="alpha must be a finite number, got inf"):
        outlier_exposure_loss(logits, target, float("inf"), return_stats=True)
    with pytest.raises(ValueError, match="reduction"):
        outlier_exposure_loss(logits, target, 0.5, "median", return_stats=True)


def test_module():
    logits, target = make_logits((8, 5), torch.float32), make_target((8, 5))
    module = OutlierExposureLoss(return_stats=True)
    assert repr(module).endswith("return_stats=True)")
    loss, stats = module(logits, target)
    assert torch.equal(loss, OutlierExposureLoss()(logits, target))
    assert stats.num_outliers == (target < 0).sum()

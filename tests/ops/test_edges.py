"""Every row of the list of edge cases."""

import pytest
import torch
import torch.nn.functional as F
from inputs import DTYPES, IGNORE, REDUCTIONS, make_logits, make_target
from oracles import exact, loss_and_grad, max_error

from oe_ext import outlier_exposure_loss

INF, NAN = float("inf"), float("nan")

# Both memory orders: along the classes, and along the rows.
WALKS = {"rows": lambda x: x, "pixels": lambda x: x.t().contiguous().t()}


@pytest.fixture(params=WALKS)
def walk(request):
    return WALKS[request.param]


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (0, 5, 3, 4)])
def test_no_positions(device, shape):
    logits = torch.zeros(shape, device=device)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=device)
    values = {}
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(outlier_exposure_loss, logits, target, reduction=reduction)
        assert grad.shape == logits.shape
        values[reduction] = loss
    assert values["mean"].isnan()
    assert values["sum"] == 0
    assert values["group_mean"] == 0
    assert values["none"].shape == target.shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 0.0])
def test_all_ignored(device, walk, reduction, garbage):
    logits = walk(torch.full((4, 3), garbage, device=device))
    target = torch.full((4,), IGNORE, device=device)
    loss, grad = loss_and_grad(
        outlier_exposure_loss, logits, target, reduction=reduction, ignore_index=IGNORE
    )
    assert (loss == 0).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_garbage_in_an_ignored_row_leaks_nowhere(device, walk, dtype, reduction, garbage):
    logits = make_logits((5, 4), dtype, device)
    target = torch.tensor([0, IGNORE, -1, 3, IGNORE], device=device)
    clean = loss_and_grad(
        outlier_exposure_loss, walk(logits), target, reduction=reduction, ignore_index=IGNORE
    )
    logits[1], logits[4, 2] = garbage, garbage
    dirty = loss_and_grad(
        outlier_exposure_loss, walk(logits), target, reduction=reduction, ignore_index=IGNORE
    )
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert (dirty[1][[1, 4]] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_alpha_0_silences_outliers(device, walk, reduction, garbage, as_tensor):
    logits = make_logits((4, 3), device=device)
    logits[1], logits[3, 0] = garbage, garbage
    target = torch.tensor([0, -1, 2, -1], device=device)
    alpha = torch.zeros((), dtype=torch.float64, device=device) if as_tensor else 0.0
    loss, grad = loss_and_grad(
        outlier_exposure_loss, walk(logits), target, alpha=alpha, reduction=reduction
    )
    inlier_loss = F.cross_entropy(logits[[0, 2]], target[[0, 2]], reduction="none")
    expected = {
        "sum": inlier_loss.sum(),
        "mean": inlier_loss.sum() / 4,
        "group_mean": inlier_loss.mean(),
    }
    if reduction == "none":
        assert (loss[[1, 3]] == 0).all()
        torch.testing.assert_close(loss[[0, 2]], inlier_loss)
    else:
        torch.testing.assert_close(loss, expected[reduction])
    assert (grad[[1, 3]] == 0).all()
    assert grad[[0, 2]].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_in_an_inlier_row(device, walk, dtype):
    logits = make_logits((3, 4), dtype, device)
    logits[0, 1], logits[2, 0] = -INF, -INF
    target = torch.tensor([3, 1, 0], device=device)
    loss, grad = loss_and_grad(outlier_exposure_loss, walk(logits), target, reduction="none")
    expected, expected_grad = exact(logits, target, reduction="none")
    assert loss[0].isfinite()
    assert loss[2] == INF, "-inf at the label"
    assert max_error(loss, expected) <= 1e-6 * 10
    assert grad.isfinite().all()
    assert grad[0, 1] == 0
    assert max_error(grad, expected_grad) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_in_an_outlier_row(device, walk, dtype):
    logits = make_logits((2, 4), dtype, device)
    logits[0, 2] = -INF
    target = torch.tensor([-1, -1], device=device)
    loss, grad = loss_and_grad(outlier_exposure_loss, walk(logits), target, reduction="none")
    assert loss[0] == INF
    assert loss[1].isfinite()
    assert grad.isfinite().all()
    assert grad[0, 2] == -0.125  # 0.5 * (0 - 1 / 4)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("garbage", [NAN, INF])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_nan_stays_in_its_row(device, walk, garbage, position, reduction):
    for label in (1, -1):
        logits = make_logits((3, 4), device=device)
        logits[1, position] = garbage
        target = torch.tensor([0, label, -1], device=device)
        loss, grad = loss_and_grad(outlier_exposure_loss, walk(logits), target, reduction=reduction)
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()
        if reduction == "none":
            assert loss.isnan().tolist() == [False, True, False]
        else:
            assert loss.isnan()


@pytest.mark.parametrize("label", [0, -1])
def test_a_row_of_minus_infinity_has_no_softmax(device, walk, label):
    logits = make_logits((2, 3), device=device)
    logits[0] = -INF
    target = torch.tensor([label, 1], device=device)
    loss, grad = loss_and_grad(outlier_exposure_loss, walk(logits), target, reduction="none")
    assert loss.isnan().tolist() == [True, False]
    assert grad[0].isnan().all()
    assert F.cross_entropy(logits, target.clamp(min=0), reduction="none")[0].isnan(), "as torch's"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_finite_logits(device, walk, dtype):
    huge = torch.finfo(dtype).max
    logits = torch.tensor([[huge, -huge, 0], [-huge, -huge, -huge]], dtype=dtype, device=device)
    target = torch.tensor([0, 2], device=device)
    loss, grad = loss_and_grad(outlier_exposure_loss, walk(logits), target, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="none"))
    assert grad.isfinite().all()
    outlier = outlier_exposure_loss(walk(logits)[1:], target[:1] - 1, 1.0, "none")
    torch.testing.assert_close(outlier, torch.tensor([3.0], dtype=dtype, device=device).log())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 1), (2, 1, 3)])
def test_one_class_costs_nothing(device, dtype, shape):
    logits = make_logits(shape, dtype, device)
    target = torch.where(make_target(shape, device=device) < 0, -1, 0)
    for reduction in REDUCTIONS:
        loss, grad = loss_and_grad(outlier_exposure_loss, logits, target, reduction=reduction)
        assert (loss == 0).all()
        assert (grad == 0).all()


def test_an_empty_group_counts_0(device):
    logits = make_logits((4, 3), device=device)
    inliers = torch.tensor([0, 1, 2, 0], device=device)
    torch.testing.assert_close(
        outlier_exposure_loss(logits, inliers, reduction="group_mean"),
        F.cross_entropy(logits, inliers),
    )
    outliers = torch.full((4,), -1, device=device)
    torch.testing.assert_close(
        outlier_exposure_loss(logits, outliers, 0.5, "group_mean"),
        0.5 * F.cross_entropy(logits, outliers + 1, label_smoothing=1.0),
    )


def test_ignored_positions_do_not_divide_the_mean(device):
    logits = make_logits((4, 3), device=device)
    target = torch.tensor([0, IGNORE, -1, IGNORE], device=device)
    loss = outlier_exposure_loss(logits, target, ignore_index=IGNORE)
    torch.testing.assert_close(loss, outlier_exposure_loss(logits[[0, 2]], target[[0, 2]]))

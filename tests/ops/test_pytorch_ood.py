"""pytorch-ood's class, which ours replaces, on every case where it works."""

import optional
import pytest
import torch
import torch.nn.functional as F
from inputs import make_logits, make_target
from oracles import exact, loss_and_grad, max_error

from oe_ext import OutlierExposureLoss, outlier_exposure_loss

Reference = optional.pytorch_ood_class()


def random_case(generator, scale_choices=(0.1, 1.0, 5.0, 30.0), offsets=(0.0, 0.0, 100.0, -1e4)):
    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    def size(high):
        return int(torch.randint(1, high, (), generator=generator))

    num_classes = pick([1, 2, 3, 5, 10, 19, 100, 257])
    if pick([True, False]):
        shape = (size(65), num_classes)
    else:
        shape = (size(4), num_classes, size(9), size(9))
    logits = make_logits(shape, torch.float32, scale=pick(scale_choices), offset=pick(offsets))
    target = make_target(shape, pick(["mixed", "mixed", "inliers", "outliers"]))
    return logits, target, pick([0.0, 0.5, 1.0, 3.0]), pick(["mean", "sum", "none", None])


@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed):
    """100 cases per seed: values and gradients are within 2e-6, or closer to float64."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(100):
        logits, target, alpha, reduction = random_case(generator)
        ours = loss_and_grad(OutlierExposureLoss(alpha, reduction), logits, target)
        theirs = loss_and_grad(Reference(alpha, reduction), logits, target)
        truth = exact(logits, target, alpha, reduction)
        for our, their, true in zip(ours, theirs, truth, strict=True):
            assert our.dtype == their.dtype
            assert our.shape == their.shape
            scale = true.abs().max().item()
            assert max_error(our, true) <= max(2e-6 * scale, max_error(their, true))


@pytest.mark.parametrize("num_rows", [64, 4096])
@pytest.mark.parametrize("num_classes", [10, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_error_is_no_larger_than_theirs(num_rows, num_classes, offset):
    """A budget: over a whole batch, our largest error is at most theirs."""
    shape = (num_rows, num_classes)
    logits = make_logits(shape, torch.float32, offset=offset)
    target = make_target(shape)
    ours = loss_and_grad(OutlierExposureLoss(reduction="none"), logits, target)
    theirs = loss_and_grad(Reference(reduction="none"), logits, target)
    truth = exact(logits, target, reduction="none")
    # Ours may have one rounding of the largest value, where theirs happens to have none.
    for our, their, true in zip(ours, theirs, truth, strict=True):
        ulp = torch.finfo(torch.float32).eps * true.abs().max().item()
        assert max_error(our, true) <= max_error(their, true) + ulp


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_batch(reduction):
    logits = torch.zeros(0, 5)
    target = torch.zeros(0, dtype=torch.int64)
    ours = OutlierExposureLoss(reduction=reduction)(logits, target)
    theirs = Reference(reduction=reduction)(logits, target)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours.isnan() or ours == theirs


def test_minus_100_is_an_outlier_there_too():
    logits = make_logits((4, 5), torch.float32)
    target = torch.tensor([0, -100, 3, -1])
    ours = OutlierExposureLoss(reduction="none")(logits, target)
    torch.testing.assert_close(ours, Reference(reduction="none")(logits, target))


def test_signature_is_theirs():
    """Only the import changes: positional and named arguments mean the same."""
    logits, target = make_logits((8, 4), torch.float32), make_target((8, 4))
    for arguments, named in [((), {}), ((0.3,), {}), ((0.3, "sum"), {}), ((), {"alpha": 2.0})]:
        ours = OutlierExposureLoss(*arguments, **named)(logits=logits, target=target)
        theirs = Reference(*arguments, **named)(logits=logits, target=target)
        torch.testing.assert_close(ours, theirs)


def test_group_mean_is_what_the_paper_trains_with(device):
    """Hendrycks et al.'s code: F.cross_entropy on the inliers, and for the outliers
    ``-(x.mean(1) - logsumexp(x, 1)).mean()``, weighted by 0.5."""
    inliers = make_logits((6, 5), device=device)
    outliers = make_logits((9, 5), device=device)
    labels = torch.randint(0, 5, (6,), device=device)
    published = F.cross_entropy(inliers, labels)
    published += 0.5 * -(outliers.mean(1) - torch.logsumexp(outliers, dim=1)).mean()
    target = torch.cat([labels, torch.full((9,), -1, device=device)])
    ours = outlier_exposure_loss(torch.cat([inliers, outliers]), target, 0.5, "group_mean")
    torch.testing.assert_close(ours, published, rtol=1e-12, atol=0)

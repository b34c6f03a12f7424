"""return_stats and return_scores: what a training loop logs, from the same pass."""

import io

import pytest
import torch
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from oe_ext import LossScores, LossStats, OutlierExposureLoss, outlier_exposure_loss, reference

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


@pytest.mark.parametrize("shape", SHAPES)
def test_scores(device, shape):
    logits = make_logits(shape, torch.float32, device)
    target = make_target(shape, device=device)
    loss, scores = outlier_exposure_loss(logits, target, ignore_index=IGNORE, return_scores=True)
    assert torch.equal(loss, outlier_exposure_loss(logits, target, ignore_index=IGNORE))
    counted = target != IGNORE
    exact = logits.double()
    for ours, theirs in (
        (scores.max_softmax, exact.softmax(1).amax(1)),
        (scores.energy, exact.logsumexp(1)),
    ):
        assert ours.shape == target.shape
        torch.testing.assert_close(ours[counted].double(), theirs[counted], rtol=1e-6, atol=1e-6)
        assert ours[~counted].isnan().all()


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
    for needs_gradient in (False, True):
        with LargeReads(logits.numel()) as reads:
            both(logits.requires_grad_(needs_gradient), target)
        assert reads.seen == ["oe_ext._outlier_exposure_loss_forward.default"]


def both(x, y, alpha=0.5):
    return outlier_exposure_loss(x, y, alpha, return_stats=True, return_scores=True)


@pytest.mark.no_simt("no kernel matters here")
def test_compiled(device):
    """Also with another number, which is not compiled anew each time."""
    logits = make_logits((8, 5), torch.float32, device)
    target = make_target((8, 5), device=device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for alpha in (0.5, 0.2, 0.0, 3.0):
        result = compiled(logits, target, alpha)
        torch.testing.assert_close(result, both(logits, target, alpha))
        assert [type(part) for part in result] == [torch.Tensor, LossStats, LossScores]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_an_exported_program_returns_them():
    class Model(torch.nn.Module):
        def forward(self, logits, target):
            return both(logits, target)

    args = (make_logits((8, 5)), make_target((8, 5)))
    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(), args), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(*args), both(*args))


def test_transforms(device):
    """All that is returned are tensors, as vmap and the aux of grad want it."""
    logits = make_logits((3, 8, 5), device=device)
    target = torch.stack([make_target((8, 5), device=device) for _ in range(3)])
    expected = [both(x, y) for x, y in zip(logits, target, strict=True)]
    batched = torch.vmap(both)(logits, target)
    torch.testing.assert_close(
        batched[1].inlier_loss, torch.stack([e[1].inlier_loss for e in expected])
    )
    torch.testing.assert_close(batched[2].energy, torch.stack([e[2].energy for e in expected]))

    def with_aux(x, y):
        loss, stats = outlier_exposure_loss(x, y, return_stats=True)
        return loss, stats

    _, stats = torch.func.grad(with_aux, has_aux=True)(logits[0], target[0])
    torch.testing.assert_close(tuple(stats), tuple(expected[0][1]))


def test_a_batch_of_targets_alone(device):
    """vmap over them; the logits are an ordinary leaf, whose gradient comes after."""
    logits = make_logits((8, 5), device=device).requires_grad_()
    target = torch.stack([make_target((8, 5), device=device) for _ in range(3)])
    losses = torch.vmap(lambda y: both(logits, y)[0])(target)
    (ours,) = torch.autograd.grad(losses.sum(), logits)
    total = sum(reference.outlier_exposure_loss(logits, y) for y in target)
    (theirs,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(ours, theirs)


def test_hooks_on_saved_tensors_see_all_that_is_kept():
    """As for the loss alone: where they decide, no gradient is kept beside them."""
    logits, target = make_logits((200, 50)).requires_grad_(), make_target((200, 50))
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
    ):
        both(logits, target)
    assert sum(t.numel() == logits.numel() for t in kept) == 1
    assert max(event.self_cpu_memory_usage for event in record.events()) < logits.nbytes / 2


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

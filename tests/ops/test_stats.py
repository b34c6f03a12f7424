"""return_stats and return_scores: statistics for a training loop, from the same pass."""

import io

import numpy as np
import pytest
import torch
import torch.fx.experimental.proxy_tensor
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from oe_ext import LossScores, LossStats, OutlierExposureLoss, outlier_exposure_loss, reference

SHAPES = [(30, 6), (2, 6, 5, 4)]


def expected_stats(logits, target):
    """The statistics in float64, computed with masks."""
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
        "inlier_loss_sum": rows[inlier].sum(),
        "outlier_loss_sum": rows[outlier].sum(),
        "num_correct": right[inlier].sum(),
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
            assert ours.dtype == (torch.float64 if name.endswith("sum") else loss.dtype)
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
        (scores.energy, -exact.logsumexp(1)),
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


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("row", "max_softmax", "energy"),
    [
        ([-INF, -INF, -INF], NAN, INF),
        ([INF, 0.0, 1.0], NAN, -INF),
        ([INF, INF, 1.0], NAN, -INF),
        ([INF, -INF, 1.0], NAN, -INF),
        ([NAN, 0.0, 1.0], NAN, NAN),
        ([0.0, -INF, -INF], 1.0, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("label", [0, -1])
def test_scores_at_the_ends(device, row, max_softmax, energy, label):
    """The scores equal those from torch's softmax and logsumexp."""
    logits = torch.tensor([row, [1.0, 2.0, 3.0]], device=device)
    target = torch.tensor([label, 0], device=device)
    _, scores = outlier_exposure_loss(logits, target, return_scores=True)
    expected = torch.tensor([max_softmax, energy])
    ours = torch.stack([scores.max_softmax[0], scores.energy[0]]).cpu()
    torch.testing.assert_close(ours, expected, equal_nan=True)
    theirs = torch.stack([logits.softmax(1).amax(1), -logits.logsumexp(1)])
    torch.testing.assert_close(torch.stack(scores), theirs, equal_nan=True)


def test_which_end_of_a_score_is_an_outlier():
    """Confident and unconfident logits rank as in detectors and pytorch-ood's EnergyBased."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    _, scores = outlier_exposure_loss(logits, torch.tensor([0, -1]), return_scores=True)
    assert scores.max_softmax[0] > scores.max_softmax[1], "low for outliers"
    assert scores.energy[0] < scores.energy[1], "high for outliers"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 7), (4, 7, 9, 5)])
@pytest.mark.parametrize("compiled", [False, True])
def test_accuracy_is_that_of_argmax(device, shape, dtype, compiled):
    """Logits with several maxima, and with NaN or inf."""
    rows = shape[0] * shape[2] * shape[3] if len(shape) > 2 else shape[0]
    batches = {
        "zeros": torch.zeros(shape),
        "few values": torch.randint(0, 3, shape).float(),
        "near 40": 40 + torch.randn(shape) / 10,
        "some NaN": torch.where(torch.rand(shape) < 0.2, NAN, torch.randint(0, 3, shape).float()),
        "some inf": torch.where(torch.rand(shape) < 0.3, INF, torch.randn(shape)),
        "some -inf": torch.where(torch.rand(shape) < 0.6, -INF, torch.randn(shape)),
    }
    target = torch.randint(-1, shape[1], (rows,)).reshape(shape[0], *shape[2:]).to(device)
    function = with_stats
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(with_stats, fullgraph=True, backend="aot_eager")
    for name, logits in batches.items():
        logits = logits.to(dtype).to(device)
        stats = function(logits, target)
        right = (logits.argmax(1) == target) & (target >= 0)
        assert stats.num_correct == right.sum(), name
        assert stats.inlier_accuracy == right.sum().to(stats[0].dtype) / (target >= 0).sum(), name


def with_stats(logits, target):
    return outlier_exposure_loss(logits, target, return_stats=True)[1]


def test_means_of_terms_whose_sum_no_float32_can_hold(device):
    logits = torch.tensor([[0.0, 3e38], [0.0, 3e38], [1.5e38, -1.5e38]] * 4, device=device)
    target = torch.tensor([0, 0, -1] * 4, device=device)
    _, stats = outlier_exposure_loss(logits, target, return_stats=True)
    torch.testing.assert_close(stats.inlier_loss.cpu(), torch.tensor(3e38))
    torch.testing.assert_close(stats.outlier_loss.cpu(), torch.tensor(1.5e38))
    assert stats.inlier_loss_sum.isfinite()


@pytest.mark.parametrize(
    "label", [0, np.array(0), np.int64(0), np.uint8(0), torch.tensor(0)], ids=lambda m: str(type(m))
)
def test_special_labels_of_other_integer_types(label):
    logits, target = make_logits((30, 4), torch.float32), torch.arange(30) % 4
    for options in ({"ignore_index": label}, {"ood_index": label}):
        plain = dict.fromkeys(options, 0)
        ours = outlier_exposure_loss(logits, target, **options, return_stats=True)
        theirs = outlier_exposure_loss(logits, target, **plain, return_stats=True)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        module = OutlierExposureLoss(**options)
        assert torch.equal(module(logits, target), theirs[0])


def test_an_epoch_is_averaged_by_its_sums(device):
    """Batches of different mixes, some without outliers, average as one batch of all."""
    batches = [
        (make_logits((n, 4), torch.float32, device), make_target((n, 4), mix, device=device))
        for n, mix in ((5, "inliers"), (12, "mixed"), (3, "outliers"), (7, "mixed"))
    ]
    total = None
    for logits, target in batches:
        stats = with_stats(logits, target)
        total = stats if total is None else total.merge(stats)
    whole = with_stats(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    assert all(value.isfinite() for value in total)
    assert [value.dtype for value in total] == [value.dtype for value in whole]


class Head(torch.nn.Module):
    """A model with its loss, as users trace it."""

    def __init__(self, alpha):
        super().__init__()
        self.layer = torch.nn.Linear(5, 4)
        self.loss = OutlierExposureLoss(
            alpha, ignore_index=IGNORE, return_stats=True, return_scores=True
        )

    def forward(self, x, y):
        return self.loss(self.layer(x), y)


@pytest.mark.parametrize("trace", ["jit.trace", "fx", "make_fx"])
@pytest.mark.parametrize("kind", ["number", "buffer", "parameter"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traced(trace, kind):
    """The trace fixes neither the size of the example nor its need for gradients."""
    alpha = 0.3 if kind == "number" else torch.tensor(0.3)
    model = Head(torch.nn.Parameter(alpha) if kind == "parameter" else alpha)
    example = (torch.randn(6, 5), make_target((6, 4)))
    if trace == "jit.trace":
        with torch.no_grad():  # no gradient is needed
            traced = torch.jit.trace(model, example)
    elif trace == "fx":
        traced = torch.fx.symbolic_trace(model)
    else:
        traced = torch.fx.experimental.proxy_tensor.make_fx(model)(*example)
    batch = (torch.randn(6 if trace == "make_fx" else 9, 5), make_target((9, 4)))
    batch = (batch[0], batch[1][: len(batch[0])])
    ours, theirs = (torch.utils._pytree.tree_leaves(f(*batch)) for f in (traced, model))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert not any(value.requires_grad for value in ours[1:])
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(values[0], parameters) for values in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_ignored_rows_may_hold_anything(device):
    logits = make_logits((6, 4), torch.float32, device)
    target = torch.tensor([0, 1, IGNORE, -1, IGNORE, 2], device=device)
    options = {"ignore_index": IGNORE, "return_stats": True}
    expected = outlier_exposure_loss(logits, target, **options)
    logits[target == IGNORE] = float("nan")
    torch.testing.assert_close(outlier_exposure_loss(logits, target, **options), expected)


class LargeReads(TorchDispatchMode):
    """The operators that get a tensor of the logits' size."""

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
    """One operator reads the logits; gather() takes one of each row. No tensor becomes a number.
    Rows whose argmax is unclear would be read again; here there are none."""
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
    """Also with other numbers, which do not recompile each time."""
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
    """Only tensors are returned, as vmap and the aux of grad require."""
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
    """vmap over the targets; the logits are an ordinary leaf with an ordinary backward."""
    logits = make_logits((8, 5), device=device).requires_grad_()
    target = torch.stack([make_target((8, 5), device=device) for _ in range(3)])
    losses = torch.vmap(lambda y: both(logits, y)[0])(target)
    (ours,) = torch.autograd.grad(losses.sum(), logits)
    total = sum(reference.outlier_exposure_loss(logits, y) for y in target)
    (theirs,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(ours, theirs)


def test_hooks_on_saved_tensors_see_all_that_is_kept():
    """As for the loss alone: if hooks decide, no gradient is kept beside the saved tensors."""
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

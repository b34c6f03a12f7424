"""Classes that are spread over several processes, compared with all in one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from oracles import exact
from processes import run, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from oe_ext import outlier_exposure_loss
from oe_ext.distributed import class_parallel_outlier_exposure_loss

WORLDS = [2, 3]
SPECIAL_LABELS = {"ignore_index": IGNORE}


def _part_of_classes(logits, sizes):
    rank = dist.get_rank()
    begin = sum(sizes[:rank])
    return logits[:, begin : begin + sizes[rank]]


def _shards(num_classes):
    """Uneven numbers of classes, also none."""
    if dist.get_world_size() == 2:
        return [[2, num_classes - 2], [num_classes - 1, 1], [num_classes, 0]]
    return [[1, num_classes - 4, 3], [0, 2, num_classes - 2]]


def _compare_class_parallel(logits, target, reduction, alpha, sizes, rtol, atol):
    x = _part_of_classes(logits, sizes).clone().requires_grad_()
    whole = logits.clone().requires_grad_()
    a = alpha.clone().requires_grad_() if isinstance(alpha, torch.Tensor) else alpha
    b = alpha.clone().requires_grad_() if isinstance(alpha, torch.Tensor) else alpha
    loss = class_parallel_outlier_exposure_loss(x, target, None, a, reduction, **SPECIAL_LABELS)
    expected = outlier_exposure_loss(whole, target, b, reduction, **SPECIAL_LABELS)
    assert loss.dtype == expected.dtype
    same(loss, expected, rtol=rtol, atol=atol)
    upstream = torch.rand(loss.shape, dtype=loss.dtype) + 0.5
    dist.broadcast(upstream, 0)
    is_tensor = isinstance(alpha, torch.Tensor)
    ours = torch.autograd.grad(loss, [x, a] if is_tensor else [x], upstream)
    theirs = torch.autograd.grad(expected, [whole, b] if is_tensor else [whole], upstream)
    eps = torch.finfo(logits.dtype).eps
    local = _part_of_classes(theirs[0], sizes)
    same(ours[0], local, rtol=4 * eps, atol=4 * eps * theirs[0].abs().max().item())
    if is_tensor:
        same(ours[1], theirs[1], rtol=10 * rtol, atol=atol)


def _class_parallel():
    for shape in [(9, 7), (3, 7, 4, 2)]:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            logits = make_logits(shape, torch.float64, scale=3.0).to(dtype)
            target = make_target(shape)
            target.flatten()[:2] = torch.tensor([0, 6])
            rtol, atol = (1e-12, 1e-13) if dtype == torch.float64 else (2e-6, 2e-6)
            for reduction, sizes in itertools.product(REDUCTIONS, _shards(7)):
                _compare_class_parallel(logits, target, reduction, 0.7, sizes, rtol, atol)
            alpha = torch.rand(target.shape, dtype=torch.promote_types(dtype, torch.float32))
            _compare_class_parallel(logits, target, "mean", alpha, _shards(7)[0], rtol, atol)


@pytest.mark.parametrize("world", WORLDS)
def test_class_parallel(world):
    run(world, _class_parallel)


def _special_values():
    """Rows of every kind with infinities and NaN: loss and gradients as in one process."""
    clean, target = make_logits((6, 7)), torch.tensor([0, 3, 6, -1, IGNORE, -2])
    inf, nan, everything = torch.inf, torch.nan, slice(None)
    cases = [
        [(5, slice(2), -inf), (0, slice(3, None), -inf), (4, 0, nan)],
        [(1, everything, -inf), (3, everything, -inf)],
        [(3, 0, nan), (1, 6, inf)],
        [(1, 1, nan), (2, 5, nan), (5, 6, inf)],
    ]
    for case, sizes in itertools.product(cases, _shards(7)):
        logits = clean.clone()
        for row, classes, value in case:
            logits[row, classes] = value
        weights = torch.tensor([0.5, 0.5, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
        for alpha in (0.7, 0.0, weights, weights.clone().requires_grad_()):
            x = _part_of_classes(logits, sizes).clone().requires_grad_()
            whole = logits.clone().requires_grad_()
            loss = class_parallel_outlier_exposure_loss(
                x, target, None, alpha, "none", **SPECIAL_LABELS
            )
            expected = outlier_exposure_loss(whole, target, alpha, "none", **SPECIAL_LABELS)
            same(loss, expected)
            (ours,) = torch.autograd.grad(loss.sum(), x)
            (theirs,) = torch.autograd.grad(expected.sum(), whole)
            same(ours, _part_of_classes(theirs, sizes))


def test_special_values():
    run(2, _special_values)


def _outliers_near_uniform():
    """Near-uniform outliers, where p - 1 / C cancels: one rounding, as in one process."""
    sizes = _shards(200)[0]
    for dtype in (torch.bfloat16, torch.float16):
        logits = make_logits((64, 200), torch.float64, scale=0.05).to(dtype)
        target = torch.full((64,), -1)
        x = _part_of_classes(logits, sizes).clone().requires_grad_()
        loss = class_parallel_outlier_exposure_loss(x, target, None, 1.0, "sum")
        (ours,) = torch.autograd.grad(loss, x)
        _, grad = exact(logits, target, 1.0, "sum")
        expected = _part_of_classes(grad, sizes)
        assert (ours == expected.to(dtype)).double().mean() > 0.99


def test_outliers_near_uniform():
    run(2, _outliers_near_uniform)


def _bad_arguments():
    """Every process raises; none keeps waiting."""
    rank, sizes = dist.get_rank(), _shards(7)[-1]  # one process has no class
    x = _part_of_classes(make_logits((6, 7)), sizes)
    good = torch.tensor([0, 3, 6, -1, IGNORE, -2])

    def given(error, text, logits=x, target=good, alpha=0.5, reduction="mean", **options):
        with pytest.raises(error, match=text):
            class_parallel_outlier_exposure_loss(
                logits, target, None, alpha, reduction, **SPECIAL_LABELS, **options
            )

    given(ValueError, "reduction must be one of", reduction="median")
    given(TypeError, "soft labels", target=good.double())
    given(ValueError, r"\[5\] does not broadcast", alpha=torch.ones(5))
    given(ValueError, "finite number, got inf", alpha=float("inf"))
    given(ValueError, "at least one class", logits=x[:, :0])
    given(
        IndexError,
        r"\[0, 7\), or a special label .*; got 7 at position \[4\]",
        target=good.index_fill(0, torch.tensor(4), 7),
    )
    # Bad arguments in one process only.
    for culprit in range(dist.get_world_size()):
        mine = rank == culprit
        elsewhere = (RuntimeError, f"process {culprit} of the group was given bad arguments")
        own = (ValueError, "target must have shape") if mine else elsewhere
        given(*own, target=good[:5] if mine else good)
        own = (ValueError, "logits must have shape") if mine else elsewhere
        given(*own, logits=x[:, :, None].flatten() if mine else x)
        own = (ValueError, "reduction must be one of") if mine else elsewhere
        given(*own, reduction="median" if mine else "sum")
        fewer = slice(3 if mine else None)
        given(ValueError, "must have the same rows", logits=x[fewer], target=good[fewer])
        bad = good.index_fill(0, torch.tensor(2), 99)
        text = r"got 99 at position \[2\]" if mine else "of another process"
        given(IndexError, text, target=bad if mine else good)
    given(ValueError, "must have the 8 classes", class_sizes=[8] * dist.get_world_size())


@pytest.mark.parametrize("world", WORLDS)
def test_bad_arguments(world):
    run(world, _bad_arguments)


def _what_cannot_be_had():
    x, target = make_logits((6, 4)), torch.tensor([0, 3, 6, -1, IGNORE, -2])

    def loss_of(logits):
        return class_parallel_outlier_exposure_loss(logits, target, **SPECIAL_LABELS)

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss_of(x.requires_grad_()), x, create_graph=True)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss_of)(x.detach())
    with pytest.raises(NotImplementedError, match="jvp"), torch.autograd.forward_ad.dual_level():
        loss_of(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))


def test_what_cannot_be_had_raises():
    run(2, _what_cannot_be_had)


def _compare_dtensor(mesh, placements, rows, shape, reduction, alpha):
    """``rows``: the placements of target."""
    logits, target = make_logits(shape, scale=1.0), make_target(shape)
    x = distribute_tensor(logits.clone(), mesh, placements).requires_grad_()
    y = distribute_tensor(target, mesh, rows)
    weight = whole_weight = alpha
    if isinstance(alpha, torch.Tensor):
        weight = distribute_tensor(alpha, mesh, [Replicate()] * mesh.ndim).requires_grad_()
        whole_weight = alpha.clone().requires_grad_()
    whole = logits.clone().requires_grad_()
    loss = outlier_exposure_loss(x, y, weight, reduction, **SPECIAL_LABELS)
    expected = outlier_exposure_loss(whole, target, whole_weight, reduction, **SPECIAL_LABELS)
    same(loss.full_tensor(), expected)
    wanted = [x, weight] if isinstance(alpha, torch.Tensor) else [x]
    ours = torch.autograd.grad(loss.sum(), wanted)
    theirs = torch.autograd.grad(expected.sum(), [whole, whole_weight][: len(wanted)])
    assert ours[0].placements == tuple(placements)
    for a, b in zip(ours, theirs, strict=True):
        same(a.full_tensor(), b)
    return loss


def _class_parallel_dtensor():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for reduction, shape in itertools.product(REDUCTIONS, [(9, 7), (3, 7, 4, 2)]):
        for alpha in (0.7, torch.tensor(0.7, dtype=torch.float64)):
            loss = _compare_dtensor(mesh, [Shard(1)], [Replicate()], shape, reduction, alpha)
            assert loss.placements == (Replicate(),)
    # With few classes, some processes have none.
    _compare_dtensor(mesh, [Shard(1)], [Replicate()], (5, 2), "mean", 0.7)


@pytest.mark.parametrize("world", WORLDS)
def test_a_dtensor(world):
    run(world, _class_parallel_dtensor)


def _batch_and_classes():
    mesh = init_device_mesh("cpu", (2, 2))
    rows = [Shard(0), Replicate()]
    for reduction in REDUCTIONS:
        for alpha in (0.7, torch.tensor(0.7, dtype=torch.float64)):
            loss = _compare_dtensor(mesh, [Shard(0), Shard(1)], rows, (9, 7), reduction, alpha)
            batch = Shard(0) if reduction == "none" else Partial()
            assert loss.placements == (batch, Replicate())
    with pytest.raises(ValueError, match="one dimension of the mesh"):
        _compare_dtensor(mesh, [Shard(1), Shard(1)], [Replicate()] * 2, (9, 7), "sum", 0.7)


def test_a_dtensor_with_a_sharded_batch_and_sharded_classes():
    run(4, _batch_and_classes)


def _bytes_sent(num_rows, num_classes):
    """The bytes in the arguments of all collectives of one forward and backward."""
    sent = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counting(name):
        def call(*args, **kwargs):
            tensors = args[1:2] if name == "all_gather" else args[:1]
            sent.append(sum(t.numel() * t.element_size() for t in tensors))
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        logits = torch.randn(num_rows, num_classes, requires_grad=True)
        target = torch.randint(-3, num_classes, (num_rows,))
        dist.broadcast(target, 0)
        loss = class_parallel_outlier_exposure_loss(logits, target)
        before = len(sent)
        loss.backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    assert len(sent) == before, "the backward is local"
    return sum(sent)


def _bytes():
    """Three integers, a maximum and two sums per row, and whether a label is bad."""
    assert _bytes_sent(32, 10) == _bytes_sent(32, 1000) == 24 + 4 * (3 * 32 + 1)
    assert _bytes_sent(64, 10) == 24 + 4 * (3 * 64 + 1)


def test_class_parallel_sends_three_values_a_row():
    run(2, _bytes)

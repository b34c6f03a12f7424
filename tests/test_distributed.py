"""Several processes, joined by gloo: a shared batch, DDP, FSDP2, DTensor, and shared classes.

Each test starts its processes once and tries its cases inside of them.
"""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from processes import run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from oe_ext import OutlierExposureLoss, outlier_exposure_loss
from oe_ext.distributed import class_parallel_outlier_exposure_loss

WORLDS = [2, 3]
MARKS = {"ignore_index": IGNORE}


def same(ours, theirs, rtol=1e-12, atol=1e-14):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def averaged(tensor):
    """What DistributedDataParallel makes of a gradient."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def whole_batch(shape):
    """The same in every process; the rows of the first have no outliers, and those of the last are
    ignored for the most part."""
    logits = make_logits(shape, scale=1.0)
    target = make_target(shape)
    target[0] = torch.where(target[0] < 0, 0, target[0])
    target[-2:] = torch.where(target[-2:] >= 0, IGNORE, target[-2:])
    return logits, target


def my_rows(num_rows):
    """Uneven parts: the last process has what the others leave."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank, rank + 1) if rank < world - 1 else slice(rank, num_rows)


# ---- A shared batch


def _global_means():
    for shape in [(11, 5), (7, 4, 3, 2)]:
        logits, target = whole_batch(shape)
        part = my_rows(shape[0])
        for reduction, with_tensor in itertools.product(REDUCTIONS, (False, True)):
            x = logits.clone().requires_grad_()
            alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
            weight = alpha if with_tensor else 0.7
            mine = x[part]
            loss = outlier_exposure_loss(
                mine, target[part], weight, reduction, **MARKS, process_group=dist.group.WORLD
            )
            whole = logits.clone().requires_grad_()
            whole_alpha = alpha.detach().clone().requires_grad_()
            expected = outlier_exposure_loss(
                whole, target, whole_alpha if with_tensor else 0.7, reduction, **MARKS
            )
            if reduction == "none":
                same(loss, expected[part])
                continue
            wanted = [x, alpha] if with_tensor else [x]
            ours = torch.autograd.grad(loss, wanted)
            theirs = torch.autograd.grad(expected, [whole, whole_alpha][: len(wanted)])
            world = dist.get_world_size()
            factor = world if reduction == "sum" else 1
            same(averaged(loss) * factor, expected.detach())
            for a, b in zip(ours, theirs, strict=True):
                same(averaged(a) * factor, b, rtol=1e-11)
    # Nothing that counts anywhere, and nothing at all.
    logits, target = torch.randn(4, 3), torch.full((4,), IGNORE)
    options = {**MARKS, "process_group": dist.group.WORLD}
    for reduction in ("mean", "group_mean"):
        assert outlier_exposure_loss(logits, target, 0.5, reduction, **options) == 0
    assert outlier_exposure_loss(logits[:0], target[:0], **options).isnan()


@pytest.mark.parametrize("world", WORLDS)
def test_means_over_all_processes(world):
    run(world, _global_means)


def _model():
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
    ).double()


def _train(model, inputs, target, criterion):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(6):
        optimizer.zero_grad()
        criterion(model(inputs), target).backward()
        optimizer.step()


def _data_parallel():
    torch.manual_seed(1)
    inputs = torch.randn(12, 6, dtype=torch.float64)
    _, target = whole_batch((12, 5))
    part = my_rows(12)
    for reduction in ("mean", "group_mean"):
        single = _model()
        _train(single, inputs, target, OutlierExposureLoss(0.5, reduction, **MARKS))
        criterion = OutlierExposureLoss(0.5, reduction, **MARKS, process_group=dist.group.WORLD)
        ddp = DistributedDataParallel(_model())
        _train(ddp, inputs[part], target[part], criterion)
        for ours, theirs in zip(ddp.parameters(), single.parameters(), strict=True):
            same(ours.detach(), theirs.detach(), rtol=1e-10, atol=1e-13)

        from torch.distributed.fsdp import fully_shard

        fsdp = _model()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (fsdp[0], fsdp[2], fsdp):
            fully_shard(layer, mesh=mesh)
        _train(fsdp, inputs[part], target[part], criterion)
        for ours, theirs in zip(fsdp.parameters(), single.parameters(), strict=True):
            same(ours.full_tensor().detach(), theirs.detach(), rtol=1e-10, atol=1e-13)

    # Without the group each part is divided by its own counts: another optimum.
    wrong = DistributedDataParallel(_model())
    _train(wrong, inputs[part], target[part], OutlierExposureLoss(0.5, "mean", **MARKS))
    assert not torch.allclose(wrong.module[0].weight, single[0].weight, rtol=1e-6)


def test_ddp_and_fsdp2_train_as_one_process():
    run(2, _data_parallel)


# ---- DTensor


def _dtensor():
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for shape, dim in [((8, 5), 0), ((4, 5, 6), 0), ((2, 5, 6), 2)]:
        logits, target = make_logits(shape, scale=1.0), make_target(shape)
        target_dim = 0 if dim == 0 else dim - 1
        for reduction, with_tensor in itertools.product(REDUCTIONS, (False, True)):
            x = distribute_tensor(logits.clone(), mesh, [Shard(dim)]).requires_grad_()
            y = distribute_tensor(target, mesh, [Shard(target_dim)])
            alpha = torch.tensor(0.7, dtype=torch.float64)
            weight = distribute_tensor(alpha, mesh, [Replicate()]) if with_tensor else 0.7
            if with_tensor:
                weight.requires_grad_()
            whole = logits.clone().requires_grad_()
            whole_alpha = alpha.clone().requires_grad_()
            expected = outlier_exposure_loss(
                whole, target, whole_alpha if with_tensor else 0.7, reduction, **MARKS
            )
            loss = outlier_exposure_loss(x, y, weight, reduction, **MARKS)
            assert isinstance(loss, DTensor)
            placement = Shard(target_dim) if reduction == "none" else Partial()
            assert loss.placements == (placement,), (reduction, loss.placements)
            same(loss.full_tensor(), expected)
            ours = torch.autograd.grad(loss.sum(), [x, weight] if with_tensor else [x])
            theirs = torch.autograd.grad(
                expected.sum(), [whole, whole_alpha] if with_tensor else [whole]
            )
            assert ours[0].placements == (Shard(dim),)
            for a, b in zip(ours, theirs, strict=True):
                same(a.full_tensor(), b)
    with pytest.raises(ValueError, match="process_group must be None"):
        outlier_exposure_loss(x, y, process_group=dist.group.WORLD)


@pytest.mark.parametrize("world", WORLDS[:1])
def test_dtensor(world):
    run(world, _dtensor)


# ---- Shared classes


def _part_of_classes(logits, sizes):
    rank = dist.get_rank()
    begin = sum(sizes[:rank])
    return logits[:, begin : begin + sizes[rank]]


def _shards(num_classes):
    """Uneven, and also none at all."""
    if dist.get_world_size() == 2:
        return [[2, num_classes - 2], [num_classes - 1, 1], [num_classes, 0]]
    return [[1, num_classes - 4, 3], [0, 2, num_classes - 2]]


def _compare_class_parallel(logits, target, reduction, alpha, sizes, rtol, atol):
    x = _part_of_classes(logits, sizes).clone().requires_grad_()
    whole = logits.clone().requires_grad_()
    a = alpha.clone().requires_grad_() if isinstance(alpha, torch.Tensor) else alpha
    b = alpha.clone().requires_grad_() if isinstance(alpha, torch.Tensor) else alpha
    loss = class_parallel_outlier_exposure_loss(x, target, None, a, reduction, **MARKS)
    expected = outlier_exposure_loss(whole, target, b, reduction, **MARKS)
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

    # What may stand in rows that weigh nothing, and logits of -inf.
    logits, target = make_logits((6, 7)), torch.tensor([0, 3, 6, -1, IGNORE, -2])
    logits[4] = float("nan")
    logits[0, 1:] = -torch.inf
    logits[5, :2] = -torch.inf
    sizes = _shards(7)[0]
    x = _part_of_classes(logits, sizes).clone().requires_grad_()
    for alpha in (0.7, 0.0):
        loss = class_parallel_outlier_exposure_loss(x, target, None, alpha, "none", **MARKS)
        same(loss, outlier_exposure_loss(logits, target, alpha, "none", **MARKS))

    # All classes are checked, in each process.
    bad = torch.tensor([0, 3, 6, -1, 7, 2])
    with pytest.raises(IndexError, match=r"\[0, 7\), or a mark; got 7 at position \[4\]"):
        class_parallel_outlier_exposure_loss(x, bad)
    with pytest.raises(ValueError, match="target must have shape"):
        class_parallel_outlier_exposure_loss(x, bad[:5])
    with pytest.raises(ValueError, match="reduction"):
        class_parallel_outlier_exposure_loss(x, target, None, 0.5, "median")
    loss = class_parallel_outlier_exposure_loss(x, target, **MARKS)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("world", WORLDS)
def test_class_parallel(world):
    run(world, _class_parallel)


def _class_parallel_dtensor():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target = make_logits((9, 7), scale=1.0), make_target((9, 7))
    for reduction in REDUCTIONS:
        x = distribute_tensor(logits.clone(), mesh, [Shard(1)]).requires_grad_()
        y = distribute_tensor(target, mesh, [Replicate()])
        loss = outlier_exposure_loss(x, y, 0.7, reduction, **MARKS)
        whole = logits.clone().requires_grad_()
        expected = outlier_exposure_loss(whole, target, 0.7, reduction, **MARKS)
        assert loss.placements == (Replicate(),)
        same(loss.full_tensor(), expected)
        (ours,) = torch.autograd.grad(loss.sum(), x)
        (theirs,) = torch.autograd.grad(expected.sum(), whole)
        assert ours.placements == (Shard(1),)
        same(ours.full_tensor(), theirs)


@pytest.mark.parametrize("world", WORLDS)
def test_class_parallel_of_a_dtensor(world):
    run(world, _class_parallel_dtensor)


def _bytes_sent(num_rows, num_classes):
    """Of the arguments of the collectives that one forward and backward calls."""
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
    assert _bytes_sent(32, 10) == _bytes_sent(32, 1000) == 8 + 4 * 32 + 3 * 4 * 32
    assert _bytes_sent(64, 10) == 8 + 4 * 64 + 3 * 4 * 64


def test_class_parallel_sends_four_values_a_row():
    run(2, _bytes)


def test_a_module_is_copied_without_its_group():
    """Without one, that is: a group of processes belongs to the processes."""
    module = OutlierExposureLoss(0.3)
    assert copy.deepcopy(module).process_group is None

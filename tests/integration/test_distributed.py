"""Several processes, connected by gloo: a shared batch, DDP, FSDP2, and DTensor.

Each test starts its processes once and runs its cases inside them.
"""

import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from processes import run, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from oe_ext import OutlierExposureLoss, outlier_exposure_loss

WORLDS = [2, 3]
SPECIAL_LABELS = {"ignore_index": IGNORE}


def averaged(tensor):
    """The average over processes, as DistributedDataParallel computes it for a gradient."""
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def whole_batch(shape):
    """The same batch in every process. The first process's rows have no outliers; most of the last
    one's are ignored."""
    logits = make_logits(shape, scale=1.0)
    target = make_target(shape)
    target[0] = torch.where(target[0] < 0, 0, target[0])
    target[-2:] = torch.where(target[-2:] >= 0, IGNORE, target[-2:])
    return logits, target


def my_rows(num_rows):
    """Uneven parts: the last process gets the rest."""
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
                mine,
                target[part],
                weight,
                reduction,
                **SPECIAL_LABELS,
                process_group=dist.group.WORLD,
            )
            whole = logits.clone().requires_grad_()
            whole_alpha = alpha.detach().clone().requires_grad_()
            expected = outlier_exposure_loss(
                whole, target, whole_alpha if with_tensor else 0.7, reduction, **SPECIAL_LABELS
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
    # All positions ignored, and no positions at all.
    logits, target = torch.randn(4, 3), torch.full((4,), IGNORE)
    options = {**SPECIAL_LABELS, "process_group": dist.group.WORLD}
    for reduction in ("mean", "group_mean"):
        assert outlier_exposure_loss(logits, target, 0.5, reduction, **options) == 0
    assert outlier_exposure_loss(logits[:0], target[:0], **options).isnan()


def _bad_arguments():
    """The process with bad arguments raises; the other one does not wait for it."""
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, -1, 2])
    options = {"process_group": dist.group.WORLD}
    for bad, error, text in [
        ((logits, target[:3]), ValueError, "target must have shape"),
        ((logits[0], target), ValueError, "logits must have shape"),
        ((logits, target.float()), TypeError, "soft labels"),
        ((logits, target, float("inf")), ValueError, "finite number, got inf"),
        ((logits, target, torch.ones(3)), ValueError, "does not broadcast"),
        ((logits, target, torch.tensor(1)), TypeError, "floating-point"),
    ]:
        for reduction in ("mean", "group_mean"):
            if dist.get_rank() == 0:
                arguments = (*bad, 0.5)[:3]
                with pytest.raises(error, match=text):
                    outlier_exposure_loss(*arguments, reduction, **options)
            else:
                outlier_exposure_loss(logits, target, 0.5, reduction, **options)
    with pytest.raises(ValueError, match="reduction must be one of"):
        outlier_exposure_loss(logits, target, 0.5, "median", **options)
    with pytest.raises(NotImplementedError, match="of one process"):
        outlier_exposure_loss(logits, target, return_stats=True, **options)


def test_bad_arguments_of_one_process():
    run(2, _bad_arguments)


def _one_read_of_the_logits():
    logits = make_logits((6, 5)).requires_grad_()
    target = make_target((6, 5))
    for reduction in ("mean", "group_mean"):
        with profile(activities=[ProfilerActivity.CPU]) as record:
            loss = outlier_exposure_loss(
                logits, target, 0.5, reduction, process_group=dist.group.WORLD
            )
            loss.backward()
        names = {event.name for event in record.events()}
        assert "oe_ext::_outlier_exposure_loss_backward_from_unit" in names
        assert "oe_ext::_outlier_exposure_loss_backward" not in names


def test_global_means_return_the_gradient_of_the_forward():
    """Their divisors are part of the loss: the upstream gradient is 1, as in one process."""
    run(2, _one_read_of_the_logits)


def _compiled():
    logits, target = whole_batch((11, 5))
    part = my_rows(11)
    for reduction in ("mean", "group_mean"):

        def function(x, y, reduction=reduction):
            return outlier_exposure_loss(x, y, 0.5, reduction, process_group=dist.group.WORLD)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        same(compiled(logits[part], target[part]), function(logits[part], target[part]))


def test_means_over_all_processes_compile():
    run(2, _compiled)


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
        _train(single, inputs, target, OutlierExposureLoss(0.5, reduction, **SPECIAL_LABELS))
        criterion = OutlierExposureLoss(
            0.5, reduction, **SPECIAL_LABELS, process_group=dist.group.WORLD
        )
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

    # Without the group each part is divided by its own counts, and training reaches another
    # optimum.
    wrong = DistributedDataParallel(_model())
    _train(wrong, inputs[part], target[part], OutlierExposureLoss(0.5, "mean", **SPECIAL_LABELS))
    assert not torch.allclose(wrong.module[0].weight, single[0].weight, rtol=1e-6)


def test_ddp_and_fsdp2_train_as_one_process():
    run(2, _data_parallel)


def _train_with(criterion):
    torch.manual_seed(1)
    inputs = torch.randn(12, 6, dtype=torch.float64)
    _, target = whole_batch((12, 5))
    part = my_rows(12)
    single, ddp = _model(), DistributedDataParallel(_model())
    _train(single, inputs, target, OutlierExposureLoss(0.5, "group_mean", **SPECIAL_LABELS))
    _train(ddp, inputs[part], target[part], criterion)
    for ours, theirs in zip(ddp.parameters(), single.parameters(), strict=True):
        same(ours.detach(), theirs.detach(), rtol=1e-10, atol=1e-13)


def test_a_module_that_is_built_before_the_processes():
    """All processes by name, in a module as in Lightning, and in the functional form."""
    assert dist.group.WORLD is None
    run(
        2,
        _train_with,
        OutlierExposureLoss(0.5, "group_mean", **SPECIAL_LABELS, process_group="world"),
    )
    run(2, _train_with, functools.partial(_by_name, reduction="group_mean"))


def _by_name(logits, target, reduction):
    return outlier_exposure_loss(
        logits, target, 0.5, reduction, **SPECIAL_LABELS, process_group="world"
    )


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
                whole, target, whole_alpha if with_tensor else 0.7, reduction, **SPECIAL_LABELS
            )
            loss = outlier_exposure_loss(x, y, weight, reduction, **SPECIAL_LABELS)
            assert isinstance(loss, DTensor)
            placement = Shard(target_dim) if reduction == "none" else Partial()
            assert loss.placements == (placement,), (reduction, loss.placements)
            same(loss.full_tensor(), expected)
            with torch.no_grad():  # another operator with its own rule
                inferred = outlier_exposure_loss(x, y, weight, reduction, **SPECIAL_LABELS)
            assert inferred.placements == (placement,), (reduction, inferred.placements)
            same(inferred.full_tensor(), expected)
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


# ---- A module with a group


def _module_with_a_group():
    module = OutlierExposureLoss(0.3, process_group=dist.group.WORLD)
    copied = copy.deepcopy(torch.nn.Sequential(module))[0]
    assert copied is not module
    assert copied.process_group is dist.group.WORLD
    assert repr(copied) == repr(module)
    assert f"process_group=<of {dist.get_world_size()} processes> ('world')" in repr(module)
    named = OutlierExposureLoss(0.3, process_group="world")
    assert named.process_group is dist.group.WORLD
    assert repr(named) == repr(module)
    assert pickle.loads(pickle.dumps(module)).process_group is dist.group.WORLD
    part = dist.new_group([0, 1])
    module = OutlierExposureLoss(process_group=part)
    assert copy.deepcopy(module).process_group is part
    with pytest.raises(RuntimeError, match="of process groups only that of all"):
        pickle.dumps(module)


def test_copies_of_a_module_with_a_group():
    run(2, _module_with_a_group)


def _pickled(path):
    if dist.get_rank() == 0:
        torch.save(OutlierExposureLoss(0.3, process_group=dist.group.WORLD), path)


def test_a_pickle_that_says_all_processes_is_read_alone(tmp_path):
    """Several processes train a model; a single one loads it and has the whole batch."""
    run(2, _pickled, tmp_path / "loss.pt")
    read = torch.load(tmp_path / "loss.pt", weights_only=False)
    assert read.process_group is None
    assert repr(read) == repr(OutlierExposureLoss(0.3, process_group="world"))
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, -1, 2])
    assert torch.equal(read(logits, target), outlier_exposure_loss(logits, target, 0.3))


def _does_not_hold():
    module = OutlierExposureLoss(process_group=dist.group.WORLD)
    assert dist.group.WORLD not in module.__dict__.values(), "destroy_process_group() ends it"


def test_a_module_does_not_hold_the_group_of_all():
    run(2, _does_not_hold)

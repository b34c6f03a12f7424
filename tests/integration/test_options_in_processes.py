"""Class weights, label smoothing and counts in several processes, compared with one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from inputs import IGNORE, REDUCTIONS, make_logits, make_target
from processes import run, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from oe_ext import count_labels, outlier_exposure_loss
from oe_ext.distributed import class_parallel_outlier_exposure_loss

SHAPE = (10, 7, 3)


def batch():
    logits, target = make_logits(SHAPE), make_target(SHAPE)
    target[0] = torch.where(target[0] < 0, 0, target[0])
    weight = torch.rand(SHAPE[1], dtype=torch.float64) * 3
    weight[2] = 0
    options = [
        {"weight": weight},
        {"weight": weight.float()},
        {"label_smoothing": 0.1},
        {"weight": weight, "label_smoothing": 0.1},
    ]
    return logits, target, options


def whole(logits, target, reduction, options):
    logits = logits.clone().requires_grad_()
    loss = outlier_exposure_loss(logits, target, 0.7, reduction, ignore_index=IGNORE, **options)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


def compare_with_counts(sharded, inputs, reduction, options):
    """DTensors against the same in one process, with counts from outside."""
    if reduction in ("mean", "group_mean"):
        loss, alone = (
            outlier_exposure_loss(
                *tensors, 0.7, reduction, ignore_index=IGNORE, counts=(3, 4), **options
            )
            for tensors in (sharded, inputs)
        )
        same(loss.full_tensor(), alone)


def _process_group():
    logits, target, all_options = batch()
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = slice(0, 3) if rank == 0 else slice(3, None)
    for options, reduction in itertools.product(all_options, ["mean", "group_mean"]):
        x = logits.clone().requires_grad_()
        loss = outlier_exposure_loss(
            x[rows],
            target[rows],
            0.7,
            reduction,
            ignore_index=IGNORE,
            process_group="world",
            **options,
        )
        (grad,) = torch.autograd.grad(loss, x)
        # The same by hand.
        counts = count_labels(target[rows], weight=options.get("weight"), ignore_index=IGNORE)
        dist.all_reduce(counts)
        by_hand = outlier_exposure_loss(
            logits[rows],
            target[rows],
            0.7,
            reduction,
            ignore_index=IGNORE,
            counts=counts / world,
            **options,
        )
        same(loss, by_hand)
        average = torch.cat([loss.detach().reshape(1), grad.flatten()])
        dist.all_reduce(average)
        expected, expected_grad = whole(logits, target, reduction, options)
        same(average[0] / world, expected)
        same(average[1:].reshape(SHAPE) / world, expected_grad)
    # The process with a bad weight raises, the other one does not wait.
    bad = torch.ones(3) if rank == 0 else torch.ones(SHAPE[1])
    if rank == 0:
        with pytest.raises(ValueError, match="one element per class"):
            outlier_exposure_loss(logits, target, weight=bad, process_group="world")
    else:
        outlier_exposure_loss(logits, target.clamp(min=0), weight=bad, process_group="world")


def test_process_group():
    run(2, _process_group)


def _dtensor():
    logits, target, all_options = batch()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for options, reduction, placement in itertools.product(
        all_options, REDUCTIONS, [Shard(0), Shard(2), Replicate()]
    ):
        expected, expected_grad = whole(logits, target, reduction, options)
        of_target = Shard(1) if placement == Shard(2) else placement
        for replicates in (False, True):
            given = dict(options)
            if replicates and "weight" in given:  # else every process has a plain one
                given["weight"] = distribute_tensor(given["weight"], mesh, [Replicate()])
            x = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            y = distribute_tensor(target, mesh, [of_target])
            loss = outlier_exposure_loss(x, y, 0.7, reduction, ignore_index=IGNORE, **given)
            assert isinstance(loss, DTensor)
            same(loss.full_tensor(), expected)
            (grad,) = torch.autograd.grad(loss.sum(), x)
            same(grad.full_tensor(), expected_grad)
        compare_with_counts((x, y), (logits, target), reduction, options)


def test_dtensor():
    run(2, _dtensor)


def _class_parallel():
    logits, target, all_options = batch()
    rank = dist.get_rank()
    here = slice(0, 3) if rank == 0 else slice(3, None)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for options, reduction in itertools.product(all_options, REDUCTIONS):
        x = logits[:, here].clone().requires_grad_()
        sharded = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
        if len(options) == 2:
            with pytest.raises(NotImplementedError, match="need all classes in one process"):
                class_parallel_outlier_exposure_loss(x, target, **options)
            continue
        expected, expected_grad = whole(logits, target, reduction, options)
        loss = class_parallel_outlier_exposure_loss(
            x, target, None, 0.7, reduction, ignore_index=IGNORE, **options
        )
        same(loss, expected)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        same(grad, expected_grad[:, here])
        loss = outlier_exposure_loss(
            sharded, target, 0.7, reduction, ignore_index=IGNORE, **options
        )
        same(loss.full_tensor(), expected)
        (grad,) = torch.autograd.grad(loss.sum(), sharded)
        same(grad.full_tensor(), expected_grad)
        compare_with_counts((sharded, target), (logits, target), reduction, options)
    for bad, error in [(torch.ones(3), ValueError), (torch.ones(7).long(), TypeError)]:
        with pytest.raises(error, match="weight must have"):
            class_parallel_outlier_exposure_loss(x, target, weight=bad, ignore_index=IGNORE)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 2"):
        class_parallel_outlier_exposure_loss(x, target, label_smoothing=2.0)


def test_class_parallel():
    run(2, _class_parallel)

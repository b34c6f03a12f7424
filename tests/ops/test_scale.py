"""Sizes that overflow 32 bits or a float, and long runs: make test-scale."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from inputs import make_logits
from oracles import exact, max_error

from oe_ext import outlier_exposure_loss, reference

pytestmark = pytest.mark.scale

# 2.15e9 logits each, 4.3 GB in bfloat16; as much again for their gradients.
ROWS = (2_150_400, 1000)
LONG_ROWS = (17, 126_500_000)
PIXELS = (34, 19, 1824, 1824)


def fill(logits: torch.Tensor) -> None:
    """Random logits, made a few rows at a time: all in float32 would take twice the memory."""
    flat = logits.view(-1)
    piece = torch.randn(1 << 24)
    for start in range(0, flat.numel(), piece.numel()):
        part = flat[start : start + piece.numel()]
        part.copy_(piece[: part.numel()].add_(0.001))  # all pieces differ


@pytest.mark.parametrize(
    ("shape", "upstream"),
    [(ROWS, 1.0), (LONG_ROWS, 2.0), (PIXELS, 2.0)],  # the forward writes it, or the backward
    ids=["rows", "long rows", "pixels"],
)
def test_more_than_2_to_the_31_logits(shape, upstream):
    logits = torch.empty(shape, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    fill(logits)
    target = torch.randint(-1, shape[1], (shape[0], *shape[2:]))
    leaf = logits.requires_grad_()
    loss = outlier_exposure_loss(leaf, target, reduction="sum")
    (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(upstream))
    total = 0.0
    size = max(1, shape[0] // 100)
    starts = range(0, shape[0], size)
    for number, start in enumerate(starts):
        part = slice(start, start + size)
        rows, labels = logits.detach()[part], target[part]
        if number % 8 != 0 and start != starts[-1]:
            total += reference.outlier_exposure_loss(rows.double(), labels, 0.5, "sum").item()
            continue
        # Checks the gradient of some rows; the last ones lie beyond 2^31.
        truth, expected = exact(rows, labels, 0.5, "sum")
        expected *= upstream
        total += truth.item()
        assert max_error(grad[part], expected) <= upstream * 2**-8
        assert (grad[part] == expected.bfloat16()).double().mean() >= 0.999
        del truth, expected
    assert abs(loss.item() / total - 1) <= 2**-23


@pytest.mark.parametrize("reduction", ["sum", "mean", "group_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_million_rows_of_two_classes(dtype, reduction):
    num_rows = 10_000_000
    logits = make_logits((num_rows, 2), dtype).requires_grad_()
    target = torch.randint(-1, 2, (num_rows,), dtype=torch.int8)
    loss = outlier_exposure_loss(logits, target, 0.5, reduction)
    (grad,) = torch.autograd.grad(loss, logits)
    terms = reference.outlier_exposure_loss(logits.detach().double(), target, 0.5, "none")
    outlier = target < 0
    expected = {
        "sum": terms.sum(),
        "mean": terms.mean(),
        "group_mean": terms[~outlier].mean() + terms[outlier].mean(),
    }[reduction]
    assert abs(loss.item() / expected.item() - 1) <= 2**-23
    _, truth = exact(logits.detach(), target, 0.5, reduction)
    relative = max_error(grad, truth) / truth.abs().max().item()
    assert relative <= (4e-7 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("label", [-1, 49_999_999])
def test_one_row_of_fifty_million_classes(dtype, label):
    logits = make_logits((1, 50_000_000), dtype).requires_grad_()
    target = torch.tensor([label])
    loss = outlier_exposure_loss(logits, target, 1.0)
    (grad,) = torch.autograd.grad(loss, logits)
    expected, expected_grad = exact(logits.detach(), target, 1.0)
    assert abs(loss.item() / expected.item() - 1) <= 4e-7
    error = (grad.double() - expected_grad).abs()
    stored = 2**-8 if dtype == torch.bfloat16 else 0.0
    # The error of each softmax and of the uniform 1/C; the gradient is their difference.
    size = expected_grad.abs() + 2 / logits.numel()
    assert (error / size).max() <= 4e-6 + stored


CALLS = """
import gc, os, resource, torch
from oe_ext import outlier_exposure_loss

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

torch.manual_seed(0)
alpha = torch.tensor(0.5, requires_grad=True)
images, pixels = torch.randn(1, 3, 8, 8), torch.randint(-1, 3, (1, 8, 8))
crop = torch.randn(1, 3, 8, 10)[..., 1:-1]
bad = torch.full((16,), 99)

def call(number):
    logits, target = torch.randn(16, 10), torch.randint(-1, 10, (16,))
    kind = number % 5
    if kind == 0:
        outlier_exposure_loss(logits.requires_grad_(), target).backward()
    elif kind == 1:
        loss = outlier_exposure_loss(images.clone().requires_grad_(), pixels, alpha, "none")
        loss.sum().backward()
    elif kind == 2:
        try:
            outlier_exposure_loss(logits.requires_grad_(), bad)
        except IndexError:
            return
        raise AssertionError
    elif kind == 3:
        outlier_exposure_loss(crop.clone().requires_grad_(), pixels)  # never run
    else:
        loss = outlier_exposure_loss(logits.requires_grad_(), target)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    alpha.grad = None

for number in range(10_000):
    call(number)
gc.collect()
before = resident()
for number in range(100_000):
    call(number)
gc.collect()
print(resident() - before)
"""


def test_a_hundred_thousand_calls_leave_nothing(record_property):
    done = subprocess.run(
        [sys.executable, "-c", CALLS], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    record_property("grown", grown)
    # 20 bytes per call: less than the smallest object that could leak.
    assert grown < 2_000_000, f"{grown} bytes"

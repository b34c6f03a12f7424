"""The network of segment_textures.py, its training step, and what that costs.

As in most segmentation networks, the logits have a quarter of the resolution of the labels. Fused,
the loss takes them as they are. Unfused, they are interpolated before the loss.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import median_times, peak_memory
from torch import Tensor, nn

from oe_ext import OutlierExposureLoss

# Label maps are uint8, as in a PNG file, so the special labels are large rather than negative.
OUTLIER, VOID = 254, 255
# The paper's objective: one mean over the inlier pixels, one over the outlier pixels.
REDUCTION = "group_mean"


def make_network(num_classes: int) -> nn.Module:
    """Fully convolutional, at a quarter of the resolution; each output sees 55 x 55 pixels."""
    layers: list[nn.Module] = []
    # (channels in, out, stride, dilation)
    for c_in, c_out, stride, dilation in (
        (1, 16, 2, 1),
        (16, 32, 2, 1),
        (32, 32, 1, 1),
        (32, 32, 1, 2),
        (32, 32, 1, 3),
    ):
        layers += [
            nn.Conv2d(c_in, c_out, 3, stride, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(32, num_classes, 1))


def interpolate(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


class Training:
    def __init__(self, num_classes: int, alpha: float, fused: bool) -> None:
        self.fused = fused
        self.network = make_network(num_classes)
        self.criterion = OutlierExposureLoss(
            alpha,
            REDUCTION,
            ignore_index=VOID,
            ood_index=OUTLIER,
            upsample="bilinear" if fused else None,
        )
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=3e-3)

    def step(self, images: Tensor, target: Tensor) -> None:
        logits = self.network(images)
        if not self.fused:
            logits = interpolate(logits, target.shape[1:])
        loss = self.criterion(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Batch(NamedTuple):
    num_images: int
    size: int
    num_classes: int


def make_step(batch: Batch, fused: bool) -> Callable[[], None]:
    """A training step on random images, with labels in squares of 16 x 16 pixels."""
    num_images, size, num_classes = batch
    training = Training(num_classes, alpha=0.5, fused=fused)
    images = torch.randn(num_images, 1, size, size)
    squares = torch.randint(0, num_classes, (num_images, size // 16, size // 16)).byte()
    target = squares.repeat_interleave(16, 1).repeat_interleave(16, 2)
    return lambda: training.step(images, target)


def memory_of_step(batch: Batch, fused: bool) -> int:
    """By how many bytes a step raises the peak of this process, which must be a fresh one: a step
    that uses memory again which earlier ones have freed does not raise it."""
    torch.set_num_threads(1)
    make_step(Batch(1, 32, batch.num_classes), fused)()  # what is loaded and set up once
    step = make_step(batch, fused)
    before = peak_memory()
    step()
    return peak_memory() - before


def print_costs(batches: list[Batch], num_pairs: int) -> None:
    print(
        "\nA training step (forward, backward, Adam) on one thread.\n"
        f"Time: median of {num_pairs} interleaved steps. Memory: how much one step raises the peak "
        "of a\nfresh process, which varies by about a tenth."
    )
    for batch in batches:
        times = median_times([make_step(batch, fused) for fused in (True, False)], num_pairs)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = [pool.apply(memory_of_step, (batch, fused)) for fused in (True, False)]
        print(f"[{batch.num_images}, 1, {batch.size}, {batch.size}], {batch.num_classes} classes")
        for name, seconds, num_bytes in zip(("fused", "unfused"), times, memory, strict=True):
            print(f"  {name:<8}{1e3 * seconds:>8.1f} ms{num_bytes / 2**20:>8.0f} MiB")

"""The launches of a call, counted by the SIMT harness.

The harness runs the real launchers and kernels on the CPU and sees every access. Each workload runs
with two small numbers of rows. From these follow the costs per row and per call, and thus those of
the full size. A buffer that a kernel reads more than once counts once: the second read comes from a
cache (all lanes of a row read its label, for example).
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

import simt_device
import torch
from inputs import make_logits, make_target
from paths import ROOT

from oe_ext import outlier_exposure_loss


def _constant(name: str) -> int:
    """Of the launchers."""
    folder = ROOT / "csrc" / "cuda"
    names = ("launch_cuda.cu", "launch_kernel.cuh")
    source = "".join((folder / name).read_text() for name in names)
    match = re.search(rf"\b{name} = (\d+);", source)
    assert match is not None, name
    return int(match[1])


@dataclass(frozen=True)
class Workload:
    shape: tuple[int, ...]
    dtype: torch.dtype
    reduction: str = "mean"
    upstream: float | None = 1.0  # the upstream gradient; None: the forward alone

    @property
    def num_classes(self) -> int:
        return self.shape[1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.num_classes

    def small_shape(self, scale: int) -> tuple[int, ...]:
        """With whole blocks of [N, C], and as many of the last pixels as the whole has."""
        if len(self.shape) == 2:
            return (scale * (128 if self.num_classes <= 1024 else 4), self.num_classes)
        pixels = math.prod(self.shape[2:])
        return (1, self.num_classes, 512 * scale + pixels % 8)


@dataclass(frozen=True)
class Launch:
    """One launch of a call at its full size."""

    kernel: str  # without the words that all names share
    bytes: float  # moved between the GPU and its memory
    reads: float = 0  # passes over the logits, cached ones too
    writes: float = 0  # passes over their gradient
    is_wide: bool = False  # moves 16 bytes at once
    lanes: int = 1  # that share a row
    threads: int = 0  # of a block
    blocks: int = 0
    shared_bytes: int = 0  # dynamic, of a block


def run(workload: Workload, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """The harness's records of a call with logits of this shape."""
    logits, target = make_logits(shape, workload.dtype), make_target(shape)
    with simt_device.active(), simt_device.counting() as launches:
        if workload.upstream is None:
            outlier_exposure_loss(logits, target, reduction=workload.reduction)
        else:
            logits.requires_grad_()
            loss = outlier_exposure_loss(logits, target, reduction=workload.reduction)
            torch.autograd.grad(loss, logits, torch.full_like(loss, workload.upstream))
    return launches


def moved_bytes(launch: dict[str, Any], workload: Workload, shape: tuple[int, ...]) -> int:
    """What one launch moves between the GPU and its memory."""
    rows = math.prod(shape) // shape[1]
    logits = math.prod(shape) * workload.dtype.itemsize
    by_row = max(workload.dtype.itemsize, 4) * rows
    sizes = {
        "logits": logits, "grad_logits": logits, "target": 8 * rows, "row_loss": by_row,
        "row_max": by_row, "row_sum_exp": by_row, "loss": 4, "counts": 16,
        "grad": by_row if workload.reduction == "none" else 4,
    }  # fmt: skip
    moved = [(name, t) for kind in ("reads", "writes") for name, t in launch[kind].items()]
    return sum(min(32 * t["sectors"], sizes.get(name, t["bytes"])) for name, t in moved)


def _at_full_size(workload: Workload, small: dict[str, Any], large: dict[str, Any]) -> Launch:
    """From the launches of two small versions."""
    shapes = [workload.small_shape(scale) for scale in (1, 2)]
    rows = [math.prod(shape) // workload.num_classes for shape in shapes]
    moved = [
        moved_bytes(launch, workload, shape)
        for launch, shape in zip((small, large), shapes, strict=True)
    ]
    per_row = (moved[1] - moved[0]) / (rows[1] - rows[0])

    read, written = large["reads"].get("logits", {}), large["writes"].get("grad_logits", {})
    logits_bytes = math.prod(shapes[1]) * workload.dtype.itemsize
    threads, is_wide = large["threads"], read.get("wide_bytes", 0) > 0
    kernel = large["kernel"].split("outlier_exposure_")[1].split("_kernel")[0]
    by_rows = kernel in ("forward_rows", "backward_rows")
    lanes = threads * large["blocks"] // rows[1] if by_rows else 1
    rows_a_thread = 16 // workload.dtype.itemsize if is_wide and not by_rows else 1
    blocks = math.ceil(workload.rows * lanes / (threads * rows_a_thread))
    return Launch(
        kernel=kernel,
        bytes=moved[0] + per_row * (workload.rows - rows[0]),
        reads=read.get("bytes", 0) / logits_bytes,
        writes=written.get("bytes", 0) / logits_bytes,
        is_wide=is_wide,
        lanes=lanes,
        threads=threads,
        blocks=min(simt_device.MAX_BLOCKS, blocks) if read else large["blocks"],
        shared_bytes=large["shared_bytes"],
    )


@cache
def launches(workload: Workload, max_stage_bytes: int) -> list[Launch]:
    """Those of a call, on a GPU whose blocks may have a stage of this size."""
    simt_device.load()
    torch.manual_seed(0)
    with simt_device.limits(max_stage_bytes=max_stage_bytes):
        small, large = (run(workload, workload.small_shape(scale)) for scale in (1, 2))
    found = [_at_full_size(workload, *pair) for pair in zip(small, large, strict=True)]
    # Up to so many rows, as the small versions have, the forward counts the labels itself.
    many = workload.rows > _constant("kMaxRowsToCountTwice")
    if many and workload.reduction == "mean" and found[0].writes > 0:
        found.insert(0, Launch("count_rows", bytes=8 * workload.rows))
    return found

"""Predicts the cost of a call on a GPU from launches and bytes, counted by the SIMT harness.

The harness runs the real launchers and kernels on the CPU and sees every access. Each workload runs
with two small numbers of rows. From these follow the costs per row and per call, and thus the cost
of the full size.

    time = launches * LAUNCH_SECONDS + bytes / (EFFICIENCY * bandwidth)

These are predictions, not measurements. A buffer that a kernel reads more than once counts once:
the second read comes from a cache (all lanes of a row read its label, for example).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

import simt_device
import torch
from inputs import make_logits, make_target

from oe_ext import outlier_exposure_loss

# Bytes a second, from NVIDIA's data sheets: A100 80 GB SXM, H100 SXM, B200.
BANDWIDTH = {"A100": 2.039e12, "H100": 3.35e12, "B200": 8.0e12}
# Assumptions: the efficiency of a well-coalesced kernel, and the cost of back-to-back launches.
EFFICIENCY = 0.85
LAUNCH_SECONDS = 2e-6


@dataclass(frozen=True)
class Workload:
    name: str
    num_classes: int
    rows: int  # positions in all: N, or N * H * W
    dtype: torch.dtype
    pixels: tuple[int, int] | None = None  # of the small maps to run; None: [N, C]

    def small_shape(self, scale: int) -> tuple[int, ...]:
        if self.pixels is None:
            return (4 * scale, self.num_classes)
        height, width = self.pixels
        return (1, self.num_classes, height * scale, width)


WORKLOADS = [
    Workload("CIFAR-10, (384, 10)", 10, 384, torch.float32),
    Workload("CIFAR-100, (384, 100)", 100, 384, torch.float32),
    Workload("ImageNet, (1024, 1000)", 1000, 1024, torch.float32),
    Workload("ImageNet, (1024, 1000)", 1000, 1024, torch.bfloat16),
    Workload("Cityscapes, (2, 19, 1024, 2048)", 19, 2 * 1024 * 2048, torch.float32, (8, 32)),
    Workload("Cityscapes, (2, 19, 1024, 2048)", 19, 2 * 1024 * 2048, torch.bfloat16, (8, 32)),
    Workload("ADE20K, (8, 150, 512, 512)", 150, 8 * 512 * 512, torch.float32, (8, 32)),
    Workload("language model, (8192, 32000)", 32000, 8192, torch.bfloat16),
    Workload("language model, (8192, 32000)", 32000, 8192, torch.float32),
]
STEPS = {"forward": None, "forward + backward": 1.0, "the same, upstream not 1": 0.5}


@dataclass
class Counts:
    launches: int
    bytes: float  # moved between the GPU and its memory
    logit_passes: float  # reads and writes of the logits' size, cached ones too


def count(workload: Workload, scale: int, upstream: float | None) -> Counts:
    """One call on a small version of a workload."""
    shape = workload.small_shape(scale)
    logits, target = make_logits(shape, workload.dtype), make_target(shape)
    per_row = 4 * target.numel()
    sizes = {
        "logits": logits.nbytes, "grad_logits": logits.nbytes, "target": target.nbytes,
        "row_max": per_row, "row_sum_exp": per_row, "grad": 4, "loss": 4, "counts": 16,
    }  # fmt: skip
    with simt_device.active(), simt_device.counting() as launches:
        if upstream is None:
            outlier_exposure_loss(logits, target)
        else:
            loss = outlier_exposure_loss(logits.requires_grad_(), target)
            torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))
    moved = [
        (name, traffic)
        for launch in launches
        for kind in ("reads", "writes")
        for name, traffic in launch[kind].items()
    ]
    return Counts(
        launches=len(launches),
        bytes=sum(min(32 * t["sectors"], sizes.get(name, 32 * t["sectors"])) for name, t in moved),
        logit_passes=sum(t["bytes"] for name, t in moved if "logits" in name) / logits.nbytes,
    )


def extrapolate(workload: Workload, upstream: float | None) -> Counts:
    """Extrapolates two small versions to the full size: linear in the rows."""
    torch.manual_seed(0)
    small, large = (count(workload, scale, upstream) for scale in (1, 2))
    rows = [make_target(workload.small_shape(scale)).numel() for scale in (1, 2)]
    per_row = (large.bytes - small.bytes) / (rows[1] - rows[0])
    return Counts(
        large.launches, small.bytes + per_row * (workload.rows - rows[0]), large.logit_passes
    )


def table() -> str:
    gpus = list(BANDWIDTH)
    lines = [
        "| workload | dtype | step | launches | passes over the logits | MB "
        f"| {' | '.join(f'{gpu}, us' for gpu in gpus)} |",
        "|---|---|---|---|---|---|" + "---|" * len(gpus),
    ]
    for workload in WORKLOADS:
        for step, upstream in STEPS.items():
            counts = extrapolate(workload, upstream)
            times = [
                counts.launches * LAUNCH_SECONDS + counts.bytes / (EFFICIENCY * bandwidth)
                for bandwidth in BANDWIDTH.values()
            ]
            cells = [
                workload.name,
                str(workload.dtype).removeprefix("torch."),
                step,
                str(counts.launches),
                f"{counts.logit_passes:.2f}",
                f"{counts.bytes / 1e6:.3g}",
                *(f"{time * 1e6:.3g}" for time in times),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


SECTOR_CASES = [
    ("(32, 1024) contiguous", (32, 1024), torch.contiguous_format),
    ("(32, 100) contiguous", (32, 100), torch.contiguous_format),
    ("(33, 10) contiguous", (33, 10), torch.contiguous_format),
    ("(4, 2048) contiguous", (4, 2048), torch.contiguous_format),
    ("(1, 19, 16, 32) contiguous", (1, 19, 16, 32), torch.contiguous_format),
    ("(1, 19, 15, 31) contiguous, odd", (1, 19, 15, 31), torch.contiguous_format),
    ("(1, 19, 16, 32) channels_last", (1, 19, 16, 32), torch.channels_last),
]


def sector_table() -> str:
    """The number of 32-byte sectors that requests for logits touch, over the minimum."""
    lines = [
        "| layout | dtype | requests | sectors a request | over the least | 16 bytes a lane, % |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape, memory_format in SECTOR_CASES:
        for dtype in (torch.float32, torch.bfloat16):
            logits = make_logits(shape, dtype)
            if logits.dim() == 4:
                logits = logits.to(memory_format=memory_format)
            target = make_target(shape, "ignored")
            target[:] = -1  # only outliers: no logit at a label is read again
            logits.requires_grad_()
            with simt_device.active(), simt_device.counting() as launches:
                loss = outlier_exposure_loss(logits, target)
                torch.autograd.grad(loss, logits, torch.ones_like(loss))
            moved = [
                traffic
                for launch in launches
                for kind in ("reads", "writes")
                for buffer, traffic in launch[kind].items()
                if "logits" in buffer
            ]
            requests, sectors, least, total, wide = (
                sum(traffic[key] for traffic in moved)
                for key in ("requests", "sectors", "least_sectors", "bytes", "wide_bytes")
            )
            lines.append(
                f"| {name} | {str(dtype).removeprefix('torch.')} | {requests} "
                f"| {sectors / requests:.2f} | {sectors / least:.2f} | {100 * wide / total:.0f} |"
            )
    return "\n".join(lines) + "\n"

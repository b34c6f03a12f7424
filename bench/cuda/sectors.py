"""How well the accesses of the kernels to logits coalesce, counted by the SIMT harness."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

import simt_device
import torch
from inputs import make_logits, make_target

from oe_ext import outlier_exposure_loss

SECTOR_CASES = [
    ("(32, 1024) contiguous", (32, 1024), torch.contiguous_format),
    ("(32, 100) contiguous", (32, 100), torch.contiguous_format),
    ("(33, 10) contiguous", (33, 10), torch.contiguous_format),
    ("(4, 2048) contiguous", (4, 2048), torch.contiguous_format),
    ("(1, 19, 16, 32) contiguous", (1, 19, 16, 32), torch.contiguous_format),
    ("(1, 19, 15, 31) contiguous, odd", (1, 19, 15, 31), torch.contiguous_format),
    ("(1, 19, 16, 32) channels_last", (1, 19, 16, 32), torch.channels_last),
]


def sector_table() -> tuple[list[str], list[list[str]]]:
    """The number of 32-byte sectors that requests for logits touch, over the minimum."""
    header = ["layout", "dtype", "requests", "sectors a request", "over the least"]
    lines = []
    for name, shape, memory_format in SECTOR_CASES:
        for dtype in (torch.float32, torch.bfloat16):
            logits = make_logits(shape, dtype)
            if logits.dim() == 4:
                logits = logits.to(memory_format=memory_format)
            target = make_target(shape, "ignored")
            target[:] = -1
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
            shares = [f"{sectors / requests:.2f}", f"{sectors / least:.2f}"]
            case = [name, str(dtype).removeprefix("torch."), str(requests)]
            lines.append([*case, *shares, f"{100 * wide / total:.0f}"])
    return [*header, "16 bytes a lane, %"], lines

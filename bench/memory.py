"""The peak memory of one forward and backward, each rival in a process of its own.

    python bench/memory.py cross_entropy 1024x32000 2

prints the rise of the resident memory in bytes.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import torch
from cases import MEMORY_SHAPES, Case, Shape, make_inputs
from results import MemoryRow, parse_shape, shape_text
from rivals import Step, make_losses, make_steps
from tqdm import tqdm

RIVALS = ("ours", "pytorch-ood", "compiled", "cross_entropy", "sum", "clone")
PEAK = Path("/proc/self/clear_refs")


def is_supported() -> bool:
    """Whether this system reports the peak: Linux does."""
    return PEAK.exists()


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, field
    return 1024 * int(found[1])


def peak_rise(rival: str, shape: Shape) -> int:
    """The peak rise of this process's memory in one forward and backward, in bytes."""

    def make_step(shape: Shape) -> Step:
        case = Case("memory", shape, (rival,))
        inputs = make_inputs(case, "cpu")
        return make_steps(case, inputs, make_losses(case, inputs))[rival]

    make_step((64, 1000) if len(shape) == 2 else (1, 19, 64, 64))()  # loads libraries
    step = make_step(shape)
    if rival == "compiled":
        step()  # compiles for this shape
    ctypes.CDLL(None).malloc_trim(0)
    PEAK.write_text("5")  # resets the peak, see proc(5)
    before = status("VmRSS")
    _held = step()
    return status("VmHWM") - before


def measure(threads: int) -> list[MemoryRow]:
    cases = [(shape, rival) for shape in MEMORY_SHAPES for rival in RIVALS]
    rows = []
    for shape, rival in (progress := tqdm(cases, leave=False)):
        progress.set_description(f"memory {shape} {rival}")
        done = subprocess.run(
            [sys.executable, __file__, rival, shape_text(shape), str(threads)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        logits_bytes = 4 * torch.Size(shape).numel()
        rise = int(done.stdout)
        rows.append(
            MemoryRow(shape_text(shape), rival, logits_bytes, rise, round(rise / logits_bytes, 3))
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(peak_rise(sys.argv[1], parse_shape(sys.argv[2])))

"""The peak memory of one forward and backward, each rival in a process of its own.

    python bench/memory.py cross_entropy 1024x32000 2
    python bench/memory.py unfused 1x19x128x128 2 1024x1024   # logits that are upsampled

prints the rise of the resident memory in bytes. Without arguments, all are measured, and the CSV
file is rewritten.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from cases import Case, make_inputs, memory_cases
from results import MEMORY_CSV, MemoryRow, parse_shape, provenance, shape_text, write
from rivals import Step, make_losses, make_steps
from tqdm import tqdm

PEAK = Path("/proc/self/clear_refs")


def is_supported() -> bool:
    """Whether this system reports the peak: Linux does."""
    return PEAK.exists()


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, field
    return 1024 * int(found[1])


def peak_rise(case: Case) -> int:
    """The peak rise of this process's memory in one forward and backward of the only rival."""
    (rival,) = case.rivals

    def make_step(case: Case) -> Step:
        inputs = make_inputs(case, "cpu")
        return make_steps(case, inputs, make_losses(case, inputs))[rival]

    small = (64, 1000) if len(case.shape) == 2 else (1, 19, 64, 64)
    make_step(replace(case, shape=small, size=case.size and (128, 128)))()  # loads libraries
    step = make_step(case)
    if rival == "compiled":
        step()  # compiles for this shape
    ctypes.CDLL(None).malloc_trim(0)
    PEAK.write_text("5")  # resets the peak, see proc(5)
    before = status("VmRSS")
    _held = step()
    return status("VmHWM") - before


def measure(threads: int) -> list[MemoryRow]:
    cases = [(case, rival) for case in memory_cases() for rival in case.rivals]
    rows = []
    for case, rival in (progress := tqdm(cases, leave=False)):
        progress.set_description(f"{case} {rival}")
        shape, size = shape_text(case.shape), shape_text(case.size)
        done = subprocess.run(
            [sys.executable, __file__, rival, shape, str(threads), size],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        logits_bytes = 4 * torch.Size(case.shape).numel()
        rise = int(done.stdout)
        ratio = round(rise / logits_bytes, 3)
        rows.append(MemoryRow(shape, rival, logits_bytes, rise, ratio, size))
    return rows


def main() -> None:
    if len(sys.argv) == 1:
        threads = torch.get_num_threads()
        write(MEMORY_CSV, provenance(threads), measure(threads))
        return
    rival, shape, threads, size = (*sys.argv[1:], "")[:4]
    torch.set_num_threads(int(threads))
    print(peak_rise(Case("memory", parse_shape(shape), (rival,), size=parse_shape(size))))


if __name__ == "__main__":
    main()

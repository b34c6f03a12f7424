"""Times calls by the events of a GPU, or by a clock, to rehearse a run without a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import timing
import torch
from rivals import DisagreementError, Step, relative_error

Burst = Callable[[timing.Step, int], float]
CAPTURED = "captured"  # the last line of a successful trial


@dataclass(frozen=True)
class Device:
    name: str
    eager: Burst  # seconds of a number of calls from Python
    replayed: Burst  # the same for the result of ``capture``
    capture: Callable[[Step], timing.Step]
    try_capture: Callable[[str], str]  # why a rival cannot be captured; empty if it can


def event_burst(flush: torch.Tensor, waits: bool, step: timing.Step, calls: int) -> float:
    """Times calls that find the L2 cache full of other data; the flush does not count.

    With ``waits`` the GPU is idle when the call begins, and waits for Python and for every launch.
    Without it, the host is ahead of the GPU, and only the work of the GPU counts.
    """
    pairs = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        if waits:
            torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in pairs) / 1e3


def capture_graph(step: Step) -> timing.Step:
    """The replay of one call, after a check that it computes the same."""
    expected = step()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # one-time work happens before the capture
            step()
        with torch.cuda.graph(graph, stream=side):
            captured = step()
    torch.cuda.current_stream().wait_stream(side)
    captured.zero_()
    graph.replay()
    error = relative_error(captured, expected)
    if not error <= 1e-2:  # some rivals add in another order each time
        raise DisagreementError(f"its replay differs from a call by {error:.2g}")
    return graph.replay


@cache
def try_capture(name: str) -> str:
    """Runs in its own process: a failed capture leaves torch's allocator unusable."""
    command = [sys.executable, Path(__file__).with_name("speed.py"), "--try-capture", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    verdict = (done.stdout.splitlines() or [f"exit status {done.returncode}"])[-1]
    return "" if verdict == CAPTURED else verdict


def gpu() -> Device:
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(2 * cache_bytes, dtype=torch.uint8, device="cuda")
    eager, replayed = (partial(event_burst, flush, waits) for waits in (True, False))
    return Device("cuda", eager, replayed, capture_graph, try_capture)


def rehearsal() -> Device:
    """The CPU, where the replay of a call is the call itself."""
    return Device("cpu", timing.burst, timing.burst, lambda step: step, lambda name: "")

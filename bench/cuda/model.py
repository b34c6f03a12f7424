"""Predicts the time of a call on a GPU, from its launches and from the machine code.

    time = launches * LAUNCH_SECONDS + the sum over the kernels of max(bytes, instructions)
    bytes = bytes / (EFFICIENCY * bandwidth * min(1, bytes in flight / bytes needed))
    instructions = thread instructions / (ISSUE_EFFICIENCY * issue rate)

bench/CUDA.md explains it. These are predictions, not measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from launches import Launch, Workload, launches
from machine_code import Kernel, blocks_that_fit, inspect

STEPS = {"forward": None, "forward + backward": 1.0, "the same, upstream not 1": 0.5}

# Assumptions: of the bandwidth and of the issue rate, what a good kernel reaches; the cost of
# back-to-back launches; how long a load takes on a busy GPU.
EFFICIENCY = 0.85
ISSUE_EFFICIENCY = 0.6
LAUNCH_SECONDS = 2e-6
LATENCY_SECONDS = 1.1e-6

WARP_SCHEDULERS = 4  # of a multiprocessor; each issues for 32 threads at once
STATIC_SHARED_BYTES = 4 * 1024  # of a block, that the stage leaves free
LARGEST_BLOCK_SHARED = {"80": 163 * 1024, "90": 227 * 1024, "100": 227 * 1024}


@dataclass(frozen=True)
class Gpu:
    architecture: str
    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # Hz, under load

    @property
    def issue_rate(self) -> float:
        """Thread instructions a second."""
        return self.multiprocessors * WARP_SCHEDULERS * 32 * self.clock

    @property
    def needed_in_flight(self) -> float:
        """Bytes on their way to a multiprocessor that keep the memory busy: Little's law."""
        return self.bandwidth / self.multiprocessors * LATENCY_SECONDS

    @property
    def max_stage_bytes(self) -> int:
        return LARGEST_BLOCK_SHARED[self.architecture] - STATIC_SHARED_BYTES


# Bandwidths, multiprocessors and the A100's clock by NVIDIA's data sheets. The clocks of the others
# are assumptions, below what they boost to.
GPUS = {
    "A100": Gpu("80", 2.039e12, 108, 1.41e9),
    "H100": Gpu("90", 3.35e12, 132, 1.755e9),
    "H200": Gpu("90", 4.8e12, 132, 1.755e9),
    "B200": Gpu("100", 8.0e12, 148, 1.85e9),
}


@dataclass(frozen=True)
class Prediction:
    seconds: float
    binds: str  # "memory", "latency", "issue" or "launches"


@cache
def _kernels(architecture: str) -> dict[tuple[str, str, bool], Kernel]:
    return {(k.name, k.dtype, k.width > 1): k for k in inspect(architecture)}


def find_kernel(launch: Launch, dtype: torch.dtype, gpu: Gpu) -> Kernel:
    names = {torch.float64: "double", torch.float32: "float", torch.float16: "half"}
    key = (launch.kernel, names.get(dtype, "bfloat16"), launch.is_wide)
    return _kernels(gpu.architecture)[key]


def resident_blocks(launch: Launch, kernel: Kernel, gpu: Gpu) -> float:
    """The blocks that a multiprocessor has at once; a fraction, if there are few."""
    shared = kernel.shared + launch.shared_bytes
    fit = blocks_that_fit(gpu.architecture, launch.threads, kernel.registers, shared)
    return min(fit, launch.blocks / gpu.multiprocessors)


def in_flight(launch: Launch, kernel: Kernel, workload: Workload, gpu: Gpu) -> float:
    """Bytes on their way to a multiprocessor, if all of its threads load at once."""
    loop = kernel.loops["load" if kernel.is_forward else "recompute"][0]
    elements = math.ceil(workload.num_classes / launch.lanes) * kernel.rows_a_thread
    of_thread = min(loop.loaded_bytes, elements * workload.dtype.itemsize)
    return resident_blocks(launch, kernel, gpu) * launch.threads * of_thread


def instructions(launch: Launch, kernel: Kernel, workload: Workload) -> float:
    """Of all threads."""
    kinds = ["recompute"]
    if kernel.is_forward:
        reads_again = launch.reads > 1.5
        last = [] if launch.writes == 0 else ["recompute"] if reads_again else ["write"]
        kinds = ["load", "sum", *last]
    by_element = kernel.per_element(*kinds) * workload.num_classes
    by_row = kernel.once_a_row * launch.lanes / kernel.rows_a_thread
    return workload.rows * (by_element + by_row)


def predict_launch(launch: Launch, workload: Workload, gpu: Gpu) -> Prediction:
    """Without the cost of the launch."""
    by_bytes = launch.bytes / (EFFICIENCY * gpu.bandwidth)
    if launch.reads == 0:  # a kernel without logits, or a backward with nothing to do
        return Prediction(by_bytes, "memory")
    kernel = find_kernel(launch, workload.dtype, gpu)
    share = in_flight(launch, kernel, workload, gpu) / gpu.needed_in_flight
    by_bytes /= min(1, share)
    by_issue = instructions(launch, kernel, workload) / (ISSUE_EFFICIENCY * gpu.issue_rate)
    if by_issue > by_bytes:
        return Prediction(by_issue, "issue")
    return Prediction(by_bytes, "memory" if share >= 1 else "latency")


def predict(workload: Workload, gpu: Gpu) -> Prediction:
    """The time of a call, and what most of it is spent on."""
    found = launches(workload, gpu.max_stage_bytes)
    parts = [predict_launch(launch, workload, gpu) for launch in found]
    launching = len(found) * LAUNCH_SECONDS
    seconds = launching + sum(part.seconds for part in parts)
    largest = max(parts, key=lambda part: part.seconds)
    return Prediction(seconds, "launches" if launching > seconds / 2 else largest.binds)


def find_gpu(name: str) -> Gpu:
    """By the name that its driver gives it."""
    found = [gpu for key, gpu in GPUS.items() if key in name]
    if not found:
        raise LookupError(f"no model of the GPU {name or 'without a name'}")
    return found[0]


WORKLOADS = [
    ("CIFAR-10", (384, 10), torch.float32),
    ("CIFAR-100", (384, 100), torch.float32),
    ("ImageNet", (1024, 1000), torch.float32),
    ("ImageNet", (1024, 1000), torch.bfloat16),
    ("two classes", (8, 2, 512, 512), torch.float32),
    ("Cityscapes", (2, 19, 1024, 2048), torch.float32),
    ("Cityscapes", (2, 19, 1024, 2048), torch.bfloat16),
    ("ADE20K", (8, 150, 512, 512), torch.float32),
    ("ADE20K", (8, 150, 512, 512), torch.bfloat16),
    ("language model", (8192, 32000), torch.float32),
    ("language model", (8192, 32000), torch.bfloat16),
    ("language model", (8192, 50000), torch.bfloat16),
]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _label(name: str, workload: Workload) -> list[str]:
    return [f"{name}, {workload.shape}", str(workload.dtype).removeprefix("torch.")]


def _passes(workload: Workload) -> str:
    """Over the logits and their gradient, and those of the A100, whose stage is smaller."""
    usual, small = (
        f"{sum(x.reads + x.writes for x in launches(workload, GPUS[name].max_stage_bytes)):.2f}"
        for name in ("H100", "A100")
    )
    return usual if small == usual else f"{usual}; A100 {small}"


def table() -> tuple[list[str], list[list[str]]]:
    """The predictions: a header, and lines."""
    lines = []
    for name, shape, dtype in WORKLOADS:
        for step, upstream in STEPS.items():
            workload = Workload(shape, dtype, upstream=upstream)
            found = launches(workload, GPUS["H100"].max_stage_bytes)
            megabytes = sum(launch.bytes for launch in found) / 1e6
            costs = [str(len(found)), _passes(workload), _number(megabytes)]
            predictions = [predict(workload, gpu) for gpu in GPUS.values()]
            times = [f"{_number(1e6 * p.seconds)} ({p.binds})" for p in predictions]
            lines.append([*_label(name, workload), step, *costs, *times])
    header = ["workload", "dtype", "step", "launches", "passes", "MB"]
    return [*header, *(f"{gpu}, us" for gpu in GPUS)], lines


def _in_flight_cell(launch: Launch, workload: Workload, gpu: Gpu) -> str:
    kernel = find_kernel(launch, workload.dtype, gpu)
    blocks = resident_blocks(launch, kernel, gpu)
    return f"{blocks:.2g}, {in_flight(launch, kernel, workload, gpu) / 1024:.1f}"


def in_flight_table() -> tuple[list[str], list[list[str]]]:
    """The blocks that a multiprocessor holds at once, and the KB that they have on their way."""
    lines = []
    for name, shape, dtype in WORKLOADS:
        workload = Workload(shape, dtype, upstream=0.5)
        found = [launches(workload, gpu.max_stage_bytes) for gpu in GPUS.values()]
        for of_gpus in zip(*found, strict=True):
            launch = of_gpus[-1]
            if launch.reads > 0:
                sizes = [launch.lanes, launch.threads, launch.shared_bytes / 1024]
                cells = [
                    _in_flight_cell(own, workload, gpu)
                    for own, gpu in zip(of_gpus, GPUS.values(), strict=True)
                ]
                where = [*_label(name, workload), f"`{launch.kernel}`"]
                lines.append([*where, *map(_number, sizes), *cells])
    gpus = [f"{name} (needs {gpu.needed_in_flight / 1024:.0f})" for name, gpu in GPUS.items()]
    return ["workload", "dtype", "kernel", "lanes", "threads", "stage", *gpus], lines

"""The device "simt": the CUDA kernels and their launchers, run and race-checked on CPU tensors."""

from __future__ import annotations

import fcntl
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from paths import ROOT

HARNESS = ROOT / "tests" / "simt"
FOLDER = ROOT / "build" / f"simt-torch-{torch.__version__}"
# The runtime and the operators: linked once. The kernels are a library of their own, so that
# deliberately wrong copies can be loaded too.
RUNTIME = [HARNESS / "backend.cpp", HARNESS / "scheduler.cpp", HARNESS / "checker.cpp"]
RUNTIME += [HARNESS / "guard.cpp"]
# What the operators call beside kernels, which the library of the CPU's keeps to itself.
RUNTIME += [
    ROOT / "csrc" / name
    for name in (
        "ops/row_view.cpp",
        "ops/outlier_exposure_composed.cpp",
        "ops/upsampled_outlier_exposure_composed.cpp",
        "autograd/outlier_exposure_derivatives.cpp",
        "autograd/sums.cpp",
    )
]
KERNELS = Path("tests") / "simt" / "kernels.cpp"
MAX_BLOCKS = 1024
MAX_STAGE_BYTES = 223 * 1024  # as on sm_90

INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = ["-std=c++20", "-g0", "-fPIC", "-w", "-DSIMT_CPU", "-DAT_PER_OPERATOR_HEADERS"]
FLAGS += [f"-I{INCLUDE}", f"-I{INCLUDE / 'torch' / 'csrc' / 'api' / 'include'}"]
# The compiler reports every access of the kernels; all is linked without its own runtime, whose
# part checker.cpp plays. Each copy of the kernels keeps its statics, the shared memory, to itself.
KERNEL_FLAGS = ["-fsanitize=thread", "-fno-tree-sra", "-fvisibility=hidden", "-fno-gnu-unique"]


def _newest(paths: Iterator[Path] | list[Path]) -> float:
    return max(path.stat().st_mtime for path in paths)


def _headers(root: Path) -> list[Path]:
    harness = (root / "tests" / "simt").glob("*.h")
    return [*harness, *(root / "csrc").rglob("*.*h"), *root.glob("csrc/cuda/*.cu")]


def _is_fresh(made: Path, sources: list[Path]) -> bool:
    return made.exists() and made.stat().st_mtime > _newest(sources)


def compile_kernels(root: Path, made: Path, flags: list[str]) -> None:
    """Makes a library of the kernels of a tree. -fsanitize=thread would link its runtime too."""
    compiled = made.with_suffix(".o")
    subprocess.run(["g++", *FLAGS, *flags, "-c", root / KERNELS, "-o", compiled], check=True)
    runtime = [f"-L{FOLDER}", "-loe_ext_simt", f"-Wl,-rpath,{FOLDER}"]
    coverage = [flag for flag in flags if flag == "--coverage"]
    subprocess.run(["g++", "-shared", *coverage, compiled, "-o", made, *runtime], check=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process builds, the others wait: pytest-xdist starts several."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build() -> Path:
    """Compiles the harness, where anything is newer than it was. Returns the kernels' library."""
    with _locked(FOLDER):
        return _build()


def _build() -> Path:
    headers = _headers(ROOT)
    objects = {source: FOLDER / f"{source.stem}.o" for source in RUNTIME}
    compilers = [
        subprocess.Popen(["g++", *FLAGS, "-O2", "-c", source, "-o", made])
        for source, made in objects.items()
        if not _is_fresh(made, [*headers, source])
    ]
    statuses = [compiler.wait() for compiler in compilers]
    if any(statuses):
        raise RuntimeError("the SIMT harness does not compile")
    runtime = FOLDER / "liboe_ext_simt.so"
    if not _is_fresh(runtime, list(objects.values())):
        torch_libraries = [f"-L{INCLUDE.parent / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
        subprocess.run(
            [
                "g++",
                "-shared",
                f"-Wl,-soname,{runtime.name}",
                *objects.values(),
                "-o",
                runtime,
                *torch_libraries,
            ],
            check=True,
        )
    kernels = FOLDER / "kernels.so"
    if not _is_fresh(kernels, [*headers, ROOT / KERNELS, runtime]):
        compile_kernels(ROOT, kernels, ["-O2", *KERNEL_FLAGS])
    return kernels


@cache
def load() -> None:
    kernels = build()
    torch.ops.load_library(FOLDER / "liboe_ext_simt.so")
    use_kernels(kernels)


def use_kernels(path: Path) -> None:
    """Runs another copy of the kernels from now on."""
    torch.ops.oe_ext_simt.use_kernels(str(path))


def set_seed(seed: int) -> None:
    """Of the schedules of all launches to come."""
    torch.ops.oe_ext_simt.set_seed(seed)


@contextmanager
def limits(
    *, max_blocks: int = MAX_BLOCKS, max_stage_bytes: int = MAX_STAGE_BYTES
) -> Iterator[None]:
    """Makes the launchers ask for less."""
    torch.ops.oe_ext_simt.set_limits(max_blocks, max_stage_bytes)
    try:
        yield
    finally:
        torch.ops.oe_ext_simt.set_limits(MAX_BLOCKS, MAX_STAGE_BYTES)


@contextmanager
def counting(enabled: bool = True) -> Iterator[list[dict[str, Any]]]:
    """Records every launch meanwhile: kernel, grid, and what it reads and writes of each buffer."""
    launches: list[dict[str, Any]] = []
    if not enabled:
        yield launches
        return
    torch.ops.oe_ext_simt.start_counting()
    try:
        yield launches
    finally:
        launches += json.loads(torch.ops.oe_ext_simt.stop_counting())


@contextmanager
def guarded() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Memory that is allocated meanwhile faults when the host touches it, as a GPU's would.

    Yields what copies a tensor there.
    """
    ops = torch.ops.oe_ext_simt

    def to_device(tensor: torch.Tensor) -> torch.Tensor:
        ops.start_guarding()
        copy = torch.empty_like(tensor)
        ops.open_device_memory()
        copy.copy_(tensor)
        ops.close_device_memory()
        return copy

    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # that would be the host's doing
    try:
        yield to_device
    finally:
        ops.stop_guarding()
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def active() -> Iterator[None]:
    """While it is, the project's operators run the CUDA kernels on CPU tensors.

    Memory that is allocated meanwhile is filled with NaN, so that an element that no kernel writes
    shows.
    """
    load()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.ops.oe_ext_simt.activate()
    try:
        yield
    finally:
        torch.ops.oe_ext_simt.deactivate()
        torch.use_deterministic_algorithms(deterministic)

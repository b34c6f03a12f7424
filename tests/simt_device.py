"""The device "simt": the CUDA kernels and their launchers, run and race-checked on CPU tensors."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "tests" / "simt"
# With -fsanitize=thread the compiler reports every access; the harness's own files must be compiled
# without, and all are linked without.
SOURCES = {
    HARNESS / "kernels.cpp": ["-fsanitize=thread"],
    HARNESS / "backend.cpp": [],
    HARNESS / "scheduler.cpp": [],
    HARNESS / "checker.cpp": [],
    ROOT / "csrc" / "layout.cpp": [],
}
OPERATORS = [
    "outlier_exposure_loss",
    "outlier_exposure_loss.tensor_alpha",
    "_outlier_exposure_loss_forward",
    "_outlier_exposure_loss_backward",
]


@cache
def load() -> None:
    """Compiles the harness, where anything is newer than it was, and loads it."""
    folder = ROOT / "build" / f"simt-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O2", "-g0", "-fPIC", "-w", "-DSIMT_CPU", "-DAT_PER_OPERATOR_HEADERS"]
    flags += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    headers = [*HARNESS.glob("*.h"), *(ROOT / "csrc").rglob("*.*h"), *ROOT.glob("csrc/cuda/*.cu")]
    newest_header = max(path.stat().st_mtime for path in headers)

    def is_fresh(made: Path, source: Path) -> bool:
        newest = max(newest_header, source.stat().st_mtime)
        return made.exists() and made.stat().st_mtime > newest

    objects = {source: folder / f"{source.stem}.o" for source in SOURCES}
    library = folder / "liboe_ext_simt.so"
    compilers = [
        subprocess.Popen(["g++", *flags, *SOURCES[source], "-c", source, "-o", made])
        for source, made in objects.items()
        if not is_fresh(made, source)
    ]
    statuses = [compiler.wait() for compiler in compilers]
    if any(statuses):
        raise RuntimeError("the SIMT harness does not compile")
    newest_object = max(made.stat().st_mtime for made in objects.values())
    if not library.exists() or library.stat().st_mtime < newest_object:
        torch_libraries = [f"-L{include.parent / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
        command = ["g++", "-shared", *objects.values(), "-o", library, *torch_libraries]
        subprocess.run(command, check=True)
    torch.ops.load_library(library)


@contextmanager
def active() -> Iterator[None]:
    """While it is, the project's operators run the CUDA kernels on CPU tensors.

    Memory that is allocated meanwhile is filled with NaN, so that an element that no kernel writes
    shows.
    """
    load()
    library = torch.library.Library("oe_ext", "IMPL")
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        # torch warns of an override; this one is what is wanted, and undone below.
        warnings.filterwarnings("ignore", message="[\\s\\S]*other operators may also be overridden")
        for name in OPERATORS:
            base, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.oe_ext_simt, base), overload or "default")
            library.impl(name, operator, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
        torch.use_deterministic_algorithms(deterministic)

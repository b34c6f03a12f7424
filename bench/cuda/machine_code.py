"""The machine code of the CUDA kernels: registers, spills, occupancy, wide loads, instructions an
element.

Needs nvcc, and cuobjdump with nvdisasm (the PyPI packages of the extra "cuda-tools"); no GPU.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import sass

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "bench" / "cuda" / "kernels.cu"
FOLDER = ROOT / "build" / "cuda-code"
ARCHITECTURES = ("75", "80", "90", "100", "120")

# Of one multiprocessor: registers, shared memory (bytes), threads, blocks. CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability".
MULTIPROCESSORS = {
    "75": (65536, 64 * 1024, 1024, 16),
    "80": (65536, 164 * 1024, 2048, 32),
    "90": (65536, 228 * 1024, 2048, 32),
    "100": (65536, 228 * 1024, 2048, 32),
    "120": (65536, 100 * 1024, 1536, 24),
}


@dataclass(frozen=True)
class LoopCode:
    """A loop over logits, and what one pass through it does."""

    instructions: int
    elements: int
    loaded_bytes: int  # from global memory: what a thread has on its way at once
    is_wide: bool  # all its accesses of global memory are of 128 bits


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture."""

    architecture: str
    name: str
    dtype: str
    width: int  # elements moved at once; 0 if it moves no logits; of upsampled ones, a patch's side
    max_threads: int  # of a block: the launch bounds; 0 without them
    registers: int
    stack: int
    spills: int  # bytes, stores and loads
    shared: int  # static, bytes
    occupancy: float  # of a multiprocessor's threads, in the largest blocks, without a stage
    wide_loads: int  # 128-bit loads from global memory
    wide_stores: int
    instructions: int
    loops: dict[str, list[LoopCode]]  # by kind; one of each, or it is a fault
    once_a_row: int  # the fewest instructions of a thread for its row, or rows, beside the loops
    patch: sass.PatchCode | None = None  # of upsampled logits

    def __str__(self) -> str:
        return f"{self.name}<{self.dtype}, {self.width}> on sm_{self.architecture}"

    @property
    def is_forward(self) -> bool:
        return self.name.startswith("forward")

    @property
    def is_upsampled(self) -> bool:
        return self.name.endswith("upsampled")

    @property
    def rows_a_thread(self) -> int:
        return self.width if "pixels" in self.name else 1

    @property
    def loop_kinds(self) -> list[str]:
        """The loops that it needs. Of pixels, wide kernels keep all logits."""
        if self.width == 0 or self.is_upsampled:
            return []
        if not self.is_forward:
            return ["recompute"]
        again = self.name == "forward_rows" or self.width == 1
        return ["load", "sum", "write", *(["recompute"] if again else [])]

    def per_element(self, *kinds: str) -> float:
        """Instructions an element of these loops; NaN if one is missing. By default of those that
        run for the statistics and the gradient of a row that fits the stage."""
        chosen = kinds or (("load", "sum", "write") if self.is_forward else ("recompute",))
        loops = [loop for kind in chosen for loop in self.loops[kind][:1]]
        if len(loops) < len(chosen):
            return math.nan
        return sum(loop.instructions / loop.elements for loop in loops)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = Path(home) / "bin" / "nvcc"
    return str(path) if path.exists() else shutil.which("nvcc")


def find_cuobjdump() -> Path | None:
    """Of the PyPI package or of the toolkit, beside nvdisasm, which it calls."""
    folders = [Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path]
    folders.append(Path(find_nvcc() or "").parent)
    for path in (folder / "cuobjdump" for folder in folders):
        if path.exists() and path.with_name("nvdisasm").exists():
            return path
    return None


def _nvcc(arguments: list[str | Path]) -> subprocess.CompletedProcess[str]:
    import torch

    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found: set CUDA_HOME to the folder of the CUDA toolkit")
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{include}"]
    command = [nvcc, *flags, *arguments, SOURCE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc fails:\n{result.stderr}")
    return result


def write_ptx(architecture: str) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"kernels.sm_{architecture}.ptx"
    _nvcc(["-ptx", f"-arch=compute_{architecture}", "-o", path])
    return path


def _demangle(names: list[str]) -> list[str]:
    result = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def _identify(demangled: str) -> tuple[str, str, int]:
    """Kernel, dtype and width of ``void oe_ext::cuda::outlier_exposure_X_kernel<...>(...)``."""
    match = re.search(r"outlier_exposure_(\w+?)_kernel(?:<([^>]*)>)?", demangled)
    assert match is not None, demangled
    parts = [part.strip() for part in (match[2] or "").split(",") if part.strip()]
    dtype = parts[0].removeprefix("c10::").lower() if parts else "any"
    return match[1], dtype, int(parts[2]) if len(parts) > 2 else 0


def _read_launch_bounds(elf: str) -> dict[str, int]:
    """The largest block of each function that has launch bounds."""
    bounds = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        found = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x[0-9a-f]+)", body)
        if found:
            bounds[name.strip()] = int(found[1], 16)
    return bounds


def _loop_code(loop: sass.Loop, dtype: str) -> LoopCode:
    stored = {"double": 8, "float": 4}.get(dtype, 2)
    staged = max(stored, 4)
    moved = loop.bytes(sass.COUNTED[loop.kind])
    global_accesses = [access for name in ("LDG", "STG") for access in loop.accesses(name)]
    return LoopCode(
        instructions=len(loop.body),
        elements=moved // (staged if loop.kind == "sum" else stored),
        loaded_bytes=loop.bytes("LDG"),
        is_wide=all(size == 16 for size in global_accesses),
    )


def _read_loops(kernel: Kernel, lines: sass.Lines) -> Kernel:
    """Adds the loops, and what lies between them."""
    found = sass.loops_over_logits(lines)
    chosen = [kind for kind in kernel.loop_kinds if kind != "recompute" or not kernel.is_forward]
    complete = chosen and all(len(found[kind]) == 1 for kind in chosen)
    return replace(
        kernel,
        loops={
            kind: [_loop_code(loop, kernel.dtype) for loop in loops]
            for kind, loops in found.items()
        },
        once_a_row=(
            sass.shortest_round(lines, [found[kind][0] for kind in chosen]) if complete else 0
        ),
    )


_PTXAS_REPORT = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@cache
def inspect(architecture: str, *flags: str) -> list[Kernel]:
    """Compiles every kernel for one architecture and reads its machine code."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    cubin = FOLDER / f"kernels.sm_{architecture}{''.join(flags)}.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    log = _nvcc([target, *flags, "-Xptxas=-v", "-cubin", "-o", cubin]).stderr
    code = sass.read_code(_dump(cubin, "-sass"))
    bounds = _read_launch_bounds(_dump(cubin, "-elf"))
    found = _PTXAS_REPORT.findall(log)
    kernels = []
    for (mangled, stack, stores, loads, registers, rest), demangled in zip(
        found, _demangle([entry[0] for entry in found]), strict=True
    ):
        name, dtype, width = _identify(demangled)
        shared = re.search(r"(\d+) bytes smem", rest)
        shared_bytes = int(shared[1]) if shared else 0
        max_threads = bounds.get(mangled, 0)
        lines = code[mangled]
        kernel = Kernel(
            architecture=architecture,
            name=name,
            dtype=dtype,
            width=width,
            max_threads=max_threads,
            registers=int(registers),
            stack=int(stack),
            spills=int(stores) + int(loads),
            shared=shared_bytes,
            occupancy=occupancy(architecture, max_threads, int(registers), shared_bytes),
            wide_loads=sum(sass.accessed_bytes(text, "LDG") == 16 for _, text in lines),
            wide_stores=sum(sass.accessed_bytes(text, "STG") == 16 for _, text in lines),
            instructions=len(lines),
            loops={},
            once_a_row=0,
        )
        if kernel.is_upsampled:
            kernel = replace(kernel, patch=sass.patch_code(lines, width**2))
        elif width:
            kernel = _read_loops(kernel, lines)
        kernels.append(kernel)
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.dtype, kernel.width))


def _dump(cubin: Path, what: str) -> str:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("cuobjdump was not found: pip install 'oe_ext[cuda-tools]'")
    environment = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}
    command = [cuobjdump, what, cubin]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


def blocks_that_fit(architecture: str, threads: int, registers: int, shared: int) -> int:
    """Blocks of this size, with this much shared memory each, that a multiprocessor holds."""
    all_registers, all_shared, max_threads, max_blocks = MULTIPROCESSORS[architecture]
    by_warp = -(-registers // 8) * 8 * 32  # allocated per warp, 8 per thread at a time
    return min(
        max_blocks,
        max_threads // threads,
        all_registers // (by_warp * threads // 32),
        all_shared // (shared + 1024),  # the system takes 1 KiB of each block
    )


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that blocks of this size fill; 0 if not even one
    fits, or if the size is unknown."""
    if threads == 0:
        return 0.0
    blocks = blocks_that_fit(architecture, threads, registers, shared)
    return blocks * threads / MULTIPROCESSORS[architecture][2]


def inspect_all(architectures=ARCHITECTURES) -> list[Kernel]:
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(inspect, architectures) for kernel in kernels]

"""The machine code of the CUDA kernels: registers, spills, occupancy, wide loads, instructions.

Needs nvcc, and cuobjdump with nvdisasm (the PyPI packages of the extra "cuda-tools"); no GPU.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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
class Kernel:
    """One kernel of one architecture."""

    architecture: str
    name: str
    dtype: str
    width: int  # elements moved at once; 0 if it moves no logits
    max_threads: int  # of a block: the launch bounds; 0 without them
    registers: int
    stack: int
    spills: int  # bytes, stores and loads
    shared: int  # static, bytes
    occupancy: float  # of a multiprocessor's threads, in the largest blocks, without a stage
    wide_loads: int  # 128-bit loads from global memory
    wide_stores: int
    loop_wide_loads: int  # those of the hot loop: the tightest loop with any
    instructions: int
    loop_instructions_per_element: float | None  # of the hot loop, per element loaded


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


def _loops(lines: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Address ranges from the target of a backward branch to the branch."""
    loops = []
    for address, text in lines:
        match = re.search(r"\bBRA(?:\.\w+)*\s+(?:!?\w+,\s*)?`?\(?0x([0-9a-f]+)", text)
        if match and int(match[1], 16) < address:
            loops.append((int(match[1], 16), address))
    return loops


def _read_code(sass: str) -> dict[str, list[tuple[int, str]]]:
    """The instructions of each function, with their addresses."""
    functions = {}
    for part in re.split(r"Function : ", sass)[1:]:
        name, _, body = part.partition("\n")
        functions[name.strip()] = [
            (int(match[1], 16), match[2])
            for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?;)", body)
        ]
    return functions


def _read_launch_bounds(elf: str) -> dict[str, int]:
    """The largest block of each function that has launch bounds."""
    bounds = {}
    for part in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        found = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x[0-9a-f]+)", body)
        if found:
            bounds[name.strip()] = int(found[1], 16)
    return bounds


def inspect(architecture: str, *flags: str) -> list[Kernel]:
    """Compiles every kernel for one architecture and reads its machine code."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    cubin = FOLDER / f"kernels.sm_{architecture}{''.join(flags)}.cubin"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    log = _nvcc([target, *flags, "-Xptxas=-v", "-cubin", "-o", cubin]).stderr
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("cuobjdump was not found: pip install 'oe_ext[cuda-tools]'")
    environment = {**os.environ, "PATH": f"{cuobjdump.parent}{os.pathsep}{os.environ['PATH']}"}

    def dump(what: str) -> str:
        command = [cuobjdump, what, cubin]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout

    code = _read_code(dump("-sass"))
    bounds = _read_launch_bounds(dump("-elf"))

    pattern = re.compile(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = pattern.findall(log)
    kernels = []
    for (mangled, stack, stores, loads, registers, rest), demangled in zip(
        found, _demangle([entry[0] for entry in found]), strict=True
    ):
        name, dtype, width = _identify(demangled)
        shared = re.search(r"(\d+) bytes smem", rest)
        shared_bytes = int(shared[1]) if shared else 0
        max_threads = bounds.get(mangled, 0)
        lines = code[mangled]
        loop_wide_loads, loop_instructions = _hot_loop(lines)
        kernels.append(
            Kernel(
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
                wide_loads=sum(_is_wide_load(text) for _, text in lines),
                wide_stores=sum("STG.E.128" in text for _, text in lines),
                loop_wide_loads=loop_wide_loads,
                instructions=len(lines),
                loop_instructions_per_element=(
                    loop_instructions / (loop_wide_loads * width) if loop_wide_loads else None
                ),
            )
        )
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.dtype, kernel.width))


def _is_wide_load(text: str) -> bool:
    return re.search(r"\bLDG\.E(?:\.\w+)*\.128\b", text) is not None


def _hot_loop(lines: list[tuple[int, str]]) -> tuple[int, int]:
    """Wide loads and instructions of the tightest loop that loads widely; zeros without one."""
    loops = []
    for begin, end in _loops(lines):
        body = [text for address, text in lines if begin <= address <= end]
        loads = sum(map(_is_wide_load, body))
        if loads > 0:
            loops.append((len(body), loads))
    instructions, loads = min(loops, default=(0, 0))
    return loads, instructions


def occupancy(architecture: str, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that blocks of this size fill; 0 if not even one
    fits, or if the size is unknown."""
    all_registers, all_shared, max_threads, max_blocks = MULTIPROCESSORS[architecture]
    if threads == 0:
        return 0.0
    by_warp = -(-registers // 8) * 8 * 32  # allocated per warp, 8 per thread at a time
    blocks = min(
        max_blocks,
        max_threads // threads,
        all_registers // (by_warp * threads // 32),
        all_shared // (shared + 1024),  # the system takes 1 KiB of each block
    )
    return blocks * threads / max_threads


def inspect_all(architectures=ARCHITECTURES) -> list[Kernel]:
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(inspect, architectures) for kernel in kernels]


def faults(kernels: list[Kernel]) -> list[str]:
    """Faults that no kernel may have: missing launch bounds, or a largest block that does not fit;
    spills or a stack; in a vector kernel, a hot loop without wide loads."""
    found = []
    for kernel in kernels:
        name = f"{kernel.name}<{kernel.dtype}, {kernel.width}> on sm_{kernel.architecture}"
        if kernel.max_threads == 0:
            found.append(f"{name}: no launch bounds")
        elif kernel.occupancy == 0:
            found.append(
                f"{name}: cannot be launched with {kernel.max_threads} threads of "
                f"{kernel.registers} registers"
            )
        if kernel.spills or kernel.stack:
            found.append(f"{name}: {kernel.spills} bytes spilled, {kernel.stack} of stack")
        if kernel.width > 1 and not (kernel.loop_wide_loads and kernel.wide_stores):
            found.append(f"{name}: no 128-bit loads in its hot loop, or no such stores")
    return found


def table(kernels: list[Kernel]) -> str:
    """One row per kernel, dtype and width; one value per architecture."""
    groups = collections.defaultdict(dict)
    for kernel in kernels:
        groups[(kernel.name, kernel.dtype, kernel.width)][kernel.architecture] = kernel

    def values(by_architecture, get) -> str:
        texts = [str(get(by_architecture[a])) for a in ARCHITECTURES if a in by_architecture]
        return texts[0] if len(set(texts)) == 1 else " / ".join(texts)

    lines = [
        "| kernel | dtype | width | largest block | registers | occupancy, % | spills | stack "
        "| static shared | 128-bit loads (in a loop) | 128-bit stores | instructions "
        "| per element |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, dtype, width), row in groups.items():
        cells = [
            f"`{name}`",
            dtype,
            str(width or ""),
            values(row, lambda k: k.max_threads),
            values(row, lambda k: k.registers),
            values(row, lambda k: round(100 * k.occupancy)),
            values(row, lambda k: k.spills),
            values(row, lambda k: k.stack),
            values(row, lambda k: k.shared),
            values(row, lambda k: f"{k.wide_loads} ({k.loop_wide_loads})"),
            values(row, lambda k: k.wide_stores),
            values(row, lambda k: k.instructions),
            values(
                row,
                lambda k: (
                    ""
                    if k.loop_instructions_per_element is None
                    else round(k.loop_instructions_per_element, 1)
                ),
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

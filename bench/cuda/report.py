"""Rewrites the tables of bench/CUDA.md.

make sass-report   what nvcc makes of the kernels
make cuda-model    what the SIMT harness counts, and what follows from it
make ptx           the kernels in PTX, in build/cuda-code
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import machine_code
import sass
from faults import PATCH_BUDGETS, budget, faults
from machine_code import ARCHITECTURES, Kernel

ROOT = Path(__file__).resolve().parent.parent.parent
REPORT = ROOT / "bench" / "CUDA.md"


def rewrite(section: str, text: str) -> None:
    """Replaces the text between the two comments that name a section."""
    page = REPORT.read_text()
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise RuntimeError(f"{REPORT} must hold the section {section!r} once")
    REPORT.write_text(pattern.sub(lambda _: f"{begin}\n{text}{end}", page))


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _values(kernels: dict[str, Kernel], get: Callable[[Kernel], object]) -> str:
    """One value per architecture, or one for all of them."""
    texts = [str(get(kernels[name])) for name in ARCHITECTURES if name in kernels]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _table(kernels: list[Kernel], columns: dict[str, Callable[[Kernel], object]]) -> str:
    """One row per kernel, dtype and width."""
    groups: dict[tuple[str, str, int], dict[str, Kernel]] = collections.defaultdict(dict)
    for kernel in kernels:
        groups[kernel.name, kernel.dtype, kernel.width][kernel.architecture] = kernel
    lines = []
    for (name, dtype, width), group in groups.items():
        values = [_values(group, get) for get in columns.values()]
        lines.append([f"`{name}`", dtype, str(width or ""), *values])
    return markdown(["kernel", "dtype", "width", *columns], lines)


def resource_table(kernels: list[Kernel]) -> str:
    return _table(
        kernels,
        {
            "largest block": lambda k: k.max_threads,
            "registers": lambda k: k.registers,
            "occupancy, %": lambda k: round(100 * k.occupancy),
            "spills": lambda k: k.spills,
            "stack": lambda k: k.stack,
            "static shared": lambda k: k.shared,
            "128-bit loads": lambda k: k.wide_loads,
            "128-bit stores": lambda k: k.wide_stores,
            "instructions": lambda k: k.instructions,
        },
    )


def element_table(kernels: list[Kernel]) -> str:
    """Instructions an element, and those of a thread once a row."""

    def loop(kind: str) -> Callable[[Kernel], object]:
        return lambda k: f"{k.per_element(kind):.1f}" if k.loops[kind] else ""

    return _table(
        [kernel for kernel in kernels if kernel.width > 0 and not kernel.is_upsampled],
        {
            **{kind: loop(kind) for kind in sass.KINDS},
            "all": lambda k: f"{k.per_element():.1f}",
            "budget": lambda k: budget(replace(k, architecture="90")),
            "once a row": lambda k: round(k.once_a_row / k.rows_a_thread),
        },
    )


def patch_table(kernels: list[Kernel]) -> str:
    """Instructions of a pixel and class of upsampled logits."""
    of_patches = [kernel for kernel in kernels if kernel.patch is not None]

    def per_pixel(count: Callable[[sass.PatchCode], int]) -> Callable[[Kernel], object]:
        return lambda k: f"{count(k.patch) / k.patch.pixels:.1f}"

    return _table(
        of_patches,
        {
            "sum": per_pixel(lambda patch: patch.kept.sum),
            "gradient": per_pixel(lambda patch: patch.kept.gradient),
            "both": per_pixel(lambda patch: patch.kept.sum + patch.kept.gradient),
            "budget": lambda k: PATCH_BUDGETS[k.width]["kept"][0],
            "again: both": per_pixel(lambda patch: patch.again.sum + patch.again.gradient),
            "again: budget": lambda k: PATCH_BUDGETS[k.width]["again"][0],
            "again: more at a label": per_pixel(lambda patch: patch.again.label),
        },
    )


def machine_code_sections() -> None:
    kernels = machine_code.inspect_all()
    version = subprocess.run(
        [str(machine_code.find_nvcc()), "--version"], capture_output=True, text=True, check=True
    ).stdout
    release = re.search(r"release ([\d.]+)", version)
    compiler = f"nvcc {release[1] if release else 'of unknown release'}"
    targets = ", ".join(f"sm_{name}" for name in machine_code.ARCHITECTURES)
    rewrite("machine code", f"{compiler}; {targets}.\n\n{resource_table(kernels)}")
    rewrite("instructions", element_table(kernels))
    rewrite("instructions of patches", patch_table(kernels))
    sys.exit("\n".join(faults(kernels)) or None)


def model_sections() -> None:
    import model
    import sectors

    rewrite("model", markdown(*model.table()))
    rewrite("in flight", markdown(*model.in_flight_table()))
    rewrite("sectors", markdown(*sectors.sector_table()))


def ptx() -> None:
    for architecture in machine_code.ARCHITECTURES:
        print(machine_code.write_ptx(architecture))


def main() -> None:
    reports = {"machine-code": machine_code_sections, "model": model_sections, "ptx": ptx}
    parser = argparse.ArgumentParser(description="Rewrites the tables of bench/CUDA.md.")
    parser.add_argument("report", choices=reports)
    reports[parser.parse_args().report]()


if __name__ == "__main__":
    main()

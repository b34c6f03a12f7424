"""Rewrites the tables of bench/CUDA.md.

make sass-report   what nvcc makes of the kernels
make cuda-model    what the SIMT harness counts, and what follows from it
make ptx           the kernels in PTX, in build/cuda-code
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

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


def machine_code() -> None:
    import machine_code

    kernels = machine_code.inspect_all()
    version = subprocess.run(
        [str(machine_code.find_nvcc()), "--version"], capture_output=True, text=True, check=True
    ).stdout
    release = re.search(r"release ([\d.]+)", version)
    compiler = f"nvcc {release[1] if release else 'of unknown release'}"
    targets = ", ".join(f"sm_{name}" for name in machine_code.ARCHITECTURES)
    rewrite("machine code", f"{compiler}; {targets}.\n\n{machine_code.table(kernels)}")
    sys.exit("\n".join(machine_code.faults(kernels)) or None)


def model() -> None:
    import model

    model.simt_device.load()
    rewrite("model", model.table())
    rewrite("sectors", model.sector_table())


def ptx() -> None:
    import machine_code

    for architecture in machine_code.ARCHITECTURES:
        print(machine_code.write_ptx(architecture))


def main() -> None:
    reports = {"machine-code": machine_code, "model": model, "ptx": ptx}
    parser = argparse.ArgumentParser(description="Rewrites the tables of bench/CUDA.md.")
    parser.add_argument("report", choices=reports)
    reports[parser.parse_args().report]()


if __name__ == "__main__":
    main()

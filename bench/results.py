"""The CSV files: the measurements and their provenance."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from cases import Case, Shape, dtype_text
from timing import Timing

from oe_ext import collect_env

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
TIMES_CSV = FOLDER / "cpu.csv"
MEMORY_CSV = FOLDER / "cpu_memory.csv"
# Sections that are newer than the whole, if they exist.
SECTION_CSVS = {name: FOLDER / f"cpu_{name}.csv" for name in ("options", "upsampled")}
AVX2_CSV = FOLDER / "cpu_avx2.csv"  # the main table, where most processors are


@dataclass(frozen=True)
class TimeRow:
    section: str
    shape: str
    dtype: str
    layout: str
    target_dtype: str
    reduction: str
    direction: str
    threads: int
    rival: str
    median_us: float
    ratio: float  # over ours
    iqr: float  # of the ratio
    size: str = ""  # of the target's images, if the logits are upsampled to it
    align_corners: int = 0
    labels: str = "random"


@dataclass(frozen=True)
class CudaRow(TimeRow):
    """Of a GPU: the section is "eager", or "graph" for the replays of a CUDA graph."""

    left_out: str = ""  # why it was not measured; the figures are then NaN


@dataclass(frozen=True)
class MemoryRow:
    shape: str
    rival: str
    logits_bytes: int
    peak_rise_bytes: int
    ratio: float  # of the rise over the logits
    size: str = ""


Row = TypeVar("Row", TimeRow, CudaRow, MemoryRow)


def shape_text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def parse_shape(text: str) -> Shape:
    return tuple(map(int, text.split("x"))) if text else ()


def row_fields(case: Case, timing: Timing) -> dict[str, Any]:
    """The fields of a row that name the measurement, and its figures."""
    return {
        "shape": shape_text(case.shape),
        "dtype": dtype_text(case.dtype),
        "layout": case.layout,
        "target_dtype": dtype_text(case.target_dtype),
        "reduction": case.reduction,
        "direction": "inference" if case.inference else "forward+backward",
        "median_us": round(1e6 * timing.seconds, 3),
        "ratio": round(timing.ratio, 4),
        "iqr": round(timing.iqr, 4),
        "size": shape_text(case.size),
        "align_corners": int(case.align_corners),
        "labels": case.labels,
    }


def _output(*command: str) -> str | None:
    """The output of a program; None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    """The commit, and whether anything but these results has changed since."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    outputs = ("bench/results", "bench/RESULTS.md", "README.md")
    others = (f":!{path}" for path in outputs)
    changed = _output("git", "status", "--porcelain", "--", ".", *others)
    return f"{commit}, with uncommitted changes" if changed else commit


def _gpu_facts() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "GPU": properties.name,
        "L2 cache": f"{properties.L2_cache_size / 2**20:g} MiB",
        "driver": driver or "unknown",
        "CUDA": str(torch.version.cuda),
    }


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", name, *sys.argv[1:]])


def provenance(threads: int, device: str = "cpu") -> dict[str, str]:
    facts = collect_env.collect()
    chosen = _gpu_facts() if device == "cuda" else {}
    chosen |= {
        "CPU": facts["CPU"],
        "CPU kernels": facts.get("CPU kernels", "unknown"),
        "threads": str(threads),
        "torch": facts["torch"],
        "oe_ext": facts["oe_ext"],
        "built with": facts.get("built with compiler", "unknown"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": _command(),
    }
    return chosen


def write(path: Path, facts: dict[str, str], rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        names = [field.name for field in fields(rows[0])]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def read(path: Path, row_type: type[Row]) -> tuple[dict[str, str], list[Row]]:
    """The provenance and the rows of a file."""
    lines = path.read_text().splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    parsers = {"int": int, "float": float, "str": str}
    types = {field.name: parsers[str(field.type)] for field in fields(row_type)}
    records = csv.DictReader(line for line in lines if not line.startswith("# "))
    return facts, [row_type(**{k: types[k](v) for k, v in row.items()}) for row in records]

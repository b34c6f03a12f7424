"""The CSV files: what was measured, and where."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch
from cases import Shape

from oe_ext import collect_env

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
TIMES_CSV = FOLDER / "cpu.csv"
MEMORY_CSV = FOLDER / "cpu_memory.csv"


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


@dataclass(frozen=True)
class MemoryRow:
    shape: str
    rival: str
    logits_bytes: int
    peak_rise_bytes: int
    ratio: float  # of the rise over the logits


Row = TypeVar("Row", TimeRow, MemoryRow)


def shape_text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def parse_shape(text: str) -> Shape:
    return tuple(map(int, text.split("x")))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit() -> str:
    """The commit, and whether something else than these results has changed since."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return "unknown"
    outputs = ("bench/results", "bench/RESULTS.md", "README.md")
    changed = _git("status", "--porcelain", "--", ".", *(f":!{path}" for path in outputs))
    return f"{commit}, with uncommitted changes" if changed else commit


def provenance(device: str, threads: int) -> dict[str, str]:
    facts = collect_env.collect()
    chosen = {"GPU": torch.cuda.get_device_name()} if device == "cuda" else {}
    chosen |= {
        "CPU": facts["CPU"],
        "CPU kernels": facts.get("CPU kernels", "unknown"),
        "threads": str(threads),
        "torch": facts["torch"],
        "oe_ext": facts["oe_ext"],
        "built with": facts.get("built with compiler", "unknown"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join(["python bench/bench.py", *sys.argv[1:]]),
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

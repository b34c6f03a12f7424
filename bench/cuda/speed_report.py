"""The page of a run on a GPU, from the rows of its CSV file."""

from __future__ import annotations

import subprocess
from itertools import groupby

import model
import torch
from launches import Workload
from measured import Measured, group_cases
from report import case_bytes
from results import CudaRow
from tables import markdown, number, spread, variant

PAGE = """# The loss on a GPU

`make bench-cuda` wrote this page, and the CSV file of the same name with every time. How it is
measured, and who the rivals are: `bench/CUDA.md`. *theirs / ours* is of medians; ± is half the
interquartile range of the ratios of single rounds; - was left out, see the end of the page.

{facts}

## From Python

What a call takes, with all that the host does: Python, autograd, launches.

{eager}

## Replays of a CUDA graph

The work of the GPU alone, for up to 64 MiB of logits.

{graph}

## Predictions

The model of `bench/CUDA.md` beside the measurement, of the graph where there is one. *binds*: what
the model takes for the bottleneck.

{predictions}

## Bytes

GB/s by the byte model of `bench/traffic.py`, of the graph where there is one. *attained* is ours
over the copy of the same logits (`clone`), which reads and writes each once.

{bytes}

## Left out

{left_out}
"""


def label(case: Measured) -> list[str]:
    return [str(case.shape), case.case.dtype, variant(case)]


def time_table(cases: list[Measured]) -> str:
    names = list(dict.fromkeys(row.rival for case in cases for row in case.rows))
    names.remove("ours")
    lines = []
    for case in cases:
        ours = case.find("ours")
        assert ours is not None
        cells = [spread(case, name) or "-" for name in names]
        lines.append([*label(case), number(ours.median_us), *cells])
    header = ["logits", "dtype", "", "ours, us", *(f"{name} / ours" for name in names)]
    return markdown(header, lines)


def gigabytes_per_second(case: Measured, rival: str) -> float | None:
    """GB/s by the byte model; None for a rival without one, or one that was left out."""
    row, moved = case.find(rival), case_bytes(case, rival)
    return moved / row.median_us / 1e3 if row and moved else None


def without_repeats(cases: list[Measured]) -> list[Measured]:
    """A graph, which comes later, replaces the call from Python."""
    return list({tuple(label(case)): case for case in cases}.values())


def as_workload(case: Measured) -> Workload | None:
    """For the model, which knows contiguous logits and int64 labels."""
    first = case.case
    if (first.layout, first.target_dtype) != ("contiguous", "int64"):
        return None
    upstream = None if first.direction == "inference" else 1.0
    return Workload(case.shape, getattr(torch, first.dtype), first.reduction, upstream)


def prediction_table(facts: dict[str, str], cases: list[Measured]) -> str:
    """One row per case; or why there is none: the model compiles the kernels and runs them on the
    CPU, and knows few GPUs."""
    lines = []
    try:
        gpu = model.find_gpu(facts.get("GPU", ""))
        for case in without_repeats(cases):
            ours, workload = case.find("ours"), as_workload(case)
            if ours is None or workload is None:
                continue
            expected = model.predict(workload, gpu)
            us = 1e6 * expected.seconds
            figures = [number(ours.median_us), number(us), number(ours.median_us / us)]
            lines.append([*label(case), case.case.section, *figures, expected.binds])
    except (LookupError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"There are none: {error}."
    header = ["logits", "dtype", "", "timed", "ours, us", "predicted, us", "ours / predicted"]
    return markdown([*header, "binds"], lines)


def byte_table(cases: list[Measured]) -> str:
    lines = []
    for case in without_repeats(cases):
        names = ("ours", "cross_entropy", "liger", "quack", "clone")
        ours, *others = (gigabytes_per_second(case, name) for name in names)
        share = f"{100 * ours / others[-1]:.0f} %" if ours and others[-1] else "-"
        lines.append(
            [
                *label(case),
                case.case.section,
                number(case_bytes(case, "ours") / 1e6),
                number(ours),
                share,
                *(number(value) or "-" for value in others),
            ]
        )
    header = ["logits", "dtype", "", "timed", "ours, MB", "ours, GB/s", "attained"]
    return markdown([*header, "cross_entropy", "liger", "quack", "clone"], lines)


def left_out_table(rows: list[CudaRow]) -> str:
    """Each rival that was not measured, with the reason and the cases."""

    def key(row: CudaRow) -> tuple[str, str, str]:
        return (row.section, row.rival, row.left_out)

    lines = []
    missing = sorted((row for row in rows if row.left_out), key=key)
    for (section, rival, reason), group in groupby(missing, key):
        cases = [" ".join(label(case)).strip() for case in group_cases(list(group))]
        total = len(group_cases([row for row in rows if row.section == section]))
        where = f"all {total} cases" if len(cases) == total else "; ".join(cases)
        lines.append([rival, section, reason.replace("|", "\\|"), where])
    return markdown(["rival", "timed", "why", "where"], lines) if lines else "Nobody."


def page(facts: dict[str, str], rows: list[CudaRow]) -> str:
    cases = group_cases([row for row in rows if not row.left_out])

    def times(section: str) -> str:
        chosen = [case for case in cases if case.case.section == section]
        return time_table(chosen) if chosen else "Nothing was measured."

    return PAGE.format(
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        eager=times("eager"),
        graph=times("graph"),
        predictions=prediction_table(facts, cases),
        bytes=byte_table(cases),
        left_out=left_out_table(rows),
    )

"""Our loss against its rivals on a GPU, in one run.

bench/CUDA.md describes the measurement. It needs only torch and oe_ext: rivals that are not
installed are left out, and named.

    python bench/cuda/speed.py                # writes cuda.csv and cuda.md in bench/results
    python bench/cuda/speed.py --out DIR      # writes them there
    python bench/cuda/speed.py --quick        # small shapes; prints
    python bench/cuda/speed.py --report-only  # the page again, from the CSV file
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before the report of this folder

import results
import torch
from cases import Case, cuda_cases, make_inputs, quick_cuda_cases
from events import CAPTURED, Device, gpu
from results import CudaRow, row_fields
from rivals import DisagreementError, Step
from speed_report import page
from speed_rivals import is_small, make_step, reason_against, reason_against_graph
from timing import Timing, take_turns

from oe_ext import _ext

NOT_MEASURED = Timing(math.nan, math.nan, math.nan)


def rows_of(
    case: Case, section: str, timings: dict[str, Timing], reasons: dict[str, str]
) -> list[CudaRow]:
    threads = torch.get_num_threads()
    return [
        CudaRow(
            section=section,
            threads=threads,
            rival=name,
            left_out=reasons.get(name, ""),
            **row_fields(case, timings.get(name, NOT_MEASURED)),
        )
        for name in case.rivals
        if name in timings or name in reasons
    ]


def why(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def measure(case: Case, device: Device, reasons: dict[str, str]) -> list[CudaRow]:
    """Checks the rivals of a case, then times them. ``reasons`` names those that are left out from
    the start. A rival that fails is left out; our own failure is raised."""
    inputs = make_inputs(case, device.name)
    steps: dict[str, Step] = {}
    with torch.set_grad_enabled(not case.inference):
        for name in case.rivals:
            if reason := reasons.get(name) or reason_against(case, name):
                reasons[name] = reason
                continue
            try:
                step = make_step(case, inputs, name)
                step()
                steps[name] = step
            except Exception as error:
                if name == "ours":
                    raise
                reasons[name] = why(error)
        rows = rows_of(case, "eager", take_turns(steps, "ours", case.budget, device.eager), reasons)
        if not is_small(case):
            return rows

        replays, reasons = {}, {}
        for name, step in steps.items():
            if reason := reason_against_graph(name, device.try_capture):
                reasons[name] = reason
                continue
            try:
                replays[name] = device.capture(step)
            except DisagreementError as error:
                if name == "ours":
                    raise
                reasons[name] = why(error)
        timings = take_turns(replays, "ours", case.budget, device.replayed)
        return rows + rows_of(case, "graph", timings, reasons)


def try_capture(case: Case, device: Device, name: str) -> str:
    try:
        device.capture(make_step(case, make_inputs(case, device.name), name))
    except Exception as error:
        return why(error)
    return CAPTURED


def run(cases: list[Case], device: Device, minutes: float, out: Path | None) -> str:
    """Measures while there is time; returns the page. The CSV file grows with every case, so an
    interrupted run keeps its results."""
    facts = results.provenance(torch.get_num_threads(), device.name)
    rows: list[CudaRow] = []
    start = time.monotonic()
    for index, case in enumerate(cases, start=1):
        used = (time.monotonic() - start) / (60 * minutes)
        print(f"{index} of {len(cases)}: {case}", file=sys.stderr, flush=True)
        if used >= 1:
            rows += rows_of(case, "eager", {}, dict.fromkeys(case.rivals, "the time was up"))
        else:
            # Compiling takes more time than all else, and gets the first two thirds of it.
            late = {"compiled": "the time for compiling was up"} if used >= 2 / 3 else {}
            rows += measure(case, device, late)
        torch.cuda.empty_cache()
        if out:
            results.write(out / "cuda.csv", facts, rows)
    text = page(facts, rows)
    if out:
        (out / "cuda.md").write_text(text)
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--out", type=Path, help="the folder of the results")
    parser.add_argument("--minutes", type=float, default=7, help="begin no case after so long")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument("--try-capture", metavar="RIVAL", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = args.out or (None if args.quick else results.FOLDER)
    if args.report_only:
        folder = args.out or results.FOLDER
        text = page(*results.read(folder / "cuda.csv", CudaRow))
        (folder / "cuda.md").write_text(text)
        return
    if not torch.cuda.is_available():
        sys.exit("bench/cuda/speed.py needs a GPU and a CUDA build of torch; there is none here")
    if not _ext.has_cuda_kernels():
        sys.exit("bench/cuda/speed.py needs oe_ext with CUDA kernels: build it with FORCE_CUDA=1")
    cases = quick_cuda_cases() if args.quick else cuda_cases()
    if args.try_capture:
        print(try_capture(cases[0], gpu(), args.try_capture))
        return
    print(run(cases, gpu(), args.minutes, out))


if __name__ == "__main__":
    main()

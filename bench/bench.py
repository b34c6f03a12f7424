"""Our loss against its rivals on this machine, in one run.

The rivals take turns, so other load on the machine slows all of them; medians are compared as
ratios. Before timing, every rival that computes the loss is compared with ours and with float64; a
difference ends the run.

    python bench/bench.py                  # all: minutes; rewrites results/, RESULTS.md, README
    python bench/bench.py --report-only    # the same pages, from the CSV files
    python bench/bench.py --quick          # small shapes; prints
    python bench/bench.py --only layouts   # a part; prints
    python bench/bench.py --dtype bfloat16 # the main table in another dtype; prints
    ATEN_CPU_CAPABILITY=avx2 python bench/bench.py --only goals --csv bench/results/cpu_avx2.csv
                                           # the main table with AVX2, of which RESULTS.md shows one
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import memory
import report
import results
import torch
import upsampled
from cases import GOALS, SECTIONS, Case, all_cases, goal_cases, make_inputs, quick_cases
from results import TimeRow, row_fields
from rivals import Step, check, make_losses, make_steps
from timing import take_turns
from tqdm import tqdm


def thread_counts(most: int) -> list[int]:
    """Powers of two, and the most."""
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def checked_steps(case: Case) -> dict[str, Step]:
    """Checks the rivals of a case."""
    inputs = make_inputs(case, "cpu")
    losses = make_losses(case, inputs)
    check(case, inputs, losses)
    return make_steps(case, inputs, losses)


def measure(case: Case, threads: int) -> list[TimeRow]:
    """Checks the rivals of a case, then times them."""

    def with_threads(count: int, step: Step) -> Callable[[], None]:
        def run():
            torch.set_num_threads(count)
            step()

        return run

    with torch.set_grad_enabled(not case.inference):
        named = checked_steps(case)
        if case.section == "upsampled forms":
            named |= {
                name: checked_steps(replace(case, **form))["ours"]
                for name, form in upsampled.FORMS.items()
            }
        steps = {(name, threads): step for name, step in named.items()}
        if case.section == "threads":
            steps = {
                (name, count): with_threads(count, step)
                for count in thread_counts(threads)
                for (name, _), step in steps.items()
            }
        timings = take_turns(steps, ("ours", threads), case.budget)
    torch.set_num_threads(threads)
    return [
        TimeRow(section=case.section, threads=count, rival=name, **row_fields(case, timing))
        for (name, count), timing in timings.items()
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="of the main table (float32), which is then all that is run",
    )
    parser.add_argument("--csv", type=Path, help="where to write the times of a run that prints")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.only and (args.quick or args.dtype):
        parser.error("--only goes with the whole suite")
    return args


def main() -> None:
    args = parse_args()
    if args.report_only:
        report.write_pages()
        return
    facts = results.provenance(args.threads)  # before the run changes any file
    dtype = getattr(torch, args.dtype or "float32")
    if args.quick:
        cases = quick_cases(dtype)
    elif args.dtype:
        cases = goal_cases(list(GOALS), dtype)
    else:
        wanted = args.only or SECTIONS
        suite = [*all_cases(), *upsampled.all_cases()]
        cases = [case for case in suite if case.section.split()[0] in wanted]
    is_whole = not (args.quick or args.only or args.dtype or args.csv)

    torch.set_num_threads(args.threads)
    rows = []
    for case in (progress := tqdm(cases)):
        progress.set_description(str(case))
        rows += measure(case, args.threads)
    if not is_whole:
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))
        print(f"\n{report.plain_table(rows)}")
        if args.csv:
            results.write(args.csv, facts, rows)
        return
    results.write(results.TIMES_CSV, facts, rows)
    for path in results.SECTION_CSVS.values():
        path.unlink(missing_ok=True)
    if memory.is_supported():
        results.write(results.MEMORY_CSV, facts, memory.measure(args.threads))
    report.write_pages()


if __name__ == "__main__":
    main()

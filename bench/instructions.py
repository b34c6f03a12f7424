"""Counts the instructions of small calls, and compares them with recorded counts.

Time on a shared machine is noise; the counts of ``valgrind --tool=callgrind`` are reproducible. One
forward and backward from Python is counted as a whole: the interpreter, the dispatcher, autograd
and the kernel, on one thread and with AVX2, since valgrind does not know AVX-512.

    python bench/instructions.py            # fails where a case takes 5 % more than recorded
    python bench/instructions.py --record   # rewrites bench/instructions.json
    python bench/instructions.py --slopes   # what one more logit, or one more pixel, takes, at each
                                            # level; fails where a loop is not made of vectors
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from oe_ext import collect_env, outlier_exposure_loss

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "instructions"
RECORD = ROOT / "bench" / "instructions.json"

CASES = {
    "384x10 float32": ((384, 10), torch.float32),
    "384x100 float32": ((384, 100), torch.float32),
    "32x1000 bfloat16": ((32, 1000), torch.bfloat16),
    "2x19x32x32 float32": ((2, 19, 32, 32), torch.float32),
}
LEVELS = ["avx2", "default"]
# Pairs of calls that differ only in size: the difference in instructions per additional logit (or
# position), and its limit at each level. A loop without vectors takes several times as many.
SLOPES = {
    "a logit of a long row": ((64, 2000), (64, 4000), 1, (6, 16)),
    "a logit of 150-class pixels": ((1, 150, 64, 64), (1, 150, 64, 128), 1, (8, 19)),
    "a logit of 19-class pixels": ((1, 19, 64, 64), (1, 19, 64, 128), 1, (10, 24)),
    "a 2-class pixel": ((8, 2, 64, 64), (8, 2, 64, 128), 2, (55, 125)),
    "a row of 10 classes": ((384, 10), (768, 10), 10, (170, 370)),
}
SLOPE_CASES = {str(shape): (shape, torch.float32) for pair in SLOPES.values() for shape in pair[:2]}
CALLS = 20
ALLOWED = 1.05

# valgrind's requests are macros: instructions without effect outside of valgrind.
REQUESTS = r"""
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; CALLGRIND_ZERO_STATS; }
void stop(const char* name) { CALLGRIND_DUMP_STATS_AT(name); CALLGRIND_STOP_INSTRUMENTATION; }
"""


Cases = dict[str, tuple[tuple[int, ...], torch.dtype]]


def count_here(cases: Cases) -> None:
    """Runs every case and dumps its counts, in the process under valgrind."""
    requests = ctypes.CDLL(str(BUILD / os.environ["ATEN_CPU_CAPABILITY"] / "requests.so"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    for name, (shape, dtype) in cases.items():
        logits = torch.randn(shape, dtype=dtype, requires_grad=True)
        target = torch.randint(-shape[1], shape[1], (shape[0], *shape[2:]))

        def run(calls: int, logits: torch.Tensor = logits, target: torch.Tensor = target) -> None:
            for _ in range(calls):
                torch.autograd.grad(outlier_exposure_loss(logits, target), logits)

        run(CALLS)
        requests.start()
        run(CALLS)
        requests.stop(name.encode())


def count(cases: Cases, here: str, level: str = "avx2") -> dict[str, int]:
    """The instructions of one call of each case, with the kernels of this level."""
    folder = BUILD / level
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = folder / "requests.c"
    source.write_text(REQUESTS)
    compiler = os.environ.get("CC", "cc")
    library = folder / "requests.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "-q"]
    command += [f"--callgrind-out-file={folder / 'counts'}", sys.executable, __file__, here]
    environment = os.environ | {"PYTHONHASHSEED": "0", "ATEN_CPU_CAPABILITY": level}
    subprocess.run(["setarch", "-R", *command], check=True, env=environment)
    counts = {}
    for dump in folder.glob("counts.*"):
        text = dump.read_text()
        trigger = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        if trigger:
            total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
            assert total is not None, dump
            counts[trigger[1]] = round(int(total[1]) / CALLS)
    missing = cases.keys() - counts.keys()
    if missing:
        raise RuntimeError(f"callgrind dumped no counts of {', '.join(sorted(missing))}")
    return counts


def environment() -> dict[str, str]:
    """The versions outside this project that the counts depend on."""
    return {
        "machine": platform.machine(),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "compiler": collect_env.collect().get("built with compiler", "unknown"),
    }


def compare(counts: dict[str, int], recorded: dict[str, int]) -> tuple[list[str], bool]:
    """A line for each case, and whether all are within their limits."""
    lines = []
    is_good = True
    for name, now in counts.items():
        before = recorded.get(name)
        if before is None:
            lines.append(f"{name:<20} {now:>10}  not recorded: run with --record")
            is_good = False
            continue
        ratio = now / before
        is_good &= ratio <= ALLOWED
        verdict = "TOO MANY" if ratio > ALLOWED else ""
        if ratio < 2 - ALLOWED:
            verdict = "fewer: worth recording anew"
        lines.append(f"{name:<20} {now:>10} {before:>10} {100 * (ratio - 1):>+7.1f} %  {verdict}")
    return lines, is_good


def slopes() -> tuple[list[str], bool]:
    """A table row for each pair, and whether all are within their limits."""
    with ThreadPoolExecutor(len(LEVELS)) as pool:
        run = functools.partial(count, SLOPE_CASES, "--slopes-here")
        counts = dict(zip(LEVELS, pool.map(run, LEVELS), strict=True))
    lines = [f"| one more | {' | '.join(LEVELS)} |", "| --- |" + " --- |" * len(LEVELS)]
    is_good = True
    for name, (small, large, divisor, limits) in SLOPES.items():
        cells = []
        for level, limit in zip(LEVELS, limits, strict=True):
            more = counts[level][str(large)] - counts[level][str(small)]
            instructions = more * divisor / (math.prod(large) - math.prod(small))
            is_good &= instructions <= limit
            verdict = "" if instructions <= limit else f", more than {limit}"
            cells.append(f"{instructions:.2f}{verdict}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines, is_good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="rewrite the recorded counts")
    parser.add_argument("--slopes", action="store_true", help="what more logits take, as a table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--slopes-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here or args.slopes_here:
        count_here(CASES if args.here else SLOPE_CASES)
        return 0
    if args.slopes:
        lines, is_good = slopes()
        print("\n".join(lines))
        return 0 if is_good else 1
    now = environment()
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if not args.record and recorded.get("environment") != now:
        print(f"not compared: recorded in {recorded.get('environment')}, this is {now}")
        return 0
    counts = count(CASES, "--here")
    if args.record:
        RECORD.write_text(json.dumps({"environment": now, "counts": counts}, indent=2) + "\n")
    lines, is_good = compare(counts, json.loads(RECORD.read_text())["counts"])
    print(f"{'instructions a call':<20} {'now':>10} {'recorded':>10}")
    print("\n".join(lines))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Deliberately wrong CUDA kernels and launchers: each must fail a check that the real ones pass.

The report names the check that killed each; it is printed at the end of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import simt_cases
import simt_device
import simt_runs
import torch
from mutants import MUTANTS_OF_WORK, Mutant
from mutants_of_launch import MUTANTS_OF_LAUNCH
from mutants_of_meaning import MUTANTS_OF_MEANING
from mutants_of_upsampled import MUTANTS_OF_UPSAMPLED
from paths import ROOT

pytestmark = pytest.mark.mutants

MUTANTS = MUTANTS_OF_WORK + MUTANTS_OF_LAUNCH + MUTANTS_OF_MEANING + MUTANTS_OF_UPSAMPLED

SEEDS = (1, 2, 3)
# The wrong copies are compiled for two dtypes of the kernels that they belong to: every way is in
# both.
TWO_DTYPES = (torch.float32, torch.bfloat16)


def is_upsampled(mutant: Mutant) -> bool:
    return mutant in MUTANTS_OF_UPSAMPLED


def build(mutant: Mutant, folder: Path, upsampled: bool) -> Path:
    """The library of a tree with one bug more."""
    for part in ("csrc", "tests/simt"):
        shutil.copytree(ROOT / part, folder / part)
    mutant.plant(folder)
    made = folder / "kernels.so"
    kernels = "UPSAMPLED" if upsampled else "ROWS"
    flags = ["-O1", f"-DOE_EXT_SIMT_{kernels}", *simt_device.KERNEL_FLAGS]
    simt_device.compile_kernels(folder, made, flags)
    return made


@pytest.fixture(scope="module")
def fates() -> list[str]:
    """How each mutant died, so far."""
    return []


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Iterator[dict[str, Future[Path]]]:
    """They are compiled while the first ones already run."""
    simt_device.load()
    folders = [tmp_path_factory.mktemp("mutant") for _ in MUTANTS]
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(build, mutant, folder, is_upsampled(mutant))
            for mutant, folder in zip(MUTANTS, folders, strict=True)
        ]
        yield {mutant.name: future for mutant, future in zip(MUTANTS, futures, strict=True)}
        pool.shutdown(cancel_futures=True)


def killer(library: Path, upsampled: bool) -> str | None:
    """What kills it: the check, what it said, and in which case."""
    numbers = [
        number
        for number, case in enumerate(simt_cases.CASES)
        if case.dtype in TWO_DTYPES and (case.size is not None) == upsampled
    ]
    simt_device.use_kernels(library)
    try:
        for seed in SEEDS:
            for number in numbers:
                try:
                    simt_runs.run(number, seed)
                except simt_runs.CheckError as error:
                    return f"{error}  [{simt_cases.CASES[number]}, seed {seed}]"
    finally:
        simt_device.use_kernels(simt_device.FOLDER / "kernels.so")
    return None


def test_there_are_enough():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_dies(mutant, libraries, fates, record_property):
    killed_by = killer(libraries[mutant.name].result(), is_upsampled(mutant))
    record_property("mutant", f"{mutant.name}: {killed_by or 'SURVIVED'}")
    assert killed_by is not None
    fates.append(killed_by)


# The harness's own checks, by a word of what each says.
FINDINGS = [
    "shared-memory race", "global-memory race", "uninitialised", "misaligned", "own mask",
    "exited", "deadlock", "out of bounds: a read of global",
    "out of bounds: a write to global", "out of bounds: dynamic shared", "host access",
    "launch bounds",
]  # fmt: skip
CHECKS = ["value", "gradient", "passes", "width", "sectors"]


def test_every_check_kills_one(fates):
    """Runs last: a check that kills nothing would prove nothing."""
    for word in (*FINDINGS, *(f"{check}:" for check in CHECKS)):
        assert any(word in fate for fate in fates), f"no mutant dies of: {word}"


@pytest.mark.parametrize("upsampled", [False, True])
def test_the_real_kernels_compiled_in_the_same_way_live(tmp_path, upsampled):
    """What kills the mutants is the bug, not how they are made."""
    text = "namespace oe_ext::cuda {\n\n"
    nothing = Mutant("none", "csrc/cuda/device.cuh", text, text)
    assert killer(build(nothing, tmp_path / "tree", upsampled), upsampled) is None

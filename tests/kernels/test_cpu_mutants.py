"""Deliberately wrong CPU kernels: a test of values must fail with each.

One file of the library is compiled again, in the instruction set that every processor has, and
linked with what ``make build`` has left of the others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mutants import Mutant
from paths import ROOT

import oe_ext
from oe_ext import _build

pytestmark = pytest.mark.mutants

BANDS = "csrc/cpu/upsampled_bands.h"
DOMINANT = "test_classes_that_dominate_one_corner_each"

# With the test that must fail.
MUTANTS = {
    Mutant(
        "no guard against small sums",
        BANDS,
        "rows.sum_exp[i] >= kMinSum<acc_t>;",
        "rows.sum_exp[i] >= acc_t(0);",
    ): DOMINANT,
    Mutant(
        "the guard does not look at pixels that do not count",
        BANDS,
        "num_unsafe += !(active ? large : number);",
        "num_unsafe += !(active ? large : true);",
    ): "test_ignored_pixels_hide_nan",
}


def compiler(*arguments: str | Path) -> None:
    subprocess.run([os.environ.get("CXX", "g++"), *arguments], check=True)


def run_test(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Runs a test of tests/ops/test_upsampled.py on the CPU, with the package in ``folder``."""
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml"]
    command += ["-k", f"{name} and not simt", ROOT / "tests" / "ops" / "test_upsampled.py"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(folder)}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def build(mutant: Mutant, folder: Path) -> None:
    """Leaves a package with one bug more in ``folder``."""
    objects = ROOT / "build" / f"temp-torch-{torch.__version__}" / "csrc"
    others = [path for path in objects.rglob("*.o") if path.name != "kernels_default.o"]
    assert others, f"no objects in {objects}: make build leaves them"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    mutant.plant(folder)
    shutil.copytree(ROOT / "oe_ext", folder / "oe_ext", ignore=shutil.ignore_patterns("*.so"))
    torch_folder = Path(torch.__file__).parent
    made = folder / "kernels_default.o"
    source = folder / "csrc" / "cpu" / "kernels_default.cpp"
    include = ["-isystem", torch_folder / "include"]
    compiler(*_build.CXX_FLAGS, "-O1", "-fPIC", *include, "-c", source, "-o", made)
    libraries = ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    library = folder / "oe_ext" / Path(oe_ext._C.__file__).name
    compiler("-shared", *others, made, f"-L{torch_folder / 'lib'}", *libraries, "-o", library)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_dies(mutant, tmp_path, record_property):
    build(mutant, tmp_path)
    result = run_test(tmp_path, MUTANTS[mutant])
    record_property("mutant", f"{mutant.name}: {result.stdout.splitlines()[-1]}")
    assert result.returncode == 1, result.stdout + result.stderr
    assert " failed" in result.stdout


def test_the_real_kernels_built_in_the_same_way_live(tmp_path):
    text = "namespace oe_ext::cpu {\nnamespace {\n"
    build(Mutant("none", BANDS, text, text), tmp_path)
    for name in MUTANTS.values():
        result = run_test(tmp_path, name)
        assert result.returncode == 0, result.stdout + result.stderr

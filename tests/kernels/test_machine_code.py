"""What nvcc and ptxas make of the kernels; needs the CUDA toolkit, and no GPU."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench" / "cuda"))
import machine_code
import sass
from faults import budget, faults

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.skipif(
        machine_code.find_nvcc() is None or machine_code.find_cuobjdump() is None,
        reason="needs nvcc, and cuobjdump from oe_ext[cuda-tools]",
    ),
]
DTYPES = {"double", "float", "half", "bfloat16"}


@pytest.fixture(scope="module", autouse=True)
def compiled_for_every_architecture():
    machine_code.inspect_all()  # two at a time, and kept


@pytest.mark.parametrize("architecture", machine_code.ARCHITECTURES)
def test_launchable_no_spills_wide_loads_and_few_instructions(architecture):
    kernels = machine_code.inspect(architecture)
    assert faults(kernels) == []
    for name in ("forward_rows", "backward_rows", "forward_pixels", "backward_pixels"):
        for wide in (False, True):
            found = {k.dtype for k in kernels if k.name == name and (k.width > 1) == wide}
            assert found == DTYPES, f"{name}, wide: {wide}"
    for name in ("forward_upsampled", "backward_upsampled"):
        assert {k.dtype for k in kernels if k.name == name and k.width == 2} == DTYPES
        assert {k.dtype for k in kernels if k.name == name and k.width == 4} == DTYPES - {"double"}
    for name in ("count_rows", "write_loss", "add_bands"):
        assert {k.dtype for k in kernels if k.name == name} == {"double", "float"}


def test_faults_of_upsampled_logits_are_found():
    kernels = machine_code.inspect("80")
    kernel = next(k for k in kernels if k.name == "forward_upsampled" and k.patch)
    assert faults([kernel]) == []

    def with_more(kind: str, **more: int) -> sass.PatchCode:
        loops = getattr(kernel.patch, kind)
        changed = {name: getattr(loops, name) + count for name, count in more.items()}
        return dataclasses.replace(kernel.patch, **{kind: dataclasses.replace(loops, **changed)})

    for patch, fault in [
        (None, "no loops over the classes"),
        (with_more("kept", sum=40), "exponentials kept: "),
        (with_more("kept", label=1), "exponentials kept: "),
        (with_more("again", gradient=100), "exponentials again: "),
        (with_more("again", label=100), "exponentials again: "),
    ]:
        (found,) = faults([dataclasses.replace(kernel, patch=patch)])
        assert fault in found


def test_spills_are_found():
    """The instrument itself: with too few registers ptxas must spill."""
    flags = ("-maxrregcount=32", "-Xptxas=-override-directive-values")  # launch bounds are some
    assert any("spilled" in fault for fault in faults(machine_code.inspect("80", *flags)))


def test_faults_are_found():
    """The instrument itself, on a kernel that has none."""
    kernels = machine_code.inspect("80")
    kernel = next(k for k in kernels if k.is_forward and k.width > 1 and k.registers > 64)
    assert faults([kernel]) == []
    occupancy = machine_code.occupancy("80", 1024, kernel.registers, kernel.shared)
    load = kernel.loops["load"][0]
    more = load.instructions + int(budget(kernel)) * load.elements
    for changes, fault in [
        ({"max_threads": 1024, "occupancy": occupancy}, "cannot be launched with 1024 threads of"),
        ({"max_threads": 0}, "no launch bounds"),
        ({"loops": {**kernel.loops, "sum": []}}, "0 loops that sum"),
        ({"loops": {**kernel.loops, "load": [load, load]}}, "2 loops that load"),
        (
            {"loops": {**kernel.loops, "load": [dataclasses.replace(load, is_wide=False)]}},
            "the loop that loads does not move 128 bits at once",
        ),
        (
            {"loops": {**kernel.loops, "load": [dataclasses.replace(load, instructions=more)]}},
            "instructions an element, of",
        ),
    ]:
        (found,) = faults([dataclasses.replace(kernel, **changes)])
        assert fault in found

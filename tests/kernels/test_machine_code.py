"""What nvcc and ptxas make of the kernels; needs the CUDA toolkit, and no GPU."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench" / "cuda"))
import machine_code

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.skipif(
        machine_code.find_nvcc() is None or machine_code.find_cuobjdump() is None,
        reason="needs nvcc, and cuobjdump from oe_ext[cuda-tools]",
    ),
]
DTYPES = {"double", "float", "half", "bfloat16"}


@pytest.mark.parametrize("architecture", machine_code.ARCHITECTURES)
def test_launchable_no_spills_and_wide_loads(architecture):
    kernels = machine_code.inspect(architecture)
    assert machine_code.faults(kernels) == []
    for name in ("forward_rows", "backward_rows", "forward_pixels", "backward_pixels"):
        for wide in (False, True):
            found = {k.dtype for k in kernels if k.name == name and (k.width > 1) == wide}
            assert found == DTYPES, f"{name}, wide: {wide}"
    for name in ("count_rows", "write_loss"):
        assert {k.dtype for k in kernels if k.name == name} == {"double", "float"}


def test_faults_are_found():
    """The instrument itself: with too few registers ptxas must spill."""
    flags = ("-maxrregcount=32", "-Xptxas=-override-directive-values")  # launch bounds are some
    kernels = machine_code.inspect("80", *flags)
    assert any("spilled" in fault for fault in machine_code.faults(kernels))
    some = machine_code.inspect("80")
    too_many = next(k for k in some if k.registers > 64)
    occupancy = machine_code.occupancy("80", 1024, too_many.registers, too_many.shared)
    for changes, fault in [
        ({"max_threads": 1024, "occupancy": occupancy}, "cannot be launched with 1024 threads of"),
        ({"max_threads": 0}, "no launch bounds"),
    ]:
        broken = dataclasses.replace(too_many, **changes)
        assert fault in machine_code.faults([broken])[0]
    wide = next(k for k in some if k.width > 1)
    narrow = dataclasses.replace(wide, loop_wide_loads=0)
    assert "no 128-bit loads" in machine_code.faults([narrow])[0]

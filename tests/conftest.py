"""Shared by all tests: the devices that a test runs on, and a fixed seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import simt_device
import torch
from hypothesis import settings
from inductor import keep_caches_apart

keep_caches_apart()

# The total number of examples of test_properties.py and similar tests.
settings.register_profile("test", max_examples=1000, derandomize=True, database=None, deadline=None)
settings.register_profile("fuzz", max_examples=20_000, deadline=None, print_blob=True)
settings.load_profile("test")

DEVICES = ["cpu", "simt"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        no_simt = metafunc.definition.get_closest_marker("no_simt") is not None
        devices = [name for name in DEVICES if not (no_simt and name == "simt")]
        metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a test's tensors. "simt" runs the CUDA kernels on CPU tensors."""
    if request.param == "simt":
        with simt_device.active():
            yield "cpu"
    else:
        yield request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _reported(terminalreporter: pytest.TerminalReporter, name: str) -> list[str]:
    """The records of tests under a name."""
    return [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for key, value in report.user_properties
        if key == name
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The coverage of the CUDA kernels, and which test caught each deliberate bug."""
    for line in _reported(terminalreporter, "coverage"):
        terminalreporter.write_line(line)
    fates = _reported(terminalreporter, "mutant")
    if fates:
        killed = sum("SURVIVED" not in fate for fate in fates)
        terminalreporter.section(f"mutants of the kernels: {killed} of {len(fates)} killed")
        for fate in fates:
            terminalreporter.write_line(fate)

"""The limits of the check of instruction counts."""

from __future__ import annotations

import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import instructions


@pytest.mark.parametrize(
    ("now", "is_good", "word"),
    [(1000, True, ""), (1040, True, ""), (1060, False, "TOO MANY"), (900, True, "fewer")],
)
def test_five_percent_are_allowed(now, is_good, word):
    lines, verdict = instructions.compare({"a": 1000, "b": now}, {"a": 1000, "b": 1000})
    assert verdict is is_good
    assert word in lines[1]


def test_a_case_that_was_never_recorded_fails():
    lines, verdict = instructions.compare({"a": 1000}, {})
    assert not verdict
    assert "--record" in lines[0]


def test_counts_are_recorded_for_every_case():
    assert instructions.RECORD.exists()
    recorded = instructions.json.loads(instructions.RECORD.read_text())
    assert recorded["counts"].keys() == instructions.CASES.keys()
    assert recorded["environment"].keys() == instructions.environment().keys()

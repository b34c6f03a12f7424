"""The CPU benchmark of upsampled logits: its cases, its checks, its way from a run to the page."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import optional
import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import measured
import report
import results
import rivals
import tables
import upsampled
from cases import SECTIONS, Case, all_cases, make_inputs, memory_cases
from results import MemoryRow, TimeRow, row_fields
from timing import Timing

TINY = Case("upsampled", (1, 3, 4, 5), upsampled.RIVALS, size=(17, 15), budget=0.01)


@pytest.fixture
def measure():
    """On one thread: in bursts of tiny calls, several would wait for a busy processor."""
    optional.require("tqdm")
    optional.pytorch_ood_class()
    import bench

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench.measure
    torch.set_num_threads(threads)


def rows_of(case: Case, ratios: dict[str, float]) -> list[TimeRow]:
    return [
        TimeRow(section=case.section, threads=2, rival=name, **fields)
        for name, ratio in ratios.items()
        for fields in [row_fields(case, Timing(2e-3 * ratio, ratio, 0.5))]
    ]


def test_every_case_belongs_to_a_section_and_is_told_from_its_neighbours():
    suite = [*all_cases(), *upsampled.all_cases()]
    assert {case.section.split()[0] for case in suite} == set(SECTIONS)
    rows = [row for case in suite for row in rows_of(case, {"ours": 1.0})]
    assert len(measured.group_cases(rows)) == len(suite)


def test_every_goal_has_a_case_of_both_kinds_of_labels():
    cases = [case for case in upsampled.all_cases() if case.section == "upsampled"]
    found = [(case.shape, case.size, case.labels) for case in cases]
    goals = [(*goal, labels) for goal in upsampled.GOALS for labels in ("random", "blocks")]
    assert sorted(found) == sorted(goals)
    assert {case.size for case in cases if case.align_corners} == {(513, 513)}
    assert upsampled.FORMS.keys() == upsampled.FORM_GOALS.keys()


def test_labels():
    for labels in ("random", "blocks"):
        case = Case("upsampled", (2, 19, 9, 10), (), size=(65, 80), labels=labels)
        inputs = make_inputs(case, "cpu")
        assert inputs.target.shape == (2, 65, 80)
        assert inputs.target.is_contiguous()
        assert inputs.target.max() < 19
        assert 0.4 < (inputs.target < 0).double().mean() < 0.6
        is_equal = (inputs.target.diff(dim=1) == 0).double().mean()
        assert is_equal > 0.9 if labels == "blocks" else is_equal < 0.1


@pytest.mark.parametrize("align_corners", [False, True])
def test_a_run(measure, tmp_path, align_corners):
    case = replace(TINY, align_corners=align_corners, labels="blocks")
    path = tmp_path / "rows.csv"
    results.write(path, {"commit": "abc"}, measure(case, 1))
    (group,) = measured.group_cases(results.read(path, TimeRow)[1])
    assert (group.shape, group.size) == (case.shape, case.size)
    assert {row.rival for row in group.rows} == set(upsampled.RIVALS)
    assert all(row.median_us > 0 for row in group.rows)
    corners = ", align_corners" if align_corners else ""
    assert tables.variant(group) == f"to (17, 15){corners} blocks"


def test_a_run_of_the_forms(measure):
    case = replace(TINY, section="upsampled forms", rivals=("ours",))
    rows = measure(case, 1)
    assert {row.rival for row in rows} == {"ours", *upsampled.FORMS}


@pytest.mark.parametrize("name", ["ours", "pytorch-ood", "unfused"])
def test_a_rival_that_is_wrong_ends_the_run(name):
    optional.pytorch_ood_class()
    inputs = make_inputs(TINY, "cpu")
    losses = rivals.make_losses(TINY, inputs)
    rivals.check(TINY, inputs, losses)
    right = losses[name]
    for wrong, what in (
        (lambda: right() * 1.001, "loss"),
        (lambda: right() + 1e-3 * (inputs.logits - inputs.logits.detach()).sum(), "gradient"),
    ):
        with pytest.raises(rivals.DisagreementError, match=f"the {what} of {name} differs"):
            rivals.check(TINY, inputs, losses | {name: wrong})


def test_interpolation_alone_has_the_gradient_of_a_sum():
    optional.pytorch_ood_class()
    inputs = make_inputs(TINY, "cpu")
    losses = rivals.make_losses(TINY, inputs)
    full = losses["interpolate"]()
    assert full.shape == (1, 3, 17, 15)
    (expected,) = torch.autograd.grad(full.sum(), inputs.logits)
    assert torch.equal(rivals.make_steps(TINY, inputs, losses)["interpolate"](), expected)


def test_the_tables():
    case = Case("upsampled", (8, 2, 64, 64), upsampled.RIVALS, size=(256, 256), labels="blocks")
    ratios = dict(zip(upsampled.RIVALS, (1.0, 25.0, 7.9, 5.1, 3.0), strict=True))
    lines = upsampled.goal_table(measured.group_cases(rows_of(case, ratios))).splitlines()
    assert lines[2] == (
        "| (8, 2, 64, 64) | (256, 256) | blocks | **25.0 ±0.25** (25) | 7.90 ±0.25 (8) "
        "| **5.10 ±0.25** (5) | 3.00 ±0.25 (4) | 2.00 |"
    )
    assert lines[-1] == "2 of 4 goals reached."

    ratios = {"ours": 1.0, "bfloat16": 1.3, "float16": 1.31, "channels_last": 2.0}
    lines = upsampled.forms_table(measured.group_cases(rows_of(case, ratios))).splitlines()
    assert lines[2].endswith("| **1.30 ±0.25** (1.3) | 1.31 ±0.25 (1.3) | 2.00 ±0.25 |")
    assert lines[-1] == "1 of 2 goals reached."

    rows = [
        MemoryRow("1x19x128x128", "ours", 100, 150, 1.5, "1024x1024"),
        MemoryRow("1x19x128x128", "unfused", 100, 13000, 130.0, "1024x1024"),
    ]
    assert report.memory_table(rows).splitlines()[2] == (
        "| (1, 19, 128, 128) to (1024, 1024) | 1.50 | 130.00 |"
    )


def test_a_section_that_is_newer_replaces_that_of_the_whole(tmp_path, monkeypatch):
    """The recorded times with upsampled logits, and newer ones of those. Both are invented."""
    optional.require("matplotlib")
    import plots

    def upsampled_rows(ratio: float) -> list[TimeRow]:
        ratios = {"ours": 1.0, "pytorch-ood": ratio, "unfused": 9.0}
        return [row for case in upsampled.all_cases() for row in rows_of(case, ratios)]

    facts, rows = results.read(results.TIMES_CSV, TimeRow)
    rows = [row for row in rows if not row.section.startswith("upsampled")]
    results.write(tmp_path / "whole.csv", facts, rows + upsampled_rows(66.6))
    newer = {"CPU": "a processor", "CPU kernels": "AVX2", "commit": "abc", "command": "a command"}
    results.write(tmp_path / "newer.csv", newer, upsampled_rows(77.7))
    names = set(re.findall("<!-- end (.*) -->", report.PAGE.read_text()))
    names |= {"upsampled", "upsampled forms", "upsampled memory"}
    (tmp_path / "page.md").write_text("".join(f"<!-- {n} -->\n<!-- end {n} -->\n" for n in names))
    (tmp_path / "README.md").write_text("")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "TIMES_CSV", tmp_path / "whole.csv")
    monkeypatch.setattr(report, "SECTION_CSVS", {"upsampled": tmp_path / "newer.csv"})
    monkeypatch.setattr(plots, "FOLDER", tmp_path)

    report.write_pages()
    page = report.PAGE.read_text()
    assert page.count("77.7 ±0.25") == 2 * len(upsampled.GOALS)
    assert "66.6 ±" not in page
    assert "\n`a command`, a processor, AVX2 kernels, commit abc.\n" in page
    assert (tmp_path / "upsampled.png").exists()


def test_memory_of_upsampled_logits():
    optional.require("tqdm")
    optional.pytorch_ood_class()
    import memory

    if not memory.is_supported():
        pytest.skip("this system does not report the peak of memory")
    (case,) = (case for case in memory_cases() if case.size)
    rises = {name: memory.peak_rise(replace(case, rivals=(name,))) for name in case.rivals}
    assert rises["ours"] < 19 * 1024 * 1024 * 4 < rises["unfused"]

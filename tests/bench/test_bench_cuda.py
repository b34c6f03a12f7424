"""The GPU benchmark: everything runs here, except events, graphs and the cache flush."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import optional
import pytest
import torch
import torch.nn.functional as F
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench" / "cuda"))
sys.path.insert(0, str(ROOT / "bench"))
import events
import model
import results
import speed
import speed_report
import speed_rivals
import traffic
from cases import CUDA_RIVALS, GOALS, Case, cuda_cases, make_inputs
from launches import Workload
from results import CudaRow, row_fields
from timing import Timing

# Compiling would take longer than everything else here.
RIVALS = tuple(name for name in CUDA_RIVALS if name != "compiled")
TINY = Case("cuda", (64, 10), RIVALS, budget=0.02)


@pytest.fixture(autouse=True)
def _one_thread():
    """In bursts of tiny calls, several threads would wait for a busy processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def row(rival: str, us: float, case: Case = TINY, section: str = "eager") -> CudaRow:
    fields = row_fields(case, Timing(us / 1e6, us / 10, 0.5))
    return CudaRow(section=section, threads=1, rival=rival, **fields)


def left_out(rival: str, reason: str, case: Case = TINY, section: str = "eager") -> CudaRow:
    return replace(row(rival, math.nan, case, section), left_out=reason)


@pytest.mark.parametrize(
    ("expected", "rival", "shape", "dtype", "target_dtype", "reduction", "inference"),
    [
        # 2 * 1000 logits * 4 bytes, and 10 labels of 8
        (8_080, "ours", (10, 100), "float32", "int64", "mean", False),
        (4_080, "ours", (10, 100), "bfloat16", "int64", "group_mean", False),
        # a third pass
        (6_080, "ours", (10, 100), "float16", "int64", "mean", False),
        (12_080, "ours", (10, 100), "float32", "int64", "none", False),
        # one pass, and 2 * 4 * 5 labels of one byte
        (2_440, "ours", (2, 15, 4, 5), "float32", "uint8", "mean", True),
        # the others take int64 labels
        (3 * 2400 + 320, "quack", (2, 15, 4, 5), "float32", "uint8", "mean", False),
        (6 * 2000 + 80, "cross_entropy", (10, 100), "bfloat16", "int64", "mean", False),
        (2 * 2000 + 80, "liger", (10, 100), "bfloat16", "int64", "mean", False),
        (8_000, "clone", (10, 100), "float32", "int64", "none", False),
        (0, "compiled", (10, 100), "float32", "int64", "mean", False),
    ],
)
def test_bytes(expected, rival, shape, dtype, target_dtype, reduction, inference):
    assert expected == traffic.model_bytes(rival, shape, dtype, target_dtype, reduction, inference)


def test_who_is_left_out():
    large = replace(TINY, shape=(8192, 32000), dtype=torch.bfloat16)
    pixels = replace(TINY, shape=(2, 19, 8, 8), target_dtype=torch.uint8, reduction="none")

    def reasons(case: Case) -> dict[str, str]:
        found = {name: speed_rivals.reason_against(case, name) for name in CUDA_RIVALS}
        return {name: reason for name, reason in found.items() if reason}

    assert reasons(TINY) == {}
    assert reasons(large) == {"pytorch-ood": "float32 only"}
    assert reasons(pixels).keys() == {"pytorch-ood", "compiled", "liger", "quack"}
    assert "float16" in reasons(replace(TINY, dtype=torch.float16))["compiled"]
    # At most 64 MiB are captured.
    assert speed_rivals.is_small(replace(TINY, shape=(16384, 1024)))
    assert not speed_rivals.is_small(replace(TINY, shape=(16384, 1025)))
    assert speed_rivals.is_small(replace(TINY, shape=(16384, 1025), dtype=torch.float16))


def test_the_cases_are_the_goals_and_more():
    cases = cuda_cases()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert {case.shape for case in cases if case.dtype == dtype} > set(GOALS)
    assert len(set(map(str, cases[:30]))) == 30
    # The memory of one check in float64: up to six times the logits.
    assert max(6 * 8 * math.prod(case.shape) for case in cases) < 20e9


def test_a_rehearsal(tmp_path, monkeypatch):
    """Pixels and rows, with stand-ins for the kernels of Liger and quack."""
    optional.pytorch_ood_class()

    def wrong(logits, classes):
        return 1.1 * F.cross_entropy(logits, classes)

    loaders = {"liger": lambda: F.cross_entropy, "quack": lambda: wrong}
    monkeypatch.setattr(speed_rivals, "CROSS_ENTROPIES", loaders)
    cases = [TINY, replace(TINY, shape=(2, 5, 4, 4), inference=True)]
    page = speed.run(cases, events.rehearsal(), 1, tmp_path)

    facts, rows = results.read(tmp_path / "cuda.csv", CudaRow)
    assert page == (tmp_path / "cuda.md").read_text() == speed_report.page(facts, rows)
    assert facts["torch"] == torch.__version__
    assert "GPU" not in facts

    def measured(section: str, shape: str) -> set[str]:
        found = [row for row in rows if (row.section, row.shape) == (section, shape)]
        assert all(0 < row.median_us < 1e6 for row in found if not row.left_out)
        return {row.rival for row in found if not row.left_out}

    always = {"ours", "cross_entropy", "clone"}
    assert measured("eager", "64x10") == always | {"pytorch-ood", "liger"}
    assert measured("graph", "64x10") == always
    assert measured("eager", "2x5x4x4") == always | {"pytorch-ood"}
    reasons = {(row.section, row.rival, row.shape): row.left_out for row in rows}
    assert "differs from F.cross_entropy by 0.1" in reasons["eager", "quack", "64x10"]
    assert "(N, C)" in reasons["eager", "quack", "2x5x4x4"]
    assert "Tensor.item()" in reasons["graph", "liger", "64x10"]
    assert all(row.ratio == 1 for row in rows if row.rival == "ours")


def test_a_rival_that_is_missing_or_fails_is_left_out_by_name(monkeypatch):
    def load_missing():
        raise ModuleNotFoundError("No module named 'nobody'")

    def fails(logits, classes):
        raise RuntimeError("first line\nsecond line")

    loaders = {"liger": load_missing, "quack": lambda: fails}
    monkeypatch.setattr(speed_rivals, "CROSS_ENTROPIES", loaders)
    rows = speed.measure(TINY, events.rehearsal(), {})
    reasons = {row.rival: row.left_out for row in rows if row.section == "eager"}
    assert reasons["liger"] == "ModuleNotFoundError: No module named 'nobody'"
    assert reasons["quack"] == "RuntimeError: first line"


def test_that_we_fail_is_an_error(monkeypatch):
    def fails(*_):
        raise RuntimeError("ours failed")

    monkeypatch.setattr(speed, "make_step", fails)
    with pytest.raises(RuntimeError, match="ours failed"):
        speed.measure(TINY, events.rehearsal(), {})


def test_when_the_time_is_up_nothing_is_measured():
    page = speed.run([TINY], events.rehearsal(), 1e-9, None)
    assert page.count("Nothing was measured.") == 2
    assert "| ours | eager | the time was up | all 1 cases |" in page


def test_a_trial_of_a_capture(monkeypatch):
    """The output of the separate process, and its evaluation."""
    assert speed.try_capture(TINY, events.rehearsal(), "ours") == events.CAPTURED
    assert speed.try_capture(TINY, events.rehearsal(), "nobody") == "KeyError: 'nobody'"

    def verdict(returncode: int, stdout: str) -> str:
        done = subprocess.CompletedProcess([], returncode, stdout)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
        return events.try_capture.__wrapped__("quack")

    assert verdict(0, "a greeting\ncaptured\n") == ""
    assert verdict(0, "a greeting\nRuntimeError: no\n") == "RuntimeError: no"
    assert verdict(-11, "") == "exit status -11"
    for name, tried in {
        "ours": "",
        "quack": "quack was tried",
        "compiled": "compiled was tried",
    }.items():
        assert speed_rivals.reason_against_graph(name, lambda name: f"{name} was tried") == tried


def test_each_rival_has_its_own_logits():
    """A kernel that overwrites its logits does not affect the others."""
    inputs = make_inputs(TINY, "cpu")
    before = inputs.logits.detach().clone()

    def in_place(logits, classes):
        loss = F.cross_entropy(logits, classes)
        logits.data.zero_()
        return loss

    step = speed_rivals.cross_entropy_step(TINY, inputs, in_place)
    assert step().shape == TINY.shape
    assert torch.equal(inputs.logits, before)


def test_rows_survive_the_csv_file(tmp_path):
    rows = [row("ours", 12.5), left_out("quack", 'Error: "a", b | # c')]
    results.write(tmp_path / "rows.csv", {"GPU": "none: a test", "commit": "abc"}, rows)
    facts, again = results.read(tmp_path / "rows.csv", CudaRow)
    assert facts == {"GPU": "none: a test", "commit": "abc"}
    assert again[0] == rows[0]
    assert again[1].left_out == rows[1].left_out
    assert math.isnan(again[1].median_us)


def test_the_tables():
    large = replace(TINY, shape=(1000, 1000), reduction="none")
    rows = [
        *(row("ours", 10), row("quack", 15), row("clone", 4), left_out("liger", "missing")),
        *(row("ours", 5, section="graph"), row("clone", 2, section="graph")),
        *(row("ours", 20, large), row("clone", 10, large), left_out("liger", "missing", large)),
        left_out("quack", "the | mean", large),
    ]
    page = speed_report.page({"GPU": "a GPU"}, rows)
    lines = page.splitlines()
    assert "- GPU: a GPU" in lines
    assert "| logits | dtype |  | ours, us | quack / ours | clone / ours |" in lines
    # row() makes a ratio of a tenth of the microseconds, with an interquartile range of 0.5
    assert "| (64, 10) | float32 |  | 10.0 | 1.50 ±0.25 | 0.40 ±0.25 |" in lines
    assert "| (64, 10) | float32 |  | 5.00 | 0.20 ±0.25 |" in lines
    assert "| (1000, 1000) | float32 | none | 20.0 | - | 1.00 ±0.25 |" in lines
    # 2 * 2560 + 512 bytes in 5 us, of a copy of 5120 bytes in 2 us
    assert "| (64, 10) | float32 |  | graph | 0.01 | 1.13 | 44 % | - | - | - | 2.56 |" in lines
    # 3 * 4e6 + 8e3 bytes in 20 us, of 8e6 in 10 us: 600.4 of 800 GB/s
    assert (
        "| (1000, 1000) | float32 | none | eager | 12.0 | 600 | 75 % | - | - | - | 800 |" in lines
    )
    assert "| liger | eager | missing | all 2 cases |" in lines
    assert "| quack | eager | the \\| mean | (1000, 1000) float32 none |" in lines


def test_predictions_stand_beside_the_measurement(monkeypatch):
    """One row per case that the model knows; the model itself is replaced."""
    asked = []

    def predict(workload, gpu):
        asked.append((workload, gpu))
        return model.Prediction(4e-6, "issue")

    monkeypatch.setattr(model, "predict", predict)
    rows = [
        *(row("ours", 10), row("ours", 5, section="graph")),
        row("ours", 8, replace(TINY, inference=True, dtype=torch.bfloat16)),
        row("ours", 8, replace(TINY, target_dtype=torch.uint8)),
    ]
    lines = speed_report.page({"GPU": "NVIDIA H200 SXM"}, rows).splitlines()
    assert "| (64, 10) | float32 |  | graph | 5.00 | 4.00 | 1.25 | issue |" in lines
    assert "| (64, 10) | bfloat16 | inference | eager | 8.00 | 4.00 | 2.00 | issue |" in lines
    assert [workload for workload, _ in asked] == [
        Workload((64, 10), torch.float32),
        Workload((64, 10), torch.bfloat16, upstream=None),
    ]
    assert {gpu for _, gpu in asked} == {model.GPUS["H200"]}


def test_without_a_model_the_page_says_so(monkeypatch):
    def fails(*_):
        raise RuntimeError("nvcc was not found")

    monkeypatch.setattr(model, "predict", fails)
    for gpu, why in {"a GPU": "no model of the GPU a GPU", "A100": "nvcc was not found"}.items():
        assert f"There are none: {why}." in speed_report.page({"GPU": gpu}, [row("ours", 1)])


@pytest.mark.parametrize("waits", [True, False])
def test_what_events_enclose(monkeypatch, waits):
    """Only the call is timed; the flush and any waiting come before."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 2.0  # milliseconds

    class Flush:
        def zero_(self):
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    seconds = events.event_burst(Flush(), waits, lambda: done.append("call"), 3)
    assert seconds == pytest.approx(6e-3)
    one = ["flush", *(["wait"] if waits else []), "event", "call", "event"]
    assert done == [*one * 3, "wait"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    done = subprocess.run(
        [sys.executable, speed.__file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "bench/cuda/speed.py needs a GPU and a CUDA build of torch; there is none here"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_and_graphs_on_a_gpu():
    device = events.gpu()
    rows = speed.measure(TINY, device, {})
    graph = {row.rival: row.median_us for row in rows if row.section == "graph"}
    eager = {row.rival: row.median_us for row in rows if row.section == "eager"}
    assert 0 < graph["ours"] < eager["ours"]
    assert device.try_capture("ours") == ""
    assert "Error" in device.try_capture("pytorch-ood")  # it waits in the middle

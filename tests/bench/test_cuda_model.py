"""The model of a GPU and its instruments, on inputs whose results are known."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "bench" / "cuda"))
import launches
import model
import sass
from launches import Launch, Workload
from machine_code import Kernel, LoopCode
from model import Gpu, Prediction

# Two loops over logits in a loop over rows, with a way around the first four MOVs and a call.
SASS = """Function : kernel
/*0000*/ MOV R1, R1 ;
/*0010*/ @P0 BRA 0x0060 ;
/*0020*/ MOV R1, R1 ;
/*0030*/ MOV R1, R1 ;
/*0040*/ MOV R1, R1 ;
/*0050*/ MOV R1, R1 ;
/*0060*/ LDG.E.128.CONSTANT R4, [R2] ;
/*0070*/ STS.128 [R3], R4 ;
/*0080*/ @P1 BRA 0x0060 ;
/*0090*/ @P2 CALL.REL.NOINC 0x00b0 ;
/*00a0*/ BRA 0x00e0 ;
/*00b0*/ LDS.64 R4, [R3] ;
/*00c0*/ STG.E.U16 [R2], R4 ;
/*00d0*/ @!P1 BRA 0x00b0 ;
/*00e0*/ @P3 EXIT ;
/*00f0*/ BRA 0x0000 ;
"""


def test_loops_and_the_shortest_round():
    lines = sass.read_code(SASS)["kernel"]
    found = sass.loops_over_logits(lines)
    assert {kind: len(loops) for kind, loops in found.items()} == {
        "load": 1, "sum": 0, "write": 1, "recompute": 0,
    }  # fmt: skip
    load, write = found["load"][0], found["write"][0]
    assert (load.begin, load.end, load.accesses("LDG")) == (0x60, 0x80, [16])
    assert (write.begin, write.end, write.accesses("STG")) == (0xB0, 0xD0, [2])
    # CALL, EXIT, BRA, MOV, BRA
    assert sass.shortest_round(lines, [load, write]) == 5
    # without the loop that writes: one more jump instead
    assert sass.shortest_round(lines, [load]) == 6
    with pytest.raises(RuntimeError, match="no path"):
        sass.shortest_round(lines[:-1], [load, write])


def make_kernel(name: str, once_a_row: int, **loops: tuple[int, int, int]) -> Kernel:
    """Of float32 and of width 4; loops are instructions, elements, loaded bytes."""
    return Kernel(
        architecture="90", name=name, dtype="float", width=4, max_threads=128, registers=128,
        stack=0, spills=0, shared=1024, occupancy=0, wide_loads=1, wide_stores=1, instructions=100,
        loops={kind: [LoopCode(*figures, True)] for kind, figures in loops.items()},
        once_a_row=once_a_row,
    )  # fmt: skip


# 1e12 thread instructions a second, and 11,000 bytes in flight needed
GPU = Gpu("90", 1e12, 100, 1e12 / (100 * 128))
ROWS = Workload((1000, 100), torch.float32)
KERNEL = make_kernel(
    "forward_rows", 50, load=(64, 32, 128), sum=(48, 16, 0), write=(16, 16, 0),
    recompute=(80, 16, 64),
)  # fmt: skip


def test_what_a_multiprocessor_holds():
    launch = Launch("forward_rows", 0, 1, 1, True, 8, 128, 10_000, 60 * 1024)
    assert GPU.needed_in_flight == pytest.approx(11_000)
    # 228 KiB of 62 KiB with the system's; the registers would allow for 4 blocks
    assert model.resident_blocks(launch, KERNEL, GPU) == 3
    # 100 classes by 8 lanes are 13 each, less than the loop loads at once
    assert model.in_flight(launch, KERNEL, ROWS, GPU) == 3 * 128 * 13 * 4
    few = Launch("forward_rows", 0, 1, 1, True, 1, 128, 50, 0)
    assert model.in_flight(few, KERNEL, ROWS, GPU) == 0.5 * 128 * 128


@pytest.mark.parametrize(
    ("reads", "writes", "by_element"),
    [(1, 0, 5), (1, 1, 6), (2, 1, 10)],
    ids=["forward alone", "gradient from the stage", "gradient from the logits"],
)
def test_instructions(reads, writes, by_element):
    launch = Launch("forward_rows", 0, reads, writes, lanes=8)
    assert model.instructions(launch, KERNEL, ROWS) == 1000 * (100 * by_element + 8 * 50)
    pixels = make_kernel("backward_pixels", 50, recompute=(80, 16, 64))
    launch = Launch("backward_pixels", 0, 1, 1)
    assert model.instructions(launch, pixels, ROWS) == 1000 * (100 * 5 + 50 / 4)


def test_what_binds(monkeypatch):
    monkeypatch.setattr(model, "find_kernel", lambda *_: KERNEL)

    def predicted(moved: float, blocks: int = 10_000, rows: int = 1000) -> Prediction:
        launch = Launch("forward_rows", moved, 1, 1, True, 8, 128, blocks, 0)
        return model.predict_launch(launch, Workload((rows, 100), torch.float32), GPU)

    assert predicted(8.5e8) == Prediction(pytest.approx(1e-3), "memory")
    # 10 blocks on 100 multiprocessors: 0.1 * 128 * 52 bytes on their way
    slower = 11_000 / (0.1 * 128 * 52)
    assert predicted(8.5e8, blocks=10) == Prediction(pytest.approx(slower * 1e-3), "latency")
    assert predicted(8.5e8, rows=10**6) == Prediction(pytest.approx(1e-3 / 0.6), "issue")
    # a backward that has nothing to do
    done = model.predict_launch(Launch("backward_rows", 850), ROWS, GPU)
    assert done == Prediction(pytest.approx(1e-9), "memory")

    found = [Launch("count_rows", 8.5e5), Launch("backward_rows", 0), Launch("write_loss", 0)]
    monkeypatch.setattr(model, "launches", lambda *_: found)
    assert model.predict(ROWS, GPU) == Prediction(pytest.approx(7e-6), "launches")
    found[0] = Launch("count_rows", 8.5e7)
    assert model.predict(ROWS, GPU) == Prediction(pytest.approx(106e-6), "memory")


def test_gpus_by_their_names():
    assert model.find_gpu("NVIDIA H100 80GB HBM3") is model.GPUS["H100"]
    with pytest.raises(LookupError, match="no model of the GPU NVIDIA T4"):
        model.find_gpu("NVIDIA T4")


@pytest.mark.parametrize(
    ("shape", "dtype", "is_wide", "lanes"),
    [
        ((3000, 10), torch.float32, False, 2),
        ((700, 100), torch.bfloat16, True, 16),
        ((11, 1100), torch.float32, True, 256),
        ((5, 3, 20, 40), torch.float32, True, 1),
        ((1, 3, 15, 31), torch.bfloat16, False, 1),
    ],
)
def test_the_full_size_is_that_of_the_harness(shape, dtype, is_wide, lanes):
    """Launches from small versions are those that the harness counts for the whole."""
    workload = Workload(shape, dtype, upstream=0.5)
    expected = launches.launches(workload, 223 * 1024)
    counted = launches.run(workload, shape)
    for launch, whole in zip(expected, counted, strict=True):
        assert launch.kernel in whole["kernel"]
        moved = launches.moved_bytes(whole, workload, shape)
        assert launch.bytes == pytest.approx(moved, rel=0.05, abs=2000)
        if launch.reads:
            assert (launch.is_wide, launch.lanes) == (is_wide, lanes)
            assert (launch.threads, launch.blocks) == (whole["threads"], whole["blocks"])
            assert launch.shared_bytes == whole["shared_bytes"]
    assert math.isclose(sum(launch.writes for launch in expected), 2, rel_tol=0.1)

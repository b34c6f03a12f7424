"""The CUDA kernels and launchers, executed and race-checked on the CPU.

Small cases take every way through them; simt_runs.py says what each must satisfy: no finding of
the harness, values and gradients within the budget, no more passes and launches than are promised.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import simt_cases
import simt_device
import simt_runs
import torch
from inputs import make_logits, make_target
from oracles import exact, loss_and_grad
from paths import ROOT, SUPPORT
from simt_cases import CASES

from oe_ext import outlier_exposure_loss

# Of the schedules. The results of the first are checked, and those of all others have its bits.
SEEDS, MORE_SEEDS = range(1, 8), (1, *range(8, 22))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
@pytest.mark.parametrize(
    "seeds",
    [SEEDS, pytest.param(MORE_SEEDS, marks=pytest.mark.mutants)],
    ids=["7_schedules", "14_more"],
)
def test_no_findings_and_the_same_bits_under_every_schedule(seeds, number):
    first = simt_runs.run(number, seeds[0])
    for seed in seeds[1:]:
        again = simt_runs.execute(CASES[number], seed)
        for actual, expected in zip(
            (again.loss, *again.grads), (first.loss, *first.grads), strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "group_mean", "sum"])
@pytest.mark.parametrize("shape", [(64, 40), (2, 19, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradients_are_rounded_correctly(dtype, shape, reduction):
    """In at least 99.9 % of the elements, whatever the upstream gradient."""
    equal = []
    for seed in range(8):
        torch.manual_seed(seed)
        logits, target = make_logits(shape, dtype), make_target(shape)
        weight = torch.tensor([1.0, 0.37, 65536.0][seed % 3])
        with simt_device.active():
            _, grad = loss_and_grad(
                outlier_exposure_loss, logits, target, reduction=reduction, upstream=weight
            )
        _, expected = exact(logits, target, reduction=reduction, upstream=weight)
        equal.append((grad == expected.to(dtype)).flatten())
    assert torch.cat(equal).double().mean() >= 0.999


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 16), (simt_cases.FAR, 1)),
        ((2, 16, 8), (simt_cases.FAR, 8, 1)),
        ((8, 2), (1, simt_cases.FAR)),
    ],
    ids=["rows", "images", "classes"],
)
def test_gradients_beyond_32_bit_offsets(shape, strides):
    """Logits at such offsets are among the cases; here the gradient is written there."""
    logits, target = make_logits(shape, torch.bfloat16), make_target(shape, "inliers")
    forward = torch.ops.oe_ext._outlier_exposure_loss_forward
    from_unit = torch.ops.oe_ext._outlier_exposure_loss_backward_from_unit
    options = (0.5, None, "mean", None, None)
    loss, _, *statistics, _ = forward(logits, target, *options, False)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    far = torch.empty(last + 1, dtype=torch.bfloat16).as_strided(shape, strides)
    with simt_device.active():
        from_unit(far, torch.full_like(loss, 2.0), logits, target, *statistics, *options)
    _, expected = exact(logits, target, upstream=torch.tensor(2.0))
    assert torch.equal(far, expected.bfloat16())


def test_no_kernel_computes_an_offset_in_int():
    """Rows, classes and units are int64_t; an int in a kernel is one of these, and no offset."""
    small = {
        "kSize", "kRows", "kMask", "kMaxWarps", "kWords", "kVectorSize", "kVectorBytes",
        "kWarpSize", "kAtOnce", "kUnitsAtOnce", "kLoadsAtOnce", "kLoopShare", "kChains",
        "kPieces", "kPieceSize",  # constants
        "kMinBlocks", "kMaxRowsThreads", "kLogMaxRowsThreads", "kMaxPixelsThreads",
        "kMinPixelsBlocks", "kReduceThreads",  # launch bounds
        "lanes", "log_lanes", "lane", "warp", "num_warps", "index", "teams", "mask",  # of a block
        "i", "k", "r", "n", "first", "slot", "capacity", "piece", "chain", "cls",  # of a stage
        "count", "num_classes",  # of a stage, or of a lane among many
        "owner", "head", "elements_to_boundary", "element", "label",  # of a vector
        # of upsampled logits, whose axes and classes fit an int
        "kMaxUpsampledThreads", "kMinUpsampledBlocks", "kOwnColumns", "kCorners", "kCount",
        "cell", "band", "first_cell", "second", "begin", "size", "row", "first_row",
        "first_column", "step", "argmax", "side", "side_size_",
        "bits", "bit", "position",  # of 16 bytes
        "num_partials", "num_counts", "num_sums",  # at most kMaxBlocks
    }  # fmt: skip
    found = set()
    for path in set((ROOT / "csrc" / "cuda").glob("*.cuh")) - {
        ROOT / "csrc" / "cuda" / "launch_kernel.cuh"  # no kernel
    }:
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(r"\b(unsigned|uint32_t|int32_t)\s+\w+\s*=[^;]*\bblockIdx", code)
        found |= set(re.findall(r"\bint\s+(\w+)", code))
    assert found <= small
    assert {"lane", "num_partials"} <= found, "the pattern finds nothing"


def test_the_launcher_knows_the_launch_bounds():
    """The harness checks what the launcher says; it says what nvcc reads beside each kernel."""
    cuda = ROOT / "csrc" / "cuda"
    kernels = "".join(path.read_text() for path in cuda.glob("*.cuh"))
    declared = re.findall(r"__launch_bounds__\((\w+), \w+\)\s+(\w+_kernel)\(", kernels)
    assert len(declared) == kernels.count("__global__ ") > 5
    launched = re.findall(
        r"OE_EXT_LAUNCH\(\(?(\w+_kernel)(?:<[^>]*>)?\)?,\s+(\w+),",
        "".join(path.read_text() for path in (*cuda.glob("*.cu"), cuda / "launch_kernel.cuh")),
    )
    assert dict(launched) == {kernel: bound for bound, kernel in declared}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": programs.python_path(SUPPORT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


GUARDED = """
import torch, simt_device
from oe_ext import outlier_exposure_loss
simt_device.load()
forward = torch.ops.oe_ext._upsampled_outlier_exposure_loss_forward
backward = torch.ops.oe_ext._upsampled_outlier_exposure_loss_backward
torch.manual_seed(0)
cases = []
for shape in [(40, 10), (2100, 2), (3, 1032), (2, 19, 8, 8)]:
    for dtype in (torch.float32, torch.float16):
        for reduction in ("mean", "group_mean", "sum", "none"):
            target = torch.randint(-2, shape[1], (shape[0], *shape[2:]))
            one = torch.ones(target.shape if reduction == "none" else ())
            logits = torch.randn(shape, dtype=dtype)
            # On the host: the operators look at the weights of a CPU tensor, which this one is.
            weighted = {"weight": torch.rand(shape[1])}
            cases.append((logits, target, torch.tensor(0.5), one, weighted, reduction))
maps = []
for height in (9, 18):
    for reduction in ("mean", "none"):
        target = torch.randint(-2, 3, (2, 36, 16))
        one = torch.ones(target.shape if reduction == "none" else ())
        maps.append((torch.randn(2, 3, height, 4), target, one, reduction))
with simt_device.active(), simt_device.guarded() as on_device:
    for *tensors, weighted, reduction in cases:
        logits, target, alpha, one = map(on_device, tensors)
        logits.requires_grad_()
        smoothed = {"label_smoothing": 0.1}
        for a, options in ((0.5, {}), (alpha, {}), (0.5, weighted), (0.5, smoothed)):
            loss = outlier_exposure_loss(logits, target, a, reduction, **options)
            (grad,) = torch.autograd.grad(loss, logits, one)
    # Autograd would multiply the gradient of upsampled logits by the upstream one: here, the host.
    for logits, target, one, reduction in maps:
        logits, target, one = map(on_device, (logits, target, one))
        options = (0.5, None, reduction, None, None, False)
        *_, counts, _ = forward(logits, target, *options, True, reduction == "mean")
        backward(one, logits, target, counts, *options)
    print("looks", flush=True)
    {after}
print("done")
"""


def test_the_host_reads_nothing_of_the_device():
    """Every tensor's memory faults unless a kernel runs: no value can reach the host.

    So nothing can wait for the device, forward or backward, and all can be captured in a graph.
    """
    assert run_python(GUARDED.replace("{after}", "")).stdout == "looks\ndone\n"


@pytest.mark.parametrize("look", ["loss.sum().item()", "grad.clone()", "print(target.tolist())"])
def test_the_trap_works(look):
    result = run_python(GUARDED.replace("{after}", look))
    assert result.returncode == -11, "a segmentation fault"
    assert result.stdout == "looks\n"


def executed_lines(library: Path) -> dict[tuple[str, int, str], int]:
    """How often each line of the kernels and launchers ran, by file, line and instantiation."""
    command = ["gcov", "--json-format", "--stdout", str(library.with_suffix(".gcda"))]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=library.parent
    ).stdout
    counts: dict[tuple[str, int, str], int] = {}
    for file in json.loads(output)["files"]:
        path = Path(file["file"])
        if path.parts[-3:-1] != ("csrc", "cuda") or path.suffix not in (".cuh", ".cu"):
            continue
        for line in file["lines"]:
            # A function for each dtype and width that the line is compiled for.
            key = (path.name, line["line_number"], line.get("function_name", ""))
            counts[key] = counts.get(key, 0) + line["count"]
    return counts


@pytest.mark.mutants
def test_every_line_of_the_kernels_is_executed(tmp_path, record_property):
    """Of the kernels and launchers, in each of the four dtypes."""
    library = tmp_path / "kernels.so"
    flags = ["-O0", "--coverage", "-fvisibility=hidden", "-fno-gnu-unique"]
    simt_device.compile_kernels(ROOT, library, flags)
    result = run_python(f"""
import simt_cases, simt_device, simt_runs
from pathlib import Path
simt_device.load()
simt_device.use_kernels(Path({str(library)!r}))
for case in simt_cases.CASES:
    simt_runs.execute(case, 1)
""")
    assert result.returncode == 0, result.stderr
    counts = executed_lines(library)
    lines = {(file, line) for file, line, _ in counts}
    assert len(lines) > 150, "gcov found no kernels"
    assert {file for file, _ in lines} == {
        path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu*")
    }
    missed = sorted(key for key, count in counts.items() if count == 0)
    share = 100 * (1 - len(missed) / len(counts))
    record_property(
        "coverage",
        f"CUDA kernels and launchers: {share:.0f} % of {len(lines)} lines executed, "
        f"{len(counts)} with their instantiations",
    )
    assert [f"{file}:{line} {function[:80]}" for file, line, function in missed] == []

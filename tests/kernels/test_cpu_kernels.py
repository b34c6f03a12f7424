"""The CPU kernels: every instruction set, walk and remainder; their threads; their memory."""

from __future__ import annotations

import functools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import LAYOUTS, REDUCTIONS, make_logits, make_target
from oracles import exact, loss_and_grad, max_error
from paths import ROOT

from oe_ext import _ext, collect_env, outlier_exposure_loss

LEVELS = ["DEFAULT", "AVX2", "AVX512"]

# Around the lanes of a vector (2 to 16), the rows of a tile (256), and the classes from which on
# rows are walked one by one (64).
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 255, 257]
CLASSES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    10,
    15,
    16,
    17,
    19,
    31,
    33,
    63,
    64,
    65,
    79,
    81,
    127,
    129,
    1000,
    1025,
    2017,
]

# The largest error of a gradient whose own values are at most 1, beside its rounding.
ERROR = {torch.float64: 4e-15, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def run_python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_random_shapes(dtype, layout):
    """Values and gradients against float64, in the sum, where no divisor hides an error."""
    rng = random.Random(f"{dtype} {layout}")
    for _ in range(40):
        shape = (rng.choice(ROWS), rng.choice(CLASSES))
        if rng.random() < 0.5:
            shape = (rng.choice([1, 2, 3]), rng.choice(CLASSES), rng.choice(ROWS), 2)
        offset = rng.choice([0.0, 0.0, 100.0])
        logits = LAYOUTS[layout](
            make_logits(shape, dtype, scale=rng.choice([1, 10]), offset=offset)
        )
        target = make_target(shape, rng.choice(["mixed", "mixed", "inliers", "outliers"]))
        reduction = rng.choice(REDUCTIONS[:2])
        rand = functools.partial(torch.rand, dtype=exact_dtype(dtype))
        args = (target, 0.5, reduction)
        options = {
            "ignore_index": rng.choice([None, -100]),
            "weight": rng.choice([None, None, rand(shape[1]).round(decimals=1)]),
            "label_smoothing": rng.choice([0.0, 0.0, 0.1]),
            "upstream": rand(target.shape) if reduction == "none" else None,
        }
        loss, grad = loss_and_grad(outlier_exposure_loss, logits, *args, **options)
        true_loss, true_grad = exact(logits, *args, **options)
        what = f"{shape} {reduction} {options | {'upstream': None}}"
        size = true_loss.abs().max().item() + true_loss.numel() / max(1, target.numel()) * 10
        assert max_error(loss, true_loss) <= 2 * ERROR[dtype] * size, what
        rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
        excess = (grad.double() - true_grad).abs() - rounding * true_grad.abs()
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert excess.max().item() <= max(ERROR[dtype], smallest), what


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the loss."""
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.skipif(_ext.module is None, reason="needs the compiled module")
@pytest.mark.parametrize("level", LEVELS)
def test_at_every_level(level):
    """The same cases in a process of its own, where torch's own switch chooses the kernels."""
    code = "import oe_ext._ext as e; print(e.module.cpu_capability())"
    widest = run_python("-c", code).strip()
    if LEVELS.index(widest) < LEVELS.index(level):
        pytest.skip(f"this processor, or ATEN_CPU_CAPABILITY, allows no more than {widest}")
    environment = {"ATEN_CPU_CAPABILITY": level.lower()}
    assert run_python("-c", code, **environment).strip() == level
    printed = run_python(
        "-m",
        "pytest",
        "-q",
        f"{__file__}::test_random_shapes",
        f"{__file__}::test_exp",
        **environment,
    )
    assert "passed" in printed.splitlines()[-1]
    assert "skipped" not in printed.splitlines()[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exp(dtype):
    """The exponential and the logarithm alone: two classes, one at 0 and one x below it.

    The gradient at the other class is exp(-x) / (1 + exp(-x)), the loss log(1 + exp(-x)).
    """
    x = torch.linspace(0, 85, 85_001, dtype=dtype)
    logits = torch.stack([torch.zeros_like(x), -x], dim=1)
    target = torch.zeros(len(x), dtype=torch.int64)
    loss, grad = loss_and_grad(outlier_exposure_loss, logits, target, 0.5, "sum")
    true = torch.sigmoid(-x.double())
    relative = ((grad[:, 1].double() - true) / true).abs().max().item()
    assert relative < 2 * torch.finfo(dtype).eps
    rows = outlier_exposure_loss(logits, target, 0.5, "none").double()
    assert max_error(rows, torch.log1p(torch.exp(-x.double()))) < 2 * torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(rows.sum().item(), rel=1e-6)


@pytest.mark.parametrize("layout", ["rows", "classes apart"])
def test_many_classes_keep_their_digits(layout):
    """Sums over 128,256 classes, in either order of memory."""
    shape = (4, 128_256)
    logits = make_logits(shape, torch.float32, scale=3.0)
    logits = logits.t().contiguous().t() if layout == "classes apart" else logits
    target = torch.tensor([5, -1, shape[1] - 1, -2])
    rows = outlier_exposure_loss(logits, target, 0.5, "none")
    true, _ = exact(logits, target, 0.5, "none")
    assert ((rows.double() - true) / true).abs().max().item() < 2e-7


@pytest.mark.parametrize("shape", [(3, 70), (3, 4), (1, 4, 3)])
def test_labels_that_do_not_fit_32_bits(shape):
    """ignore_index, ood_index and negative outliers of any size."""
    logits = make_logits(shape, torch.float32)
    rows = shape[:1] + shape[2:]
    small = torch.tensor([1, -100, -1]).reshape(rows)
    ignored = outlier_exposure_loss(logits, small, 0.5, "none", ignore_index=-100)
    marked = outlier_exposure_loss(logits, torch.where(small == 1, 1, -1), 0.5, "none")
    for large in (2**31 - 1, 2**31, 2**40 + 1):
        target = torch.tensor([1, large, -(2**31) - large]).reshape(rows)
        ours = outlier_exposure_loss(logits, target, 0.5, "none", ignore_index=large)
        assert torch.equal(ours, ignored)
        target = torch.tensor([1, large, large]).reshape(rows)
        ours = outlier_exposure_loss(logits, target, 0.5, "none", ood_index=large)
        assert torch.equal(ours, marked)


def test_threads_are_used():
    """Many rows start torch's own threads, and no others: the process had one before."""
    code = (
        "import os, torch; from oe_ext import outlier_exposure_loss as f; "
        "torch.set_num_threads(4); "
        "x, y = torch.empty(4096, 1000), torch.zeros(4096, dtype=torch.int64); "
        "count = lambda: len(os.listdir('/proc/self/task')); before = count(); "
        "f(x[:8], y[:8]); few = count(); f(x, y); many = count(); "
        "x.exp(); print(few - before, many - before, count() - before)"
    )
    assert run_python("-c", code, OMP_NUM_THREADS="4").split() == ["0", "3", "3"]


def test_peak_memory():
    """Forward and backward need the gradient, and next to nothing beside it, in a fresh process."""
    shape = (512, 16000)
    code = (
        "import sys; sys.path.insert(0, 'bench'); import cases, memory; "
        f"print(memory.peak_rise(cases.Case('memory', {shape}, ('ours',))))"
    )
    gradient = 4 * shape[0] * shape[1]
    assert int(run_python("-c", code)) < 1.08 * gradient


@pytest.mark.packaging
@pytest.mark.parametrize("optimisation", ["-O0", "-O3"])
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_no_function_leaks_out_of_a_level(level, optimisation, tmp_path):
    """A linker merges weak functions with those of other files, and a lesser processor may get to
    run them: they hold no instruction that it lacks."""
    include = Path(torch.__file__).parent / "include"
    out = tmp_path / "kernels.o"
    source = ROOT / "csrc" / "cpu" / f"kernels_{level}.cpp"
    flags = ["-std=c++20", optimisation, "-fPIC", "-fopenmp-simd", "-isystem", str(include)]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, "-c", source, "-o", out], check=True)
    symbols = subprocess.run(["nm", out], capture_output=True, text=True, check=True).stdout
    kinds = [line.split()[-2] for line in symbols.splitlines()]
    assert kinds.count("D") + kinds.count("R") == 1  # the table of kernels
    assert not {"T", "u"} & set(kinds), symbols
    if optimisation == "-O3":
        assert not {"W", "V"} & set(kinds), symbols
    weak = {line.split()[-1] for line in symbols.splitlines() if line.split()[-2] == "W"}
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", out], capture_output=True)
    of_vectors = {True: 0, False: 0}  # by whether the function is weak
    for function in code.stdout.decode().split("\n\n"):
        name = re.search(r"<(\S+)>:$", function, re.MULTILINE)
        if name is not None:
            of_vectors[name[1] in weak] += len(re.findall(r"\tv\w+ |%[yz]mm", function))
    assert of_vectors[False] > 1000
    assert of_vectors[True] == 0


def test_the_environment_report_names_the_kernels():
    assert collect_env.collect()["CPU kernels"] in LEVELS

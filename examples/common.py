"""What the examples share: options, detection metrics, tables, figures and the timing line."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from oe_ext import OutlierExposureLoss, reference

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Metrics = dict[str, float]

WITHOUT, WITH = "without OE", "with OE"
INLIER_COLOR, OUTLIER_COLOR = "#3b6fb6", "#d1495b"
METHOD_COLORS = {WITHOUT: "#8a8d91", WITH: "#1b7f79"}

METRICS_NOTE = (
    "Detection: score = 1 - max softmax; outliers are the positives. AUPR depends on their share.\n"
    "FPR95 = false positive rate at 95 % true positive rate: the share of inliers flagged by the\n"
    "threshold that flags 95 % of the outliers."
)

plt.rcParams.update(
    {
        "figure.dpi": 150,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


def parse_args(description: str | None, seeds: int) -> argparse.Namespace:
    """The options of every example; ``seeds`` is the default number of seeds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=seeds, help=f"number of runs ({seeds})")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "out",
        help="folder for the figures (examples/out)",
    )
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps: a smoke test")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if args.quick:
        args.seeds = 1
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def anomaly_score(logits: Tensor) -> Tensor:
    """1 - max softmax over the classes: high where the network is not confident."""
    # float64: in float32 a confident network rounds to exactly 0, and the ties hide its ranking.
    return 1 - logits.double().softmax(dim=1).amax(dim=1)


def labels_and_scores(inliers: np.ndarray, outliers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scores of both groups as scikit-learn wants them; outliers are the positives."""
    labels = np.repeat([0, 1], [len(inliers), len(outliers)])
    return labels, np.concatenate([inliers, outliers])


def detection_metrics(inliers: np.ndarray, outliers: np.ndarray) -> Metrics:
    """How well a score separates the two groups, in percent; see ``METRICS_NOTE``."""
    labels, scores = labels_and_scores(inliers, outliers)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    values = {
        "AUROC": roc_auc_score(labels, scores),
        "AUPR": average_precision_score(labels, scores),
        "FPR95": fpr[np.argmax(tpr >= 0.95)],
    }
    return {name: 100 * float(value) for name, value in values.items()}


def print_table(title: str, results: dict[str, list[Metrics]]) -> None:
    """One row per metric, one column per method: mean and standard deviation over the seeds."""
    methods = list(results)
    names = list(results[methods[0]][0])
    width = max(map(len, names)) + 2
    print(f"\n{title}")
    print(" " * width + "".join(f"{method:>16}" for method in methods))
    for name in names:
        cells = []
        for method in methods:
            values = [metrics[name] for metrics in results[method]]
            spread = f" ± {statistics.stdev(values):4.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells))


def save_figure(figure: Figure, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    print(f"wrote {path}")


def median_times(steps: Sequence[Callable[[], object]], num_rounds: int) -> list[float]:
    """The seconds of each. They take turns, so that whatever else the machine does slows all."""

    def seconds(step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    warm_up = 10
    times = [[seconds(step) for step in steps] for _ in range(warm_up + num_rounds)][warm_up:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def peak_memory() -> int:
    """The most bytes that this process has had in memory (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


def timing_line(loss: OutlierExposureLoss, logits: Tensor, target: Tensor, pairs: int) -> str:
    """Forward and backward of ``loss`` against the reference, on this machine, right now."""

    def plain_torch(logits: Tensor, target: Tensor) -> Tensor:
        return reference.outlier_exposure_loss(
            logits,
            target,
            loss.alpha,
            loss.reduction,
            ignore_index=loss.ignore_index,
            ood_index=loss.ood_index,
        )

    logits = logits.detach().requires_grad_()

    def gradient(criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(criterion(logits, target), logits)

    ours, theirs = median_times([gradient(loss), gradient(plain_torch)], pairs)
    threads = torch.get_num_threads()
    return (
        f"Timing: forward + backward on {logits.dtype} logits {list(logits.shape)}, "
        f"{threads} CPU thread{'s' if threads > 1 else ''}: oe_ext takes {ours / theirs:.2f}x the "
        f"time of the plain-torch reference (medians of {pairs} interleaved runs)."
    )

"""Outlier Exposure on scikit-learn's 8x8 digits: its effect on classes that are never shown.

A small network learns the digits 0-5. The digits 6 and 7 are shown as outliers (label -1); 8 and 9
are never shown, and at test time the network's low confidence should give them away. It is trained
with Outlier Exposure (OE) and without. Without OE, the initial weights, batches and loss are the
same, but alpha = 0, which is plain cross-entropy on the inliers.

    python examples/train_digits.py [--seeds 5] [--out FOLDER] [--quick]
"""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import (
    INLIER_COLOR,
    METHOD_COLORS,
    METRICS_NOTE,
    OUTLIER_COLOR,
    WITH,
    WITHOUT,
    Metrics,
    anomaly_score,
    detection_metrics,
    labels_and_scores,
    parse_args,
    print_table,
    save_figure,
    timing_line,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import roc_curve
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from oe_ext import OutlierExposureLoss

NUM_CLASSES = 6  # the digits 0-5
SHOWN, UNSEEN = (6, 7), (8, 9)
ALPHAS = {WITHOUT: 0.0, WITH: 0.5}  # 0.5 as in the paper
BATCH_SIZE = 64  # of inliers, and as many outliers


class Split(NamedTuple):
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    shown: Tensor
    unseen: Tensor


class Run(NamedTuple):
    """The anomaly scores of one trained network."""

    inliers: np.ndarray
    unseen: np.ndarray


def load_split(seed: int) -> Split:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    inlier = labels < NUM_CLASSES
    train_images, test_images, train_labels, test_labels = train_test_split(
        images[inlier],
        labels[inlier],
        test_size=0.3,
        random_state=seed,
        stratify=labels[inlier],
    )
    shown, unseen = (images[torch.isin(labels, torch.tensor(group))] for group in (SHOWN, UNSEEN))
    return Split(train_images, train_labels, test_images, test_labels, shown, unseen)


def make_network() -> nn.Module:
    # No batch norm: its statistics would let the outliers act on the network even at alpha = 0.
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, NUM_CLASSES),
    )


def mixed_batch(split: Split) -> tuple[Tensor, Tensor]:
    """Inliers with their labels, and as many outliers labelled -1."""
    inliers = torch.randint(len(split.train_images), (BATCH_SIZE,))
    outliers = torch.randint(len(split.shown), (BATCH_SIZE,))
    images = torch.cat([split.train_images[inliers], split.shown[outliers]])
    target = torch.cat([split.train_labels[inliers], torch.full((BATCH_SIZE,), -1)])
    return images, target


def train(split: Split, alpha: float, seed: int, steps: int, progress: tqdm) -> nn.Module:
    torch.manual_seed(seed)  # the same weights and batches for every alpha
    network = make_network()
    # group_mean is the paper's objective: a mean over the inliers plus alpha times one over the
    # outliers. The batch's mix does not change their balance, and alpha = 0 leaves just the first.
    criterion = OutlierExposureLoss(alpha, "group_mean")
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        images, target = mixed_batch(split)
        loss = criterion(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.update()
    return network


@torch.no_grad()
def evaluate(network: nn.Module, split: Split) -> tuple[Run, Metrics]:
    logits = network(split.test_images)
    accuracy = (logits.argmax(dim=1) == split.test_labels).float().mean().item()
    run = Run(anomaly_score(logits).numpy(), anomaly_score(network(split.unseen)).numpy())
    return run, {"accuracy, held-out 0-5": 100 * accuracy, **detection_metrics(*run)}


def draw_histogram(ax: Axes, runs: list[Run], title: str) -> None:
    bins = np.geomspace(1e-7, 1, 43)  # the first bar also holds what lies below
    groups = (("0-5, held out", INLIER_COLOR), ("8-9, never shown", OUTLIER_COLOR))
    for (label, color), scores in zip(groups, zip(*runs, strict=True), strict=True):
        pooled = np.concatenate(scores).clip(bins[0], bins[-1])
        weights = np.full(len(pooled), 100 / len(pooled))
        style = {"bins": bins, "weights": weights, "color": color}
        ax.hist(pooled, alpha=0.35, **style)
        ax.hist(pooled, histtype="step", linewidth=1.4, label=label, **style)
    # Most scores are tiny: on a linear axis they would all share one bar.
    ax.set_xscale("log")
    ax.set(title=title, xlabel="anomaly score (1 - max softmax)", xlim=(bins[0], bins[-1]))
    ax.grid(axis="y", alpha=0.25)


def draw_roc(ax: Axes, runs: dict[str, list[Run]], results: dict[str, list[Metrics]]) -> None:
    grid = np.linspace(0, 1, 501)
    for method, color in METHOD_COLORS.items():
        curves = []
        for run in runs[method]:
            fpr, tpr, _ = roc_curve(*labels_and_scores(*run))
            curves.append(np.interp(grid, fpr, tpr))
            ax.step(fpr, tpr, where="post", color=color, alpha=0.3, linewidth=0.7)
        auroc = np.mean([metrics["AUROC"] for metrics in results[method]])
        label = f"{method} (AUROC {auroc:.1f} %)"
        ax.plot(grid, np.mean(curves, axis=0), color=color, linewidth=2, label=label)
    ax.axhline(0.95, color="black", linewidth=0.7, linestyle=":")
    ax.text(0.99, 0.94, "TPR 95 %", ha="right", va="top", fontsize=8)
    ax.set(
        title="ROC, one thin line per seed",
        xlabel="false positive rate (0-5 flagged)",
        ylabel="true positive rate (8-9 flagged)",
        xlim=(0, 1),
        ylim=(0, 1.01),
    )
    ax.grid(alpha=0.25)
    ax.legend(loc="lower right")


def draw(runs: dict[str, list[Run]], results: dict[str, list[Metrics]]) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    axes[1].sharey(axes[0])
    for ax, (method, alpha) in zip(axes, ALPHAS.items(), strict=False):
        draw_histogram(ax, runs[method], f"{method} (alpha = {alpha:g})")
    axes[0].set_ylabel("share of the group (%)")
    axes[0].legend(loc="upper left")
    draw_roc(axes[2], runs, results)
    seeds = len(runs[WITH])
    figure.suptitle(
        f"Digits: 0-5 learnt, 6-7 shown as outliers, 8-9 never shown ({seeds} seed(s) pooled)"
    )
    return figure


def main() -> None:
    args = parse_args(__doc__, seeds=5)
    # Steps this small gain nothing from a second thread, and lose a lot where cores are shared.
    torch.set_num_threads(1)
    steps = 20 if args.quick else 400
    runs: dict[str, list[Run]] = {method: [] for method in ALPHAS}
    results: dict[str, list[Metrics]] = {method: [] for method in ALPHAS}
    with tqdm(total=args.seeds * len(ALPHAS) * steps, desc="training", mininterval=0.5) as progress:
        for seed in range(args.seeds):
            split = load_split(seed)
            for method, alpha in ALPHAS.items():
                network = train(split, alpha, seed, steps, progress)
                run, metrics = evaluate(network, split)
                runs[method].append(run)
                results[method].append(metrics)

    print_table(
        f"Digits, %, mean ± standard deviation over {args.seeds} seed(s); "
        f"{len(split.test_images)} held-out inliers, {len(split.unseen)} never-shown outliers",
        results,
    )
    print(f"\n{METRICS_NOTE}\n")
    save_figure(draw(runs, results), args.out / "digits.png")
    images, target = mixed_batch(split)
    criterion = OutlierExposureLoss(ALPHAS[WITH], "group_mean")
    print(timing_line(criterion, network(images), target, pairs=20 if args.quick else 500))


if __name__ == "__main__":
    main()

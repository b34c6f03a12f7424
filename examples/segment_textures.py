"""Outlier Exposure for anomaly segmentation, on photographs that ship inside scikit-image.

Mosaics are cut from photographs: brick, grass and gravel are the classes; coins, a printed page, an
astronaut and the moon are shown in training as outliers; a cat, a tissue section and a cup of
coffee are never shown, and appear in the test mosaics only. Training and testing use the left and
the right half of each photograph. A small fully convolutional network is trained with Outlier
Exposure (OE) and without. Without OE, the initial weights, mosaics and loss are the same, but
alpha = 0, so outlier pixels do not count.

The network (segmentation_training.py) ends at a quarter of the resolution, and its loss
interpolates the logits itself. For comparison, the same network is trained "unfused", with
F.interpolate before the loss; the scores are the same but for roundings. At the end, the example
measures the time and the memory of a training step with both.

    python examples/segment_textures.py [--seeds 3] [--out FOLDER] [--quick]
"""

from __future__ import annotations

from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import (
    METRICS_NOTE,
    WITH,
    WITHOUT,
    Metrics,
    anomaly_score,
    detection_metrics,
    parse_args,
    print_table,
    save_figure,
)
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from segmentation_training import OUTLIER, VOID, Batch, Training, interpolate, print_costs
from skimage import color, data, segmentation
from torch import Tensor, nn
from tqdm import tqdm

# All of these are files of the scikit-image wheel: nothing is downloaded.
CLASSES = ("brick", "grass", "gravel")
SHOWN = ("coins", "page", "astronaut", "moon")
UNSEEN = ("chelsea", "immunohistochemistry", "coffee")

SIZE = 96  # of a mosaic
BATCH_SIZE = 8
NUM_CELLS = 6  # textures in a mosaic
OUTLIER_RATE = 0.25  # of the cells


class Method(NamedTuple):
    alpha: float
    fused: bool = True


UNFUSED = "OE, unfused"
METHODS = {WITHOUT: Method(0.0), WITH: Method(0.5), UNFUSED: Method(0.5, fused=False)}


class Mosaics(NamedTuple):
    images: Tensor  # [N, 1, SIZE, SIZE], float32
    target: Tensor  # [N, SIZE, SIZE], uint8


def load_photographs(names: tuple[str, ...]) -> list[np.ndarray]:
    photographs = [getattr(data, name)() for name in names]
    return [color.rgb2gray(p) if p.ndim == 3 else p / 255 for p in photographs]


def halves(photographs: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The left and the right half of each photograph, for training and for testing."""
    middles = [photograph.shape[1] // 2 for photograph in photographs]
    left = [p[:, :middle] for p, middle in zip(photographs, middles, strict=True)]
    right = [p[:, middle:] for p, middle in zip(photographs, middles, strict=True)]
    return left, right


def random_patch(photograph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top, left = (rng.integers(length - SIZE + 1) for length in photograph.shape)
    patch = photograph[top : top + SIZE, left : left + SIZE]
    patch = patch[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    # Brightness and contrast are random, or they would tell the photographs apart.
    patch = (patch - patch.mean()) / (patch.std() + 0.02)
    return rng.uniform(0.7, 1.3) * patch + rng.uniform(-0.5, 0.5)


def random_cells(rng: np.random.Generator) -> np.ndarray:
    """A map of the numbers 0 to NUM_CELLS - 1: a Voronoi diagram, curved by weights."""
    y, x = rng.uniform(0, SIZE, (2, NUM_CELLS, 1, 1))
    weights = rng.uniform(0.7, 1.4, (NUM_CELLS, 1, 1))
    rows, columns = np.ogrid[:SIZE, :SIZE]
    return (((rows - y) ** 2 + (columns - x) ** 2) / weights).argmin(axis=0)


def make_mosaics(
    num: int, inliers: list[np.ndarray], outliers: list[np.ndarray], rng: np.random.Generator
) -> Mosaics:
    images = np.empty((num, 1, SIZE, SIZE), np.float32)
    target = np.empty((num, SIZE, SIZE), np.uint8)
    for image, labels in zip(images[:, 0], target, strict=True):
        cells = random_cells(rng)
        for cell in range(NUM_CELLS):
            # Outliers are cells like any other: neither their shape nor their number gives them
            # away.
            if rng.random() < OUTLIER_RATE:
                label, photograph = OUTLIER, outliers[rng.integers(len(outliers))]
            else:
                label = rng.integers(len(inliers))
                photograph = inliers[label]
            inside = cells == cell
            image[inside] = random_patch(photograph, rng)[inside]
            labels[inside] = label
        labels[segmentation.find_boundaries(cells, mode="thick")] = VOID
    return Mosaics(torch.from_numpy(images), torch.from_numpy(target))


def train(
    inliers: list[np.ndarray],
    outliers: list[np.ndarray],
    method: Method,
    seed: int,
    steps: int,
    progress: tqdm,
) -> nn.Module:
    # The same weights and mosaics for every method.
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    training = Training(len(CLASSES), method.alpha, method.fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        training.optimizer, max_lr=3e-3, total_steps=steps
    )
    for _ in range(steps):
        training.step(*make_mosaics(BATCH_SIZE, inliers, outliers, rng))
        schedule.step()
        progress.update()
    return training.network.eval()


@torch.no_grad()
def predict(network: nn.Module, mosaics: Mosaics) -> Tensor:
    logits = [network(images) for images in mosaics.images.split(BATCH_SIZE)]
    return interpolate(torch.cat(logits), (SIZE, SIZE))


def pixel_accuracy(logits: Tensor, target: Tensor) -> float:
    """Over the inlier pixels, in percent."""
    inlier = target < len(CLASSES)
    return 100 * (logits.argmax(dim=1) == target)[inlier].float().mean().item()


def pixel_detection(logits: Tensor, target: Tensor, group: str) -> Metrics:
    """Detection metrics over all pixels, void ones left out."""
    scores = anomaly_score(logits)
    inliers, outliers = scores[target < len(CLASSES)], scores[target == OUTLIER]
    metrics = detection_metrics(inliers.numpy(), outliers.numpy())
    return {f"{name}, {group}": value for name, value in metrics.items()}


def draw(mosaics: Mosaics, logits: dict[str, Tensor], num_rows: int = 4) -> Figure:
    """The first mosaics that hold an outlier: not the best ones."""
    colors = ("#c8553d", "#6a994e", "#5b8fb9", "#f2c14e", "white")
    names = (*CLASSES, "outlier (never shown)", "void (not counted)")
    has_outlier = (mosaics.target == OUTLIER).flatten(1).any(dim=1)
    chosen = has_outlier.nonzero().flatten().tolist()[:num_rows]

    size = (10.6, 1.98 * len(chosen) + 1)
    figure, axes = plt.subplots(len(chosen), 5, figsize=size, squeeze=False, layout="constrained")
    scores = {method: anomaly_score(logits[method]) for method in (WITHOUT, WITH)}
    style = {"cmap": ListedColormap(colors), "vmin": 0, "vmax": len(colors) - 1}
    for row, index in zip(axes, chosen, strict=True):
        target = mosaics.target[index].numpy()
        truth = np.where(target == OUTLIER, 3, np.where(target == VOID, 4, target))
        row[0].imshow(mosaics.images[index, 0], cmap="gray", vmin=-2.5, vmax=2.5)
        row[1].imshow(truth, interpolation="nearest", **style)
        row[2].imshow(logits[WITH][index].argmax(dim=0), interpolation="nearest", **style)
        for ax, method in zip(row[3:], scores, strict=True):
            heat = ax.imshow(scores[method][index], cmap="magma", vmin=0, vmax=1 - 1 / len(CLASSES))
            ax.contour(target == OUTLIER, levels=[0.5], colors="white", linewidths=0.9)
    titles = (
        "input",
        "ground truth",
        "predicted class, with OE",
        *(f"anomaly score, {method}" for method in scores),
    )
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    bar = figure.colorbar(heat, ax=axes[:, 4], shrink=0.6, pad=0.03)
    bar.set_label("1 - max softmax (white line: true outlier)")
    bar.outline.set_visible(False)
    handles = [
        Patch(facecolor=c, edgecolor="#888888", linewidth=0.5, label=name)
        for c, name in zip(colors, names, strict=True)
    ]
    figure.suptitle(
        "Test mosaics of brick, grass and gravel, with outliers never shown in training"
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def main() -> None:
    args = parse_args(__doc__, seeds=3)
    # Steps this small gain little from a second thread, and lose a lot where cores are shared.
    torch.set_num_threads(1)
    steps, num_test = (15, 8) if args.quick else (200, 64)

    train_inliers, test_inliers = halves(load_photographs(CLASSES))
    train_outliers, test_outliers = halves(load_photographs(SHOWN))
    _, unseen_outliers = halves(load_photographs(UNSEEN))
    # The same test mosaics for every seed: the spread is that of the training.
    unseen = make_mosaics(num_test, test_inliers, unseen_outliers, np.random.default_rng(1000))
    shown = make_mosaics(num_test, test_inliers, test_outliers, np.random.default_rng(1001))

    results: dict[str, list[Metrics]] = {method: [] for method in METHODS}
    logits: dict[str, Tensor] = {}  # on the never-shown test mosaics, of the last seed
    total = args.seeds * len(METHODS) * steps
    with tqdm(total=total, desc="training", mininterval=0.5) as progress:
        for seed in range(args.seeds):
            for name, method in METHODS.items():
                network = train(train_inliers, train_outliers, method, seed, steps, progress)
                logits[name] = predict(network, unseen)
                results[name].append(
                    {
                        "accuracy, inlier pixels": pixel_accuracy(logits[name], unseen.target),
                        **pixel_detection(logits[name], unseen.target, "never shown"),
                        **pixel_detection(predict(network, shown), shown.target, "shown"),
                    }
                )

    share = (unseen.target == OUTLIER).sum() / (unseen.target != VOID).sum()
    print_table(
        f"Pixels of {num_test} test mosaics, %, mean ± standard deviation over {args.seeds} "
        f"seed(s); {100 * share:.0f} % are never-shown outliers",
        results,
    )
    print(f"\n{METRICS_NOTE}")
    print("shown: outliers cut from the other half of the photographs shown in training.\n")
    save_figure(draw(unseen, logits), args.out / "textures.png")
    # A step of this training, and one of the size of street scenes.
    batches = [Batch(BATCH_SIZE, SIZE, len(CLASSES)), Batch(2, 512, 19)]
    print_costs(batches, num_pairs=5 if args.quick else 30)


if __name__ == "__main__":
    main()

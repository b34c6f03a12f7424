"""The pictures of bench/RESULTS.md and README.md."""

from __future__ import annotations

import matplotlib
from cases import Shape
from measured import Measured
from results import FOLDER, MemoryRow, parse_shape

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = {
    "ours": "#009E73",
    "pytorch-ood": "#D55E00",
    "compiled": "#E69F00",
    "cross_entropy": "#0072B2",
    "unfused": "#CC79A7",
    "sum": "#56B4E9",
    "clone": "#767676",
}
MARKERS = {"ours": "o", "pytorch-ood": "s", "cross_entropy": "^", "unfused": "D", "clone": ""}
LABELS = {
    "ours": "oe_ext",
    "pytorch-ood": "pytorch-ood",
    "compiled": "torch.compile",
    "cross_entropy": "F.cross_entropy",
    "unfused": "F.interpolate, then oe_ext",
    "sum": "logits.sum()",
    "clone": "logits.clone()",
}

plt.rcParams.update(
    {
        "figure.dpi": 150,
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)


def save(figure: Figure, name: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Omits the version of matplotlib, so the same numbers give the same file.
    figure.savefig(FOLDER / name, metadata={"Software": None})
    plt.close(figure)


def shape_label(shape: Shape) -> str:
    """Positions and classes on two lines, which need no legend."""
    if len(shape) == 2:
        return f"{shape[0]} x {shape[1]}"
    return f"{shape[0]} x {shape[1]} x\n{shape[2]} x {shape[3]}"


def bars(ax: Axes, names: list[str], values: list[list[float]], style: str) -> None:
    """A group of bars per case: one bar per name, with its value on top."""
    width = 0.84 / len(names)
    for index, name in enumerate(names):
        x = [i + (index - (len(names) - 1) / 2) * width for i in range(len(values))]
        drawn = ax.bar(
            x,
            [line[index] for line in values],
            0.92 * width,
            color=COLORS[name],
            label=LABELS[name],
        )
        ax.bar_label(drawn, fmt=style, padding=2, fontsize=7.5, color="#333333")


def draw_speed(cases: list[Measured]) -> None:
    names = ["pytorch-ood", "compiled", "cross_entropy"]
    values = [[case.over_ours(name) or float("nan") for name in names] for case in cases]
    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    bars(ax, names, values, "%.3g")
    ax.set_yscale("log")
    ax.axhline(1, color=COLORS["ours"], linewidth=1.6, label=LABELS["ours"])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    ax.set_xticks(range(len(cases)), [shape_label(case.shape) for case in cases])
    ax.tick_params(axis="x", length=0)
    ax.margins(x=0.01, y=0.12)
    ax.set_title("Forward + backward, float32, CPU: time over that of oe_ext", loc="left", pad=26)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=4, borderaxespad=0.2)
    save(figure, "speed.png")


def curves(ax: Axes, x: list[int], cases: list[Measured]) -> None:
    """The time of each rival of the cases."""
    for name in (name for name in MARKERS if cases[0].find(name)):
        y = [row.median_us for case in cases if (row := case.find(name))]
        line = "--" if name == "clone" else "-"
        label = "logits.clone(): the floor" if name == "clone" else LABELS[name]
        width, marker = 2.2 if name == "ours" else 1.5, MARKERS[name]
        ax.plot(x, y, line, marker=marker, markersize=4, color=COLORS[name], lw=width, label=label)
    ax.set(xscale="log", yscale="log")
    ax.grid(color="#dddddd", linewidth=0.7)


def draw_curves(rows: list[Measured], classes: list[Measured]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained", sharey=True)
    for ax, cases, axis in zip(axes, (rows, classes), (0, 1), strict=True):
        curves(ax, [case.shape[axis] for case in cases], cases)
    axes[0].set(xlabel="rows N", ylabel="µs")
    axes[0].set_title(f"{rows[0].shape[1]} classes", loc="left")
    axes[1].set(xlabel="classes C")
    axes[1].set_title(f"{classes[0].shape[0]} rows", loc="left")
    axes[0].legend(loc="upper left")
    figure.suptitle("Forward + backward, float32, CPU: time of one call", weight="bold", x=0.27)
    save(figure, "curves.png")


def draw_upsampled(scales: list[Measured], classes: list[Measured]) -> None:
    def scale(case: Measured) -> int:
        return case.size[0] // case.shape[2]

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained", sharey=True)
    for ax, cases, x in (
        (axes[0], scales, [scale(case) for case in scales]),
        (axes[1], classes, [case.shape[1] for case in classes]),
    ):
        curves(ax, x, cases)
        ax.set_xticks(x, map(str, x))
        ax.xaxis.set_minor_locator(NullLocator())
    height, width = scales[0].size
    axes[0].set(xlabel="scale", ylabel="µs")
    axes[0].set_title(f"{scales[0].shape[1]} classes", loc="left")
    axes[1].set(xlabel="classes C")
    axes[1].set_title(f"scale {scale(classes[0])}", loc="left")
    axes[1].legend(loc="upper left")
    title = f"Forward + backward to {height} x {width}, float32, CPU: time of one call"
    figure.suptitle(title, weight="bold", x=0.01, ha="left")
    save(figure, "upsampled.png")


def draw_memory(rows: list[MemoryRow]) -> None:
    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.rival for row in rows))
    ratios = {(row.shape, row.rival): row.ratio for row in rows}
    figure, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
    bars(ax, names, [[ratios[shape, name] for name in names] for shape in shapes], "%.2f")
    ax.axhline(1, color="#333333", linewidth=1, linestyle="--")
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    labels = [
        " x ".join(map(str, parse_shape(shape))) + f" ({megabytes(rows, shape):.0f} MB)"
        for shape in shapes
    ]
    ax.set_xticks(range(len(shapes)), labels)
    ax.tick_params(axis="x", length=0)
    ax.margins(x=0.02, y=0.12)
    ax.set_title(
        "Peak memory of forward + backward beside the logits, in sizes of the logits\n"
        "(dashed: one gradient)",
        loc="left",
    )
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, "memory.png")


def megabytes(rows: list[MemoryRow], shape: str) -> float:
    return next(row.logits_bytes for row in rows if row.shape == shape) / 1e6

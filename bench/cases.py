"""The measured cases: shapes, dtypes, layouts, and the goals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALPHA = 0.5
OOD_INDEX = 254  # the label of outliers in unsigned targets
BLOCK = 16  # pixels, the side of the squares of equal labels

Shape = tuple[int, ...]


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Goals(NamedTuple):
    """At least theirs / ours, at most ours / clone and ours / sum."""

    pytorch_ood: float
    compiled: float
    cross_entropy: float
    clone: float | None
    sum: float


GOALS: dict[Shape, Goals] = {
    (384, 10): Goals(10, 4, 2.5, None, 1.6),
    (384, 100): Goals(12, 4, 2, None, 1.4),
    (384, 1000): Goals(20, 4, 2.5, None, 1.5),
    (4096, 1000): Goals(30, 4, 5, 1.4, 1.3),
    (1024, 32000): Goals(12, 2.4, 3, 1.2, 1.1),
    (8, 2, 256, 256): Goals(12, 6, 2, None, 4),
    (2, 19, 512, 512): Goals(12, 4, 3, 1.3, 1.4),
    (1, 150, 512, 512): Goals(12, 4, 3.5, 1.2, 1.2),
}
QUICK_SHAPES: list[Shape] = [(384, 10), (384, 1000), (2, 19, 128, 128)]

ALL_RIVALS = ("ours", "pytorch-ood", "compiled", "cross_entropy", "sum", "clone")
EAGER_RIVALS = ("ours", "pytorch-ood", "cross_entropy", "sum", "clone")
FUSED_RIVALS = ("ours", "compiled", "cross_entropy", "sum", "clone")
BASIC_RIVALS = ("ours", "cross_entropy", "sum", "clone")
# Ours has both options, and so has cross_entropy; the others have what their name says.
OPTION_RIVALS = ("ours", "off", "weight", "label_smoothing", "cross_entropy", "cross_entropy off")
CUDA_RIVALS = ("ours", "pytorch-ood", "compiled", "cross_entropy", "liger", "quack", "clone")

SECTIONS = (
    "goals",
    "dtypes",
    "layouts",
    "targets",
    "reductions",
    "options",
    "inference",
    "threads",
    "rows",
    "classes",
    "upsampled",  # and every section whose name begins with it
)


@dataclass(frozen=True)
class Case:
    section: str
    shape: Shape
    rivals: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    target_dtype: torch.dtype = torch.int64
    reduction: str = "mean"
    inference: bool = False
    size: Shape = ()  # of the target's images, if the logits are upsampled to it
    align_corners: bool = False
    labels: str = "random"  # or "blocks"
    budget: float = 3.0  # seconds for the measured rounds, as far as the fewest rounds allow

    def __str__(self) -> str:
        size = f" to {self.size}" if self.size else ""
        return f"{self.section} {self.shape}{size} {dtype_text(self.dtype)}"


class Inputs(NamedTuple):
    logits: Tensor
    target: Tensor
    classes: Tensor  # int64, with class 0 in place of every outlier: what F.cross_entropy takes
    ood_index: int | None
    weight: Tensor | None  # the upstream gradient, if the loss is not a scalar
    options: dict[str, Any]  # of ours, and of F.cross_entropy where it has them


def make_logits(shape: Shape, layout: str) -> Tensor:
    if layout == "transposed":
        return torch.randn(shape[::-1]).t()
    if layout == "sliced":
        return torch.randn(shape[0], shape[1] + 28)[:, : shape[1]]
    logits = torch.randn(shape)
    if layout == "channels_last":
        return logits.contiguous(memory_format=torch.channels_last)
    return logits


def make_labels(case: Case) -> Tensor:
    """Of which about half are those of outliers. In blocks, most neighbours are equal, as they are
    in pictures."""
    num_classes = case.shape[1]
    size = case.size or case.shape[2:]
    if case.labels == "random":
        return torch.randint(-num_classes, num_classes, (case.shape[0], *size))
    blocks = [-(-side // BLOCK) for side in size]
    labels = torch.randint(-num_classes, num_classes, (case.shape[0], *blocks))
    for axis, side in enumerate(size, start=1):
        labels = labels.repeat_interleave(BLOCK, axis).narrow(axis, 0, side)
    return labels.contiguous()


def make_inputs(case: Case, device: str) -> Inputs:
    """Random logits and labels."""
    torch.manual_seed(0)
    num_classes = case.shape[1]
    with torch.device(device):
        logits = make_logits(case.shape, case.layout).to(case.dtype).detach()
        labels = make_labels(case)
    logits.requires_grad_(not case.inference)
    target, ood_index = labels, None
    if not case.target_dtype.is_signed:
        target, ood_index = labels.where(labels >= 0, OOD_INDEX), OOD_INDEX
    weight = None
    if case.reduction == "none":
        dtype = torch.promote_types(case.dtype, torch.float32)
        weight = torch.rand(labels.shape, dtype=dtype, device=device)
    options: dict[str, Any] = {}
    if case.section == "options":
        options = {"weight": torch.rand(num_classes, device=device) + 0.5, "label_smoothing": 0.1}
    if case.size:
        options = {"upsample": "bilinear", "align_corners": case.align_corners}
    classes = labels.clamp(min=0)
    return Inputs(logits, target.to(case.target_dtype), classes, ood_index, weight, options)


def goal_cases(shapes: list[Shape], dtype: torch.dtype) -> list[Case]:
    # pytorch-ood raises for (N, C) logits of any dtype but float32.
    rivals = ALL_RIVALS if dtype == torch.float32 else FUSED_RIVALS
    return [Case("goals", shape, rivals, dtype, budget=6.0) for shape in shapes]


def quick_cases(dtype: torch.dtype) -> list[Case]:
    return [replace(case, budget=1.0) for case in goal_cases(QUICK_SHAPES, dtype)]


def memory_cases() -> list[Case]:
    return [
        Case("memory", (1024, 32000), ALL_RIVALS),
        Case("memory", (1, 150, 512, 512), ALL_RIVALS),
        Case("memory", (1, 19, 128, 128), ("ours", "unfused"), size=(1024, 1024)),
    ]


def all_cases() -> list[Case]:
    """The whole suite on the CPU, but for upsampled.py's."""
    dtypes = [
        *(
            Case("dtypes", shape, FUSED_RIVALS, torch.bfloat16)
            for shape in [(384, 100), (4096, 1000), (1024, 32000), (2, 19, 512, 512)]
        ),
        *(
            Case("dtypes", shape, BASIC_RIVALS, dtype)
            for dtype in (torch.float16, torch.float64)
            for shape in [(384, 100), (4096, 1000), (2, 19, 512, 512)]
        ),
    ]
    layouts = [
        Case("layouts", shape, EAGER_RIVALS, layout=layout)
        for layout, shapes in {
            "channels_last": [(8, 2, 256, 256), (2, 19, 512, 512), (1, 150, 256, 256)],
            "transposed": [(384, 10), (4096, 100), (4096, 1000)],
            "sliced": [(384, 100), (4096, 1000)],
        }.items()
        for shape in shapes
    ]
    targets = [
        Case("targets", shape, BASIC_RIVALS, target_dtype=target_dtype)
        for shape, target_dtype in [
            ((8, 2, 256, 256), torch.uint8),
            ((2, 19, 512, 512), torch.uint8),
            ((2, 19, 512, 512), torch.int32),
        ]
    ]
    reductions = [
        Case("reductions", shape, rivals, reduction=reduction)
        for reduction, rivals in {
            "sum": EAGER_RIVALS,
            "none": EAGER_RIVALS,
            "group_mean": ("ours", "sum", "clone"),
        }.items()
        for shape in [(384, 100), (4096, 1000), (2, 19, 512, 512)]
    ]
    options = [Case("options", shape, OPTION_RIVALS) for shape in [(4096, 1000), (2, 19, 512, 512)]]
    inference_rivals = ("ours", "pytorch-ood", "cross_entropy", "sum")
    inference = [Case("inference", shape, inference_rivals, inference=True) for shape in GOALS]
    threads = [
        Case("threads", shape, ("ours", "clone"))
        for shape in [(4096, 1000), (1024, 32000), (2, 19, 512, 512), (1, 150, 512, 512)]
    ]
    curve_rivals = ("ours", "pytorch-ood", "cross_entropy", "clone")
    rows = [Case("rows", (4**i, 100), curve_rivals, budget=1.0) for i in range(2, 9)]
    classes = [Case("classes", (256, 4**i), curve_rivals, budget=1.0) for i in range(1, 9)]
    return [
        *goal_cases(list(GOALS), torch.float32),
        *dtypes,
        *layouts,
        *targets,
        *reductions,
        *options,
        *inference,
        *threads,
        *rows,
        *classes,
    ]


def cuda_cases() -> list[Case]:
    """The suite on a GPU, the most important cases first, since the time may run out. The check of
    the largest against float64 takes up to 20 GB of the GPU's memory."""
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    language, more_classes = (8192, 32000), (2048, 128256)
    cityscapes, ade20k = (2, 19, 1024, 2048), (8, 150, 512, 512)

    def case(shape: Shape, dtype: torch.dtype = float32, **others: Any) -> Case:
        return Case("cuda", shape, CUDA_RIVALS, dtype, budget=1.0, **others)

    return [
        *(case(shape, dtype) for dtype in (float32, bfloat16) for shape in GOALS),
        *(case(shape, dtype) for dtype in (bfloat16, float32) for shape in (cityscapes, ade20k)),
        *(case(shape, bfloat16) for shape in (language, more_classes)),
        *(case(shape, float16) for shape in (*GOALS, language, cityscapes)),
        *(case(shape, inference=True) for shape in [(384, 100), (4096, 1000), cityscapes]),
        case(language, bfloat16, inference=True),
        *(case(shape, reduction="none") for shape in [(4096, 1000), cityscapes]),
        case(language, bfloat16, reduction="none"),
        case(cityscapes, layout="channels_last"),
        case(cityscapes, target_dtype=torch.uint8),
    ]


def quick_cuda_cases() -> list[Case]:
    return [
        Case("cuda", shape, CUDA_RIVALS, dtype, budget=0.3)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in QUICK_SHAPES
    ]

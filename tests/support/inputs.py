"""Inputs for the tests: logits in every layout, targets of every mix."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100
REDUCTIONS = ["none", "sum", "mean", "group_mean"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INT_DTYPES = [torch.int64, torch.int32, torch.int16, torch.int8]
INT_DTYPES += [torch.uint8, torch.uint16, torch.uint32]

# By code path: one class; fewer than a vector of any dtype; a prime; one below and one above a
# vector; around eight class blocks of 16; a row that one warp processes, and one that takes a
# block.
CLASS_COUNTS = [1, 2, 3, 7, 9, 16, 127, 129, 1000, 1031]

SHAPES = {
    "2d": (13, 5),
    "3d": (4, 5, 6),
    "4d": (3, 5, 4, 7),
    "5d": (2, 5, 3, 2, 4),
}


def make_logits(shape, dtype=torch.float64, device="cpu", *, scale=3.0, offset=0.0) -> Tensor:
    """Random logits, with the same values in every dtype that can hold them."""
    values = torch.randn(shape, dtype=torch.float64) * scale + offset
    return values.to(device=device, dtype=dtype)


def make_target(shape, mix="mixed", dtype=torch.int64, device="cpu") -> Tensor:
    """Labels for logits of ``shape``: -1 and -7 are outliers, IGNORE is ignored.

    ``mix`` is "mixed", "inliers", "outliers" or "ignored".
    """
    num_classes = shape[1]
    shape = (shape[0], *shape[2:])
    labels = torch.randint(0, num_classes, shape)
    special_labels = torch.tensor([-1, -7, IGNORE])[torch.randint(0, 3, shape)]
    if mix == "mixed":
        labels = torch.where(torch.rand(shape) < 0.5, special_labels, labels)
    elif mix == "outliers":
        labels = torch.where(special_labels == IGNORE, -1, special_labels)
    elif mix == "ignored":
        labels = torch.full(shape, IGNORE)
    elif mix != "inliers":
        raise ValueError(mix)
    return labels.to(device=device, dtype=dtype)


def _channels_last(x: Tensor) -> Tensor:
    """Classes innermost in memory, as after a channels_last convolution."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _transposed(x: Tensor) -> Tensor:
    """The axes in reverse order in memory."""
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def _sliced(x: Tensor) -> Tensor:
    """Classes 1 .. C of C + 2, which skews the base pointer and breaks the alignment of rows."""
    shape = list(x.shape)
    shape[1] += 2
    out = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device).narrow(1, 1, x.shape[1])
    return out.copy_(x)


def _strided(x: Tensor) -> Tensor:
    """Every second class of a tensor twice the size."""
    shape = list(x.shape)
    shape[1] *= 2
    out = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)[:, ::2]
    return out.copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """One element for the whole batch: stride 0."""
    return x[:1].expand(x.shape)


def _one_class(x: Tensor) -> Tensor:
    """One value for all classes: one stride covers all rows, but not those of the gradient."""
    return x[:, :1].contiguous().expand(x.shape)


def _cropped(x: Tensor) -> Tensor:
    """A crop of a larger image: no single stride covers its pixels."""
    if x.dim() < 4:
        return _sliced(x)
    shape = [*x.shape[:-1], x.shape[-1] + 2]
    out = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)[..., 1:-1]
    return out.copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "strided": _strided,
    "expanded": _expanded,
    "one class": _one_class,
    "cropped": _cropped,
}
# The layouts that are read without a copy.
UNCOPIED_LAYOUTS = ["contiguous", "channels_last", "sliced", "strided", "expanded", "one class"]


def is_read_in_place(logits: Tensor) -> bool:
    """Does a single stride cover the pixels? If not, the logits are copied once."""
    try:
        logits.view(*logits.shape[:2], -1 if logits.numel() > 0 else 0)
    except RuntimeError:
        return False
    return True


# Class weights, label smoothing, or both.
OPTIONS = ["weight", "smoothing", "both"]


def make_options(names, num_classes, dtype=torch.float64, device="cpu"):
    options = {}
    if names != "smoothing":
        weight = torch.rand(num_classes, dtype=torch.float64) * 3
        weight[::3] = 0
        options["weight"] = weight.to(device=device, dtype=dtype)
    if names != "weight":
        options["label_smoothing"] = 0.1
    return options

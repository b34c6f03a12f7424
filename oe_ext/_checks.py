"""Checks that Python makes before the operator, whose own checks would come too late, could not
name the caller's argument, or would print all of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import Proxy

from oe_ext._reductions import REDUCTIONS

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed import ProcessGroup
else:

    class ProcessGroup:
        """For annotations, if torch was built without distributed."""


__all__ = [
    "TENSORS",
    "WORLD",
    "Counts",
    "ProcessGroup",
    "as_counts",
    "as_group",
    "as_label_smoothing",
    "as_number",
    "as_reduction",
    "as_special_label",
    "check_alpha",
    "check_arguments",
    "check_group",
    "check_tensors",
    "check_upsample",
    "check_weight",
]

_LOSS = torch.ops.oe_ext.outlier_exposure_loss
_UPSAMPLED_LOSS = torch.ops.oe_ext.upsampled_outlier_exposure_loss
_NAME = "outlier_exposure_loss"

# A tensor, or its proxy while torch.fx traces.
TENSORS = (Tensor, Proxy)
# The sum over inliers and over outliers that a mean divides by.
Counts = Tensor | Sequence["float | Tensor"]
# The name of the group of all processes, which may not exist yet.
WORLD = "world"


def _kind(value: object) -> str:
    """Describes an argument in an error: never by its value, which may be a batch."""
    return "None" if value is None else type(value).__name__


def check_tensors(logits: object, target: object) -> None:
    for name, value in (("logits", logits), ("target", target)):
        if not isinstance(value, TENSORS):
            raise TypeError(f"{_NAME}: {name} must be a tensor, got {_kind(value)}")


def as_reduction(reduction: object, caller: str = _NAME) -> str:
    if reduction is None:
        return "none"
    if isinstance(reduction, str):
        return str(reduction)
    raise TypeError(
        f"{caller}: reduction must be None or one of {', '.join(REDUCTIONS)}, "
        f"got {_kind(reduction)}"
    )


def as_number(value: Any, caller: str = _NAME, name: str = "alpha") -> float:
    """Converts an alpha that is not a tensor, or another number."""
    try:
        if isinstance(value, str | bytes):  # float() would accept these
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        tensor = " or a tensor" if name == "alpha" else ""
        raise TypeError(f"{caller}: {name} must be a number{tensor}, got {_kind(value)}") from None
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{caller}: {name} must be a finite number, got {number}")
    return number


def as_label_smoothing(value: Any, caller: str = _NAME) -> float:
    if isinstance(value, Proxy) or torch.compiler.is_dynamo_compiling():
        return cast(float, value)  # the operator checks it
    number = as_number(value, caller, "label_smoothing")
    if not 0 <= number <= 1:
        raise ValueError(f"{caller}: label_smoothing must be in [0, 1], got {number}")
    return number


def check_weight(weight: Any, caller: str = _NAME) -> None:
    """Checks what does not depend on the logits."""
    if weight is None or isinstance(weight, Proxy):
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{caller}: weight must be a tensor or None, got {_kind(weight)}")
    if not weight.is_floating_point():
        raise TypeError(f"{caller}: weight must have a floating-point dtype, got {weight.dtype}")
    if weight.dim() != 1:
        raise ValueError(
            f"{caller}: weight must have one element per class, so one axis, got shape "
            f"{list(weight.shape)}"
        )


def check_upsample(upsample: Any, align_corners: Any, caller: str = _NAME) -> None:
    if upsample is not None and upsample != "bilinear":
        raise ValueError(f"{caller}: upsample must be None or 'bilinear', got {upsample!r}")
    if not isinstance(align_corners, bool):
        raise TypeError(f"{caller}: align_corners must be a bool, got {_kind(align_corners)}")
    if align_corners and upsample is None:
        raise ValueError(f"{caller}: align_corners=True needs upsample='bilinear', got None")


def as_counts(counts: Any, logits: Tensor) -> Tensor:
    """Two numbers, or tensors, as one tensor, without waiting for a device."""
    if isinstance(counts, TENSORS):
        return cast(Tensor, counts.to(torch.float64))
    if not isinstance(counts, tuple | list) or len(counts) != 2:
        length = f" of {len(counts)}" if isinstance(counts, tuple | list) else ""
        raise TypeError(
            f"{_NAME}: counts must be a pair (of inliers, of outliers) or a tensor of two "
            f"elements, got {_kind(counts)}{length}"
        )
    # Products, because torch.compile treats a number as a variable only there.
    one = torch.ones((), dtype=torch.float64, device=logits.device)
    return torch.stack([one * _as_count(count) for count in counts])


def _as_count(count: Any) -> Any:
    if isinstance(count, TENSORS) or torch.compiler.is_dynamo_compiling():
        return count
    number = as_number(count, name="an element of counts")
    if number < 0:
        raise ValueError(f"{_NAME}: counts must not be negative, got {number}")
    return number


def as_special_label(name: str, label: Any, caller: str = _NAME) -> int | None:
    """Converts ignore_index or ood_index. False is an integer in Python, but not a label."""
    if label is None or type(label) is int:
        return label
    if isinstance(label, torch.SymInt | Proxy):
        return cast(int, label)
    is_bool = isinstance(label, bool) or getattr(label, "dtype", None) == torch.bool
    try:
        if not is_bool:
            return operator.index(label)
    except TypeError:
        pass
    raise TypeError(f"{caller}: {name} must be an integer or None, got {_kind(label)}")


def check_group(group: ProcessGroup | str | None, caller: str = _NAME) -> None:
    if isinstance(group, str):
        if group != WORLD:
            raise ValueError(
                f"{caller}: process_group must be None, {WORLD!r} or a ProcessGroup, got {group!r}"
            )
    elif group is not None and not isinstance(group, ProcessGroup):
        raise TypeError(
            f"{caller}: process_group must be None, {WORLD!r} or a ProcessGroup, got {_kind(group)}"
        )


def as_group(group: ProcessGroup | str | None) -> ProcessGroup | None:
    """The group that a name means at this moment: None if this process is alone."""
    if not isinstance(group, str):
        return group
    check_group(group)
    distributed = torch.distributed
    shared = distributed.is_available() and distributed.is_initialized()
    return distributed.group.WORLD if shared else None


def check_alpha(alpha: float | Tensor, caller: str = _NAME) -> None:
    """For callers that convert alpha before the operator can check it."""
    if not isinstance(alpha, TENSORS):
        as_number(alpha, caller)
    elif isinstance(alpha, Tensor) and not alpha.is_floating_point():
        raise TypeError(
            f"{caller}: a tensor alpha must have a floating-point dtype, got {alpha.dtype}"
        )


def check_arguments(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool | None = None,
) -> None:
    """Raises the operator's errors for shapes, dtypes and settings: its Meta kernel checks all but
    the labels. ``align_corners``: of logits that are upsampled; else None."""
    with torch.no_grad():
        packet = _LOSS if align_corners is None else _UPSAMPLED_LOSS
        resize = {} if align_corners is None else {"align_corners": align_corners}
        operator = packet.default
        if isinstance(alpha, Tensor):
            operator, alpha = packet.tensor_alpha, alpha.to("meta")
        operator(
            logits.to("meta"),
            target.to("meta"),
            alpha,
            reduction,
            weight=None if weight is None else weight.to("meta"),
            label_smoothing=label_smoothing,
            **resize,
        )

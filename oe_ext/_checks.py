"""Checks that Python makes before the operator, whose own checks would come too late, could not
name the caller's argument, or would print all of it."""

from __future__ import annotations

import math
import operator
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
    "ProcessGroup",
    "as_group",
    "as_number",
    "as_reduction",
    "as_special_label",
    "check_alpha",
    "check_arguments",
    "check_group",
    "check_tensors",
]

_LOSS = torch.ops.oe_ext.outlier_exposure_loss
_NAME = "outlier_exposure_loss"

# A tensor, or its proxy while torch.fx traces.
TENSORS = (Tensor, Proxy)
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


def as_number(alpha: Any, caller: str = _NAME) -> float:
    """Converts an alpha that is not a tensor."""
    try:
        if isinstance(alpha, str | bytes):  # float() would accept these
            raise TypeError
        number = float(alpha)
    except (TypeError, ValueError):
        raise TypeError(
            f"{caller}: alpha must be a number or a tensor, got {_kind(alpha)}"
        ) from None
    except OverflowError:  # an integer that no float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{caller}: alpha must be a finite number, got {number}")
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


def check_arguments(logits: Tensor, target: Tensor, alpha: float | Tensor, reduction: str) -> None:
    """Raises the operator's errors for shapes, dtypes and settings: its Meta kernel checks all but
    the labels."""
    with torch.no_grad():
        if isinstance(alpha, Tensor):
            alpha = alpha.to("meta")
            _LOSS.tensor_alpha(logits.to("meta"), target.to("meta"), alpha, reduction)
        else:
            _LOSS.default(logits.to("meta"), target.to("meta"), alpha, reduction)

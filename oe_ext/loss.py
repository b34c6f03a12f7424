"""The loss as a module, which replaces pytorch-ood's module of the same name."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from oe_ext._checks import (
    WORLD,
    Counts,
    ProcessGroup,
    as_group,
    as_label_smoothing,
    as_reduction,
    as_special_label,
    check_alpha,
    check_group,
    check_upsample,
    check_weight,
)
from oe_ext._reductions import find_reduction
from oe_ext.functional import LossScores, LossStats, outlier_exposure_loss

__all__ = ["OutlierExposureLoss"]

_NAME = "OutlierExposureLoss"


class OutlierExposureLoss(torch.nn.Module):
    """Cross-entropy on labelled positions plus ``alpha`` times cross-entropy to the uniform
    distribution on outliers, in one fused operator.

    See :func:`oe_ext.outlier_exposure_loss` for the formula, the shapes and the dtypes. The first
    two arguments are those of ``pytorch_ood.loss.OutlierExposureLoss``.

    Args:
        alpha: weight of the outliers: a finite number, or a tensor that broadcasts against the
            target. A :class:`torch.nn.Parameter` becomes a parameter of this module and is
            learned; another tensor becomes a buffer. A new value of any of these kinds may be
            assigned later.
        reduction: ``"none"`` or ``None``, ``"sum"``, ``"mean"`` or ``"group_mean"``.
        weight: weights of the classes, ``[C]``, a buffer as in :class:`torch.nn.CrossEntropyLoss`:
            it moves with the module and is part of its ``state_dict``.
        label_smoothing: the part of an inlier's distribution that is uniform, in [0, 1].
        ignore_index: positions with this label are ignored. By default none are.
        ood_index: the label of outliers, instead of the negative numbers.
        upsample: ``"bilinear"`` for logits of a lower resolution than the target.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        process_group: the processes that share a batch, for the global means. ``"world"`` means
            all processes at the time of a call, so a module may be built before
            ``init_process_group()``. ``dist.group.WORLD`` is still None then, which means this
            process alone. A copy of the module has the same group. A pickle can hold ``"world"``,
            which then means the processes of its reader, but no other group.
        return_stats: the module also returns :class:`oe_ext.LossStats`.
        return_scores: the module also returns :class:`oe_ext.LossScores`.

    Raises:
        ValueError: an unknown reduction or process_group name, an alpha that is not finite, a
            weight that is not one-dimensional, a label_smoothing outside [0, 1], or an unknown
            upsample.
        TypeError: an alpha that is neither a number nor a floating-point tensor, a weight that is
            not a floating-point tensor, or a special label that is not an integer.
    """

    alpha: float | Tensor
    weight: Tensor | None

    def __init__(
        self,
        alpha: float | Tensor = 0.5,
        reduction: str | None = "mean",
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        ood_index: int | None = None,
        upsample: Literal["bilinear"] | None = None,
        align_corners: bool = False,
        process_group: ProcessGroup | str | None = None,
        return_stats: bool = False,
        return_scores: bool = False,
    ) -> None:
        super().__init__()
        find_reduction(as_reduction(reduction, _NAME), _NAME)
        self.alpha = alpha
        self.reduction = reduction
        check_weight(weight, _NAME)
        self.register_buffer("weight", weight)
        self.label_smoothing = as_label_smoothing(label_smoothing, _NAME)
        self.ignore_index = as_special_label("ignore_index", ignore_index, _NAME)
        self.ood_index = as_special_label("ood_index", ood_index, _NAME)
        check_upsample(upsample, align_corners, _NAME)
        self.upsample = upsample
        self.align_corners = align_corners
        self.process_group = process_group
        self.return_stats = return_stats
        self.return_scores = return_scores

    def forward(
        self, logits: Tensor, target: Tensor, *, counts: Counts | None = None
    ) -> Tensor | tuple[Tensor | LossStats | LossScores, ...]:
        """The loss of ``logits`` ``[N, C, ...]`` for the labels ``target`` ``[N, ...]``, with the
        requested statistics. With ``upsample``, ``logits`` ``[N, C, h, w]`` and ``target``
        ``[N, H, W]``. ``counts`` replace those of this target in a mean."""
        return outlier_exposure_loss(
            logits,
            target,
            self.alpha,
            self.reduction,
            weight=self.weight,
            label_smoothing=self.label_smoothing,
            counts=counts,
            ignore_index=self.ignore_index,
            ood_index=self.ood_index,
            upsample=self.upsample,
            align_corners=self.align_corners,
            process_group=self.process_group,
            return_stats=self.return_stats,
            return_scores=self.return_scores,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Accepts a new alpha of any kind: a number, a tensor (a buffer, which moves with the
        module) or a parameter."""
        if name == "alpha":
            check_alpha(value, _NAME)
            for place in (self.__dict__, self._buffers, self._parameters):
                place.pop(name, None)
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value)
                return
        super().__setattr__(name, value)

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it, also for submodules
        raise NotImplementedError(
            "OutlierExposureLoss cannot be compiled with torch.jit.script, which PyTorch has "
            "deprecated. Use torch.compile to train, or torch.export to ship a model, or script "
            "the model without its loss"
        )

    @property
    def process_group(self) -> ProcessGroup | None:
        """The group at this moment: ``"world"`` is resolved, to None if this process is alone."""
        return as_group(self._process_group)

    @process_group.setter
    def process_group(self, group: ProcessGroup | str | None) -> None:
        check_group(group, _NAME)
        # Stores the group of all processes by name. A module that held the group itself would keep
        # it alive after destroy_process_group(), and its threads after the interpreter, which
        # aborts such a process.
        is_world = group is not None and group is torch.distributed.group.WORLD
        self._process_group: ProcessGroup | str | None = WORLD if is_world else group

    def __deepcopy__(self, memo: dict[int, Any]) -> OutlierExposureLoss:
        memo[id(self._process_group)] = self._process_group  # shared, not copied
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self._process_group, str | None):
            raise RuntimeError(
                "OutlierExposureLoss: of process groups only that of all processes can be "
                "pickled; set process_group to None before, or save the state_dict"
            )
        return self.__dict__.copy()

    def extra_repr(self) -> str:
        if not isinstance(self.alpha, Tensor):
            alpha = f"{self.alpha:g}"
        elif self.alpha.numel() == 1 and not self.alpha.is_meta:
            alpha = f"{self.alpha.item():g}"
        else:
            alpha = f"Tensor of shape {list(self.alpha.shape)}"
        return (
            f"alpha={alpha}, reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"ood_index={self.ood_index}" + "".join(f", {name}" for name in self._switches())
        )

    def _switches(self) -> list[str]:
        """The settings that repr shows only if they are set."""
        switches = []
        if self.weight is not None:
            switches.append(f"weight=<of {len(self.weight)} classes>")
        if self.label_smoothing != 0:
            switches.append(f"label_smoothing={self.label_smoothing:g}")
        if self.upsample is not None:
            switches.append(f"upsample={self.upsample!r}")
        names = ("align_corners", "return_stats", "return_scores")
        switches += [f"{name}=True" for name in names if getattr(self, name)]
        group = self.process_group
        if group is not None:
            name = f" ({WORLD!r})" if self._process_group == WORLD else ""
            switches.append(f"process_group=<of {group.size()} processes>{name}")
        elif self._process_group is not None:  # "world", before init_process_group()
            switches.append(f"process_group={self._process_group!r}")
        return switches

"""The loss as a module: what a pytorch-ood user imports instead of pytorch-ood's own."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oe_ext.functional import LossScores, LossStats, outlier_exposure_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["OutlierExposureLoss"]

# Stands for the group of all processes. The group itself, held by a module, would outlive
# destroy_process_group(), and its threads the interpreter, which ends such a process by an abort.
_WORLD = "world"

REDUCTIONS = ("none", "sum", "mean", "group_mean")


class OutlierExposureLoss(torch.nn.Module):
    """Cross-entropy on labelled positions plus ``alpha`` times cross-entropy to the uniform
    distribution on outliers, in one fused operator.

    See :func:`oe_ext.outlier_exposure_loss` for the formula, the shapes and the dtypes. The first
    two arguments are those of ``pytorch_ood.loss.OutlierExposureLoss``.

    Args:
        alpha: weight of the outliers: a finite number, or a tensor that broadcasts against the
            target. A :class:`torch.nn.Parameter` becomes a parameter of this module and is
            learned; another tensor becomes a buffer.
        reduction: ``"none"`` or ``None``, ``"sum"``, ``"mean"`` or ``"group_mean"``.
        ignore_index: positions with this label count for nothing. Default: none are ignored.
        ood_index: the label that marks an outlier, instead of the negative numbers.
        process_group: the processes that share a batch, for the global means. A copy has the same
            group. A pickle can say "all processes", which will be those of who reads it (alone, if
            there are no others), but no other group.
        return_stats: the module also returns :class:`oe_ext.LossStats`.
        return_scores: the module also returns :class:`oe_ext.LossScores`, of each position.

    Raises:
        ValueError: a reduction that is none of the above, or a number that is not finite.
    """

    alpha: float | Tensor

    def __init__(
        self,
        alpha: float | Tensor = 0.5,
        reduction: str | None = "mean",
        *,
        ignore_index: int | None = None,
        ood_index: int | None = None,
        process_group: ProcessGroup | None = None,
        return_stats: bool = False,
        return_scores: bool = False,
    ) -> None:
        super().__init__()
        if reduction is not None and reduction not in REDUCTIONS:
            raise ValueError(
                f"OutlierExposureLoss: reduction must be None or one of {', '.join(REDUCTIONS)}, "
                f"got {reduction!r}"
            )
        if not isinstance(alpha, Tensor) and not math.isfinite(alpha):
            raise ValueError(f"OutlierExposureLoss: alpha must be a finite number, got {alpha}")
        if isinstance(alpha, Tensor) and not isinstance(alpha, torch.nn.Parameter):
            self.register_buffer("alpha", alpha)  # moves with the module
        else:
            self.alpha = alpha
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.ood_index = ood_index
        self.process_group = process_group
        self.return_stats = return_stats
        self.return_scores = return_scores

    def forward(
        self, logits: Tensor, target: Tensor
    ) -> Tensor | tuple[Tensor | LossStats | LossScores, ...]:
        """The loss of ``logits`` ``[N, C, ...]`` for the labels ``target`` ``[N, ...]``, with its
        statistics if they were asked for."""
        return outlier_exposure_loss(
            logits,
            target,
            self.alpha,
            self.reduction,
            ignore_index=self.ignore_index,
            ood_index=self.ood_index,
            process_group=self.process_group,
            return_stats=self.return_stats,
            return_scores=self.return_scores,
        )

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it, of children as well
        raise NotImplementedError(
            "OutlierExposureLoss cannot be compiled with torch.jit.script, which PyTorch has "
            "deprecated. Use torch.compile to train, or torch.export to ship a model, or script "
            "the model without its loss"
        )

    @property
    def process_group(self) -> ProcessGroup | None:
        """That of all processes is the one of now: None where there are no others."""
        if not isinstance(self._process_group, str):
            return self._process_group
        distributed = torch.distributed
        shared = distributed.is_available() and distributed.is_initialized()
        return distributed.group.WORLD if shared else None

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        is_world = group is not None and group is torch.distributed.group.WORLD
        self._process_group: ProcessGroup | str | None = _WORLD if is_world else group

    def __deepcopy__(self, memo: dict[int, Any]) -> OutlierExposureLoss:
        memo[id(self._process_group)] = self._process_group  # of which there is one
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
        """The settings that are seldom made, as repr shows them."""
        switches = [f"{n}=True" for n in ("return_stats", "return_scores") if getattr(self, n)]
        if self.process_group is not None:
            switches.append(f"process_group=<of {self.process_group.size()} processes>")
        return switches

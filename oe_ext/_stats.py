"""What a training loop logs beside the loss, from what the pass of the loss leaves behind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree
from torch import Tensor

from oe_ext._checks import TENSORS, check_alpha
from oe_ext._sums import sum_from_axis
from oe_ext.reference import inliers_and_outliers

__all__ = ["LossScores", "LossStats", "loss_with_stats"]


class LossStats(NamedTuple):
    """Of one batch: 0-dim tensors, detached, on the device of the logits.

    Batches hold different numbers of inliers and of outliers, and some of them none, whose mean is
    NaN: the mean over an epoch is that of its sums and counts. :meth:`merge` adds them up.
    """

    #: The mean cross-entropy of the inliers; NaN without any.
    inlier_loss: Tensor
    #: The mean cross-entropy of the outliers to the uniform distribution, not weighted by alpha;
    #: NaN without any.
    outlier_loss: Tensor
    #: int64.
    num_inliers: Tensor
    #: int64.
    num_outliers: Tensor
    #: The part of the inliers whose label is the argmax of the logits; NaN without any.
    inlier_accuracy: Tensor
    #: The sum that inlier_loss is the mean of; float64, and 0 without any.
    inlier_loss_sum: Tensor
    #: The sum that outlier_loss is the mean of; float64, and 0 without any.
    outlier_loss_sum: Tensor
    #: How many inliers have their label as the argmax of the logits; int64.
    num_correct: Tensor

    def merge(self, other: LossStats) -> LossStats:
        """Those of both batches, as if they were one."""
        return _from_sums(
            self.inlier_loss_sum + other.inlier_loss_sum,
            self.outlier_loss_sum + other.outlier_loss_sum,
            self.num_inliers + other.num_inliers,
            self.num_outliers + other.num_outliers,
            self.num_correct + other.num_correct,
            self.inlier_loss.dtype,
        )


class LossScores(NamedTuple):
    """Of each position: tensors of the shape of target, detached; NaN where it is ignored."""

    #: The largest softmax probability, low for outliers. NaN where there is no softmax.
    max_softmax: Tensor
    #: -logsumexp of the logits, high for outliers (Liu et al., NeurIPS 2020).
    energy: Tensor


# torch.export saves a program that returns them only if it knows their names.
for _type in (LossStats, LossScores):
    torch.utils._pytree._register_namedtuple(_type, serialized_type_name=f"oe_ext.{_type.__name__}")


def _from_sums(
    inlier_sum: Tensor,
    outlier_sum: Tensor,
    num_inliers: Tensor,
    num_outliers: Tensor,
    num_correct: Tensor,
    dtype: Any,
) -> LossStats:
    return LossStats(
        inlier_loss=(inlier_sum / num_inliers).to(dtype),
        outlier_loss=(outlier_sum / num_outliers).to(dtype),
        num_inliers=num_inliers,
        num_outliers=num_outliers,
        inlier_accuracy=num_correct.to(dtype) / num_inliers,
        inlier_loss_sum=inlier_sum,
        outlier_loss_sum=outlier_sum,
        num_correct=num_correct,
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)


def _is_eager(*tensors: Tensor) -> bool:
    """Nobody records or transforms the call: what is decided here is decided for it alone."""
    return (
        all(type(tensor) in _PLAIN_TYPES for tensor in tensors)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and all(torch._C._get_dispatch_mode(mode) is None for mode in _TRACERS)
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    )


def alpha_as_tensor(alpha: float, logits: Tensor) -> Tensor:
    """Of the dtype and on the device of the loss. torch.compile makes a variable of a number where
    it multiplies a tensor; anywhere else it is a constant, and each new one is compiled anew."""
    if not isinstance(logits, Tensor):  # torch.fx knows no dtype; the operator makes it its own
        return logits.new_ones((), dtype=torch.float64) * alpha
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.ones((), dtype=dtype, device=logits.device) * alpha


def loss_with_stats(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor,
    reduction: str,
    return_stats: bool,
    return_scores: bool,
    ignore_index: int | None,
    ood_index: int | None,
) -> tuple[Tensor | LossStats | LossScores, ...]:
    """The loss, and what was asked for: O(N) more work, and no look at the logits but at those of
    the labels, and of rows of which no more than that does not tell where their maximum is."""
    if not torch.compiler.is_dynamo_compiling():
        check_alpha(alpha)
    # As a tensor, alpha makes the operator keep the cross-entropy of each row, also of outliers
    # that weigh nothing.
    weight = alpha if isinstance(alpha, TENSORS) else alpha_as_tensor(alpha, logits)
    eager = _is_eager(logits, target, weight)
    loss, cross_entropy, row_max, row_sum_exp, _, _ = (
        torch.ops.oe_ext._outlier_exposure_loss_forward.default(
            logits, target, 0.0, weight, reduction, ignore_index, ood_index
        )
    )
    result: tuple[Tensor | LossStats | LossScores, ...] = (loss,)
    label = target.long()
    inlier, outlier = inliers_and_outliers(label, ignore_index, ood_index)
    if return_stats:
        # where(), not products: an ignored row may hold anything
        terms = cross_entropy.double()
        rows = logits.detach()
        known = (row_max, row_sum_exp) if eager and logits.device.type == "cpu" else None
        is_right = _is_argmax(rows, label, inlier, known)
        result += (
            _from_sums(
                sum_from_axis(torch.where(inlier, terms, 0.0).flatten(), rank=1),
                sum_from_axis(torch.where(outlier, terms, 0.0).flatten(), rank=1),
                inlier.sum(),
                outlier.sum(),
                is_right.sum(),
                cross_entropy.dtype,
            ),
        )
    if return_scores:
        # The rows that are ignored were never read.
        nan = row_max.new_full((), float("nan"))
        log_sum_exp = torch.where(row_max == torch.inf, row_max, row_max + row_sum_exp.log())
        counted = inlier | outlier
        scores = LossScores(
            max_softmax=torch.where(counted & (row_sum_exp > 0), row_sum_exp.reciprocal(), nan),
            energy=torch.where(counted, -log_sum_exp, nan),
        )
        result += (scores,)
    return result


def _is_argmax(
    logits: Tensor, label: Tensor, inlier: Tensor, known: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Of each inlier, whether its label is the argmax of its logits: the first, where several share
    the maximum, and a NaN before any number. ``known`` are the maximum of each row and its sum of
    exp(logit - maximum), where rows may be chosen by them without waiting for a device."""
    if known is None:
        # max() finds it several times as fast as argmax()
        return inlier & (logits.max(1).indices == label)
    row_max, row_sum_exp = known
    here = torch.where(inlier, label, 0).unsqueeze(1)
    is_max = inlier & (logits.gather(1, here).squeeze(1).to(row_max.dtype) == row_max)
    # Each logit that shares the maximum adds 1 to the sum: below 2 there is no other. The sum is
    # NaN or 0 in rows that have no softmax.
    unsure = torch.where(row_sum_exp > 0, is_max & (row_sum_exp >= 1.99), inlier)
    index = unsure.nonzero(as_tuple=True)
    if index[0].numel() == 0:
        return is_max
    argmax = logits.movedim(1, -1)[index].max(-1).indices
    return is_max.index_put(index, argmax == label[index])

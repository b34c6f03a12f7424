"""Statistics that a training loop logs beside the loss, from the same pass over the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.utils._pytree
from torch import Tensor

from oe_ext._checks import TENSORS, check_alpha
from oe_ext._sums import sum_from_axis
from oe_ext.reference import inliers_and_outliers, weights_of_inliers

__all__ = ["LossScores", "LossStats", "loss_with_stats"]

_FORWARD = torch.ops.oe_ext._outlier_exposure_loss_forward.default
_UPSAMPLED_FORWARD = torch.ops.oe_ext._upsampled_outlier_exposure_loss_forward.default


class LossStats(NamedTuple):
    """Statistics of one batch: 0-dim tensors, detached, on the device of the logits.

    Batches contain different numbers of inliers and outliers, and the mean of an empty group is
    NaN. The mean over an epoch therefore follows from sums and counts, which :meth:`merge` adds up.
    """

    #: The mean loss of the inliers, by their class weights; NaN without inliers.
    inlier_loss: Tensor
    #: The mean cross-entropy of the outliers to the uniform distribution, not weighted by alpha;
    #: NaN without outliers.
    outlier_loss: Tensor
    #: int64.
    num_inliers: Tensor
    #: int64.
    num_outliers: Tensor
    #: The fraction of inliers whose label is the argmax of the logits; NaN without inliers.
    inlier_accuracy: Tensor
    #: The summed loss of the inliers, with their class weights, float64; 0 without inliers.
    inlier_loss_sum: Tensor
    #: The summed cross-entropy of the outliers, float64; 0 without outliers.
    outlier_loss_sum: Tensor
    #: The number of inliers whose label is the argmax of the logits, int64.
    num_correct: Tensor
    #: The summed class weights of the inliers, float64; without weights their number.
    inlier_weight: Tensor

    def merge(self, other: LossStats) -> LossStats:
        """The statistics of both batches as one."""
        return _from_sums(
            self.inlier_loss_sum + other.inlier_loss_sum,
            self.outlier_loss_sum + other.outlier_loss_sum,
            self.num_inliers + other.num_inliers,
            self.num_outliers + other.num_outliers,
            self.num_correct + other.num_correct,
            self.inlier_weight + other.inlier_weight,
            self.inlier_loss.dtype,
        )


class LossScores(NamedTuple):
    """Scores of each position: detached tensors of target's shape; NaN for ignored positions."""

    #: The largest softmax probability, low for outliers. NaN if there is no softmax.
    max_softmax: Tensor
    #: -logsumexp of the logits, high for outliers (Liu et al., NeurIPS 2020).
    energy: Tensor


# torch.export can save a program that returns these types only if they are registered.
for _type in (LossStats, LossScores):
    torch.utils._pytree._register_namedtuple(_type, serialized_type_name=f"oe_ext.{_type.__name__}")


def _from_sums(
    inlier_sum: Tensor,
    outlier_sum: Tensor,
    num_inliers: Tensor,
    num_outliers: Tensor,
    num_correct: Tensor,
    inlier_weight: Tensor,
    dtype: Any,
) -> LossStats:
    return LossStats(
        inlier_loss=(inlier_sum / inlier_weight).to(dtype),
        outlier_loss=(outlier_sum / num_outliers).to(dtype),
        num_inliers=num_inliers,
        num_outliers=num_outliers,
        inlier_accuracy=num_correct.to(dtype) / num_inliers,
        inlier_loss_sum=inlier_sum,
        outlier_loss_sum=outlier_sum,
        num_correct=num_correct,
        inlier_weight=inlier_weight,
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_TRACERS = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)


def _is_eager(*tensors: Tensor) -> bool:
    """True if nobody traces or transforms the call: decisions here affect only this call."""
    return (
        all(type(tensor) in _PLAIN_TYPES for tensor in tensors)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and all(torch._C._get_dispatch_mode(mode) is None for mode in _TRACERS)
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    )


def alpha_as_tensor(alpha: float, logits: Tensor) -> Tensor:
    """A tensor in the dtype and on the device of the loss. torch.compile treats a number as a
    variable only if it multiplies a tensor; elsewhere it is a constant, and each new value
    recompiles."""
    if not isinstance(logits, Tensor):  # torch.fx knows no dtype; the operator converts it
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
    weight: Tensor | None,
    label_smoothing: float,
    counts: Tensor | None,
    align_corners: bool | None,
) -> tuple[Tensor | LossStats | LossScores, ...]:
    """The loss and the requested statistics, for O(N) more work. Eager calls on the CPU read again
    only the logits at the labels, and rows where these do not tell if the label is the argmax.
    ``align_corners``: of logits that are upsampled; else None. Their operator finds the argmax."""
    if not torch.compiler.is_dynamo_compiling():
        check_alpha(alpha)
    # A tensor alpha makes the operator keep the cross-entropy of each row, also of outliers with a
    # weight of 0.
    alpha = alpha if isinstance(alpha, TENSORS) else alpha_as_tensor(alpha, logits)
    eager = _is_eager(logits, target, alpha)
    arguments = (logits, target, 0.0, alpha, reduction, ignore_index, ood_index)
    options = {"counts": counts, "weight": weight, "label_smoothing": label_smoothing}
    argmax = None
    if align_corners is None:
        loss, cross_entropy, row_max, row_sum_exp, _, _ = _FORWARD(*arguments, **options)
    else:
        loss, cross_entropy, row_max, row_sum_exp, argmax, _, _ = _UPSAMPLED_FORWARD(
            *arguments, align_corners, statistics=True, **options
        )
    result: tuple[Tensor | LossStats | LossScores, ...] = (loss,)
    label = target.long()
    inlier, outlier = inliers_and_outliers(label, ignore_index, ood_index)
    if return_stats:
        # where() and not products: an ignored row may hold any value
        terms = cross_entropy.double()
        in_loss_dtype = None if weight is None else weight.to(cross_entropy.dtype)
        if argmax is None:
            known = (row_max, row_sum_exp) if eager and logits.device.type == "cpu" else None
            is_right = _is_argmax(logits.detach(), label, inlier, known)
        else:
            is_right = inlier & (argmax == label)
        result += (
            _from_sums(
                sum_from_axis(torch.where(inlier, terms, 0.0).flatten(), rank=1),
                sum_from_axis(torch.where(outlier, terms, 0.0).flatten(), rank=1),
                inlier.sum(),
                outlier.sum(),
                is_right.sum(),
                sum_from_axis(weights_of_inliers(label, inlier, in_loss_dtype).flatten(), rank=1),
                cross_entropy.dtype,
            ),
        )
    if return_scores:
        # Ignored rows were never read.
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
    """Whether the label of each inlier is the argmax of its logits: the first of several maxima,
    and a NaN before any number. ``known``: the maximum of each row and its sum of
    exp(logit - maximum), if selecting rows by them does not wait for a device."""
    if known is None:
        # max() is several times as fast as argmax()
        return inlier & (logits.max(1).indices == label)
    row_max, row_sum_exp = known
    here = torch.where(inlier, label, 0).unsqueeze(1)
    is_max = inlier & (logits.gather(1, here).squeeze(1).to(row_max.dtype) == row_max)
    # Each logit that equals the maximum adds 1 to the sum, so below 2 the maximum is unique. The
    # sum is NaN or 0 in rows without a softmax.
    unsure = torch.where(row_sum_exp > 0, is_max & (row_sum_exp >= 1.99), inlier)
    index = unsure.nonzero(as_tuple=True)
    if index[0].numel() == 0:
        return is_max
    argmax = logits.movedim(1, -1)[index].max(-1).indices
    return is_max.index_put(index, argmax == label[index])

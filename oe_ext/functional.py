"""The functional form of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["outlier_exposure_loss"]


def outlier_exposure_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 0.5,
    reduction: str | None = "mean",
    *,
    ignore_index: int | None = None,
    ood_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy on labelled positions plus ``alpha`` times cross-entropy to the uniform
    distribution on outliers.

    With :math:`x` the logits of a position, :math:`y` its label and :math:`C` classes:

    .. math::
        \ell(x, y) = \begin{cases}
            \log \sum_c e^{x_c} - x_y & \text{if } 0 \le y < C \\
            \alpha \left(\log \sum_c e^{x_c} - \frac{1}{C} \sum_c x_c\right)
                & \text{if } y \text{ marks an outlier}
        \end{cases}

    Source: Hendrycks, Mazeika and Dietterich, "Deep Anomaly Detection with Outlier Exposure",
    ICLR 2019, https://arxiv.org/abs/1812.04606.

    Args:
        logits: shape ``[N, C]`` or ``[N, C, d1, ..., dk]``; float16, bfloat16, float32 or float64.
            Any strides.
        target: shape ``[N]`` or ``[N, d1, ..., dk]``; int64, int32, int16, int8 or uint8. A class
            in ``[0, C)``, or a mark: a negative number is an outlier.
        alpha: weight of the outliers. A finite number, or a floating-point tensor that broadcasts
            against ``target`` (one weight for all, or one for each position), which gets a
            gradient.
        reduction: ``"none"`` (or ``None``): the loss of each position, 0 where it is ignored.
            ``"sum"``. ``"mean"``: the sum divided by the number of positions that are not ignored,
            inliers and outliers together. ``"group_mean"``: the mean over the inliers plus the
            (weighted) mean over the outliers, as the paper trains; an empty group counts 0.
        ignore_index: positions with this label count for nothing; looked at before anything else.
            Nothing is ignored by default: -100 marks an outlier as any negative number does.
        ood_index: the label that marks an outlier, instead of the negative numbers.

    Returns:
        float32, or float64 for float64 logits. A scalar, or ``target``'s shape for ``"none"``.

    Raises:
        ValueError: a rank, a shape or a reduction that is not as above, no class at all, or an
            ``alpha`` that is not finite.
        TypeError: a dtype that is not as above, soft labels among them.
        IndexError: on the CPU, a label that is no class and no mark. On CUDA a device-side assert
            stops the kernel, as with :func:`torch.nn.functional.cross_entropy`.
    """
    if reduction is None:
        reduction = "none"
    operator = torch.ops.oe_ext.outlier_exposure_loss
    if isinstance(alpha, Tensor):
        loss: Tensor = operator.tensor_alpha(
            logits, target, alpha, reduction, ignore_index=ignore_index, ood_index=ood_index
        )
    else:
        loss = operator.default(
            logits, target, alpha, reduction, ignore_index=ignore_index, ood_index=ood_index
        )
    return loss

"""Properties of any upsampled logits. Against float64, the errors of value and gradient are at most
twice those of torch's interpolation and the loss in the same dtype (float32 for half types), which
in most cases are several times ours: over a few numbers, either may be lucky."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, INT_DTYPES, REDUCTIONS
from oracles import loss_and_grad, max_error
from strategies import INF, NAN, Layout, examples, layouts, legal_labels

from oe_ext import outlier_exposure_loss, reference

KINDS = ["normal", "normal", "steps", "dominant", "certain"]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    size: tuple[int, int]
    dtype: torch.dtype
    layout: Layout
    label_dtype: torch.dtype
    labels: tuple[int, ...]
    block: int  # edge of squares of equal labels
    kind: str
    scale: float
    offset: float
    special: tuple[float, ...]  # a logit in 40 is one of these
    align_corners: bool
    reduction: str
    ignore_index: int | None
    ood_index: int | None
    alpha: float
    smoothing: float
    weighted: bool
    seed: int

    def make(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        random = torch.Generator().manual_seed(self.seed)
        batch, num_classes, height, width = self.shape
        small = [-(-edge // self.block) for edge in self.size]
        picked = torch.randint(0, len(self.labels), (batch, *small), generator=random)
        target = torch.tensor(self.labels)[picked]
        target = target.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        target = target[:, : self.size[0], : self.size[1]]

        logits = torch.randn(self.shape, generator=random, dtype=torch.float64)
        largest = torch.randint(0, num_classes, (batch, 1, height, width), generator=random)
        if self.kind == "certain":  # as a network that has been trained
            labels = target.unsqueeze(1).clamp(0, num_classes - 1).double()
            largest = F.interpolate(labels, (height, width), mode="nearest").long()
            logits.scatter_add_(1, largest, torch.full(largest.shape, 12.0).double())
        elif self.kind == "dominant":
            logits.scatter_(1, largest, torch.full(largest.shape, self.scale).double())
        elif self.kind == "steps":
            logits = logits.sign() * self.scale
        else:
            logits = logits * self.scale
        logits = (logits + self.offset).to(self.dtype)
        if self.special:
            kinds = torch.tensor(self.special, dtype=self.dtype)
            values = kinds[torch.randint(0, len(kinds), self.shape, generator=random)]
            logits = logits.where(torch.rand(self.shape, generator=random) > 1 / 40, values)
            # A pixel that depends on one is left out where it is ignored.
            full = F.interpolate(
                logits.double(), self.size, mode="bilinear", align_corners=self.align_corners
            )
            if self.ignore_index is not None:
                target = target.where(full.isfinite().all(1), self.ignore_index)
        options: dict[str, Any] = {
            "alpha": self.alpha,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "ood_index": self.ood_index,
            "upsample": "bilinear",
            "align_corners": self.align_corners,
            "label_smoothing": self.smoothing,
        }
        if self.weighted:
            options["weight"] = torch.rand(num_classes, generator=random)
        target = target.to(self.label_dtype).contiguous()
        return self.layout.place(logits, NAN), target, options


@st.composite
def axis(draw: st.DrawFn, most: int) -> tuple[int, int, bool]:
    """A number of elements and of pixels; whether its scale is whole with aligned corners."""
    elements = draw(st.integers(1, 12) | st.sampled_from([33]))
    times = draw(st.sampled_from([1, 2, 3, 4, 4, 5, 6, 8, 12, 16, 20, 32]))
    kind = draw(st.sampled_from(["whole", "aligned", "any"]))
    pixels = elements * times
    if kind == "aligned":
        pixels = (elements - 1) * times + 1
    elif kind == "any":
        pixels = draw(st.integers(elements, elements + 60))
    return elements, max(elements, min(pixels, most)), kind == "aligned"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    height, high, _ = draw(axis(40))
    width, wide, aligned = draw(axis(500))
    num_classes = draw(st.sampled_from([1, 2, 3, 5, 8, 9, 19]))
    batch = draw(st.integers(1, 2)) if high * wide * num_classes < 50_000 else 1
    dtype = draw(st.sampled_from(DTYPES))
    label_dtype = draw(st.sampled_from(INT_DTYPES))
    special_label = st.sampled_from([-1, 0, 1, 100, num_classes - 1])
    special = draw(st.just(()) | st.sampled_from([(NAN,), (-INF,), (INF, NAN)]))
    ignore_index = draw(special_label if special else st.none() | special_label)
    ood_index = draw(st.none() | special_label)
    if special and not torch.iinfo(label_dtype).min <= ignore_index:
        ignore_index = 0
    legal = legal_labels(label_dtype, num_classes, ignore_index, ood_index)
    align_corners = draw(st.booleans()) or aligned
    return Case(
        shape=(batch, num_classes, height, width),
        size=(high, wide),
        dtype=dtype,
        layout=draw(layouts(4)),
        label_dtype=label_dtype,
        labels=tuple(draw(st.lists(st.sampled_from(legal), min_size=1, max_size=5))),
        block=draw(st.sampled_from([1, 1, 4, 7, 16])),
        kind=draw(st.sampled_from(KINDS)),
        scale=draw(st.sampled_from([0.1, 1.0, 5.0, 20.0, 60.0, 120.0, 200.0])),
        offset=draw(st.sampled_from([0.0, 0.0, 1e4])),
        special=special,
        align_corners=align_corners,
        reduction=draw(st.sampled_from(REDUCTIONS)),
        ignore_index=ignore_index,
        ood_index=ood_index,
        alpha=draw(st.sampled_from([0.5, 0.0, -1.5])),
        smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        weighted=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


# Of the largest value, where the unfused float32 path happens to be more accurate.
LOSS_FLOOR = {torch.float64: 1e-13, torch.float32: 5e-7}
GRADIENT_FLOOR = {torch.float64: 1e-12, torch.float32: 5e-7}


def largest_terms(case: Case, target: torch.Tensor, upstream: torch.Tensor) -> float:
    """The gradient is a sum of differences, of the softmax and its target. The largest sum of one
    side of them: its rounding is there, too, where they cancel."""
    inlier, outlier = reference.inliers_and_outliers(target, case.ignore_index, case.ood_index)
    counts = {"mean": ((inlier | outlier).sum(),) * 2, "group_mean": (inlier.sum(), outlier.sum())}
    of_inliers, of_outliers = (1 / max(1, int(n)) for n in counts.get(case.reduction, (1, 1)))
    pixels = inlier * of_inliers + outlier * (of_outliers * abs(case.alpha))
    if case.reduction == "none":
        pixels = pixels * upstream.abs()
    elements = torch.zeros(
        (case.shape[0], 1, *case.shape[2:]), dtype=torch.float64
    ).requires_grad_()
    full = F.interpolate(elements, case.size, mode="bilinear", align_corners=case.align_corners)
    (terms,) = torch.autograd.grad(full, elements, pixels.double().unsqueeze(1))
    return terms.max().item()


@examples(200)
@given(cases())
def test_no_worse_than_unfused(case):
    logits, target, options = case.make()
    wide = torch.promote_types(case.dtype, torch.float32)
    upstream = torch.randn(
        target.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64
    )
    results = []
    for function, dtype in (
        (reference.outlier_exposure_loss, torch.float64),
        (reference.outlier_exposure_loss, wide),
        (outlier_exposure_loss, case.dtype),
    ):
        grad_of = upstream.to(torch.promote_types(dtype, torch.float32))
        results.append(
            loss_and_grad(
                function,
                logits.to(dtype),
                target,
                upstream=grad_of if case.reduction == "none" else None,
                **options,
            )
        )
    (loss, grad), (their_loss, their_grad), (our_loss, our_grad) = results
    seen = loss.isfinite()  # torch multiplies infinite logits by 0, and gets NaN
    if not case.special:
        assert seen.all()
    scale = loss[seen].abs().max().item() if seen.any() else 0.0
    of_oracle = 4 * abs(case.offset) * torch.finfo(torch.float64).eps
    floor = LOSS_FLOOR[wide] * max(1.0, scale) + of_oracle
    if case.reduction == "sum":  # of losses that may be small beside the 1 of their softmax
        floor += torch.finfo(wide).eps / 2 * target.numel()
    limit = max(2 * max_error(their_loss[seen], loss[seen]), floor)
    assert max_error(our_loss[seen], loss[seen]) <= limit
    if not grad.isfinite().all():
        return
    scale = grad.abs().max().item()
    floor = GRADIENT_FLOOR[wide] * scale
    floor += (torch.finfo(wide).eps + of_oracle) * largest_terms(case, target, upstream)
    error = max(2 * max_error(their_grad, grad), floor)
    rounding = 0.0 if wide == case.dtype else torch.finfo(case.dtype).eps / 2 * scale + 6e-8
    assert max_error(our_grad, grad) <= error + rounding
    assert our_grad.dtype == case.dtype


@examples(40)
@given(cases())
def test_a_part_of_the_batch_has_the_same_bits(case):
    logits, target, options = case.make()
    options["reduction"] = "none"
    whole = loss_and_grad(outlier_exposure_loss, logits, target, **options)
    part = loss_and_grad(outlier_exposure_loss, logits[-1:], target[-1:], **options)
    for of_whole, of_part in zip(whole, part, strict=True):
        torch.testing.assert_close(of_part, of_whole[-1:], rtol=0, atol=0, equal_nan=True)

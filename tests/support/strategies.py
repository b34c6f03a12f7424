"""Hypothesis strategies for the arguments of the loss.

They draw descriptions, not tensors, so a failure is reported as an expression to paste into a test.
``make()`` builds the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from inputs import CLASS_COUNTS, DTYPES, INT_DTYPES, REDUCTIONS
from torch import Tensor

INF, NAN = float("inf"), float("nan")
INT64 = torch.iinfo(torch.int64)
# Special labels that are classes, or that some dtypes, or all of them, cannot hold.
SPECIAL_LABELS = [None, -100, -1, 0, 1, 2, 254, 255, -128, -129, 300]
SPECIAL_LABELS += [2**31, 2**40, INT64.min, INT64.max]
ALPHAS = [0.5, 0.0, -0.0, 1.0, -0.5, 1e-3, 17.0, 1e30, -1e30, 1e-40, 1e-300]
WEIGHTS = [1.0, 0.0, 0.1, 3.0, 1e-3, 1e4]
SMOOTHINGS = [0.1, 1.0, 0.5, 1e-3]
UPSTREAMS = ["one", "random", "expanded", "strided", "negative", "zero", "scaled"]


@dataclass(frozen=True)
class Layout:
    """The memory layout of a tensor: any strides of a view of one storage, with overlap only by
    expansion."""

    order: tuple[int, ...]  # the axes, outermost in memory first
    steps: tuple[int, ...]  # of each axis
    gaps: tuple[int, ...]  # elements before the first of each axis
    expanded: tuple[bool, ...]  # axes of stride 0

    @classmethod
    def dense(cls, *order: int) -> Layout:
        dim = len(order)
        return cls(order, (1,) * dim, (0,) * dim, (False,) * dim)

    def place(self, values: Tensor, filler: float) -> Tensor:
        """The values in this layout, ``filler`` between them; only the first of expanded axes."""
        sizes = [
            min(size, 1) if one else size
            for size, one in zip(values.shape, self.expanded, strict=True)
        ]
        spans = [gap + size * step for size, step, gap in self._axes(sizes)]
        storage = torch.full([spans[axis] for axis in self.order], filler, dtype=values.dtype)
        for axis, (size, step, gap) in enumerate(self._axes(sizes)):
            where = self.order.index(axis)
            index = (slice(None),) * where + (slice(gap, gap + size * step, step),)
            storage = storage[index]
        view = storage.permute([self.order.index(axis) for axis in range(len(self.order))])
        view.copy_(values[tuple(slice(size) for size in sizes)])
        return view.expand(values.shape)

    def _axes(self, sizes: list[int]) -> list[tuple[int, int, int]]:
        return list(zip(sizes, self.steps, self.gaps, strict=True))


class Inputs(NamedTuple):
    logits: Tensor
    target: Tensor
    alpha: float | Tensor
    weight: Tensor | None


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout
    label_dtype: torch.dtype
    label_layout: Layout
    labels: tuple[int, ...]  # the values of the target
    alpha: float | tuple[float, ...] = 0.5  # the values, if it is a tensor
    alpha_dtype: torch.dtype | None = None  # None: a number
    alpha_shape: tuple[int, ...] = ()
    weight: tuple[float, ...] = ()  # the values of the class weights, or none
    weight_dtype: torch.dtype = torch.float32
    label_smoothing: float = 0.0
    reduction: str | None = "mean"
    ignore_index: int | None = None
    ood_index: int | None = None
    upstream: str = "one"
    scale: float = 3.0
    offset: float = 0.0
    special: tuple[float, ...] = ()  # a logit in eight is one of these
    seed: int = 0

    @property
    def special_labels(self) -> dict[str, int | None]:
        return {"ignore_index": self.ignore_index, "ood_index": self.ood_index}

    def options(self, inputs: Inputs) -> dict[str, Any]:
        return {
            **self.special_labels,
            "weight": inputs.weight,
            "label_smoothing": self.label_smoothing,
        }

    @property
    def target_shape(self) -> tuple[int, ...]:
        return (self.shape[0], *self.shape[2:])

    @property
    def acc_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def make(self) -> Inputs:
        random = torch.Generator().manual_seed(self.seed)

        def choose(values: tuple[float, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            picked = torch.randint(0, len(values), shape, generator=random)
            return torch.tensor(values, dtype=dtype)[picked]

        logits = torch.randn(self.shape, generator=random, dtype=torch.float64)
        logits = (logits * self.scale + self.offset).to(self.dtype)
        if self.special:
            here = torch.rand(self.shape, generator=random) < 1 / 8
            special = choose(self.special, self.shape, torch.float64)
            logits = torch.where(here, special.to(self.dtype), logits)
        target = choose(self.labels, self.target_shape, self.label_dtype)
        alpha: float | Tensor = self.alpha
        if self.alpha_dtype is not None:
            alpha = choose(self.alpha, self.alpha_shape, torch.float64).to(self.alpha_dtype)
        weight = None
        if self.weight:
            weight = choose(self.weight, self.shape[1:2], torch.float64).to(self.weight_dtype)
        return Inputs(
            self.layout.place(logits, NAN),
            # between the labels lies a value that is no label
            self.label_layout.place(target, torch.iinfo(self.label_dtype).max),
            alpha,
            weight,
        )

    def make_upstream(self, loss: Tensor) -> Tensor:
        random = torch.Generator().manual_seed(self.seed + 1)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=random).to(loss.dtype)

        constants = {"one": 1.0, "negative": -0.37, "zero": 0.0, "scaled": 65536.0}
        if self.upstream in constants:
            return torch.full_like(loss, constants[self.upstream])
        if self.upstream == "expanded":
            return normal(()).expand(loss.shape)
        if self.upstream == "strided":
            return normal((*loss.shape, 2))[..., 0]
        return normal(tuple(loss.shape))


def examples(per_thousand: int) -> settings:
    """Settings with this share of the examples that the profile of a run sets."""
    return settings(max_examples=max(1, settings().max_examples * per_thousand // 1000))


def kind_of(label: int, num_classes: int, ignore_index: int | None, ood_index: int | None) -> str:
    """The README's table of labels, without the code of the library."""
    if label == ignore_index:
        return "ignored"
    if (label < 0) if ood_index is None else (label == ood_index):
        return "outlier"
    return "inlier" if 0 <= label < num_classes else "illegal"


def layouts(dim: int) -> st.SearchStrategy[Layout]:
    def per_axis(element: st.SearchStrategy) -> st.SearchStrategy[tuple]:
        return st.tuples(*[element] * dim)

    axes = range(dim)
    common = [Layout.dense(*axes), Layout.dense(*reversed(axes))]
    if dim > 2:
        common.append(Layout.dense(0, *axes[2:], 1))  # channels_last
    anything = st.builds(
        Layout,
        st.permutations(axes).map(tuple),
        per_axis(st.sampled_from([1, 1, 1, 2, 3])),
        per_axis(st.sampled_from([0, 0, 0, 1, 3])),
        per_axis(st.sampled_from([False, False, False, False, False, True])),
    )
    return st.sampled_from(common) | anything


@st.composite
def shapes(draw: st.DrawFn, max_logits: int) -> tuple[int, ...]:
    rank = draw(st.sampled_from([2, 2, 3, 4, 5]))
    counts = [count for count in CLASS_COUNTS if count <= max_logits]
    num_classes = draw(st.integers(1, min(40, max_logits)) | st.sampled_from(counts))
    room = max_logits // num_classes
    others = []
    for _ in range(rank - 1):
        others.append(draw(st.integers(1, max(1, min(room, 70)))))
        room //= others[-1]
    if draw(st.integers(0, 24)) == 24:
        others[draw(st.integers(0, rank - 2))] = 0
    return (others[0], num_classes, *others[1:])


def specials(dtype: torch.dtype) -> st.SearchStrategy[tuple[float, ...]]:
    info = torch.finfo(dtype)
    # In float64 the oracle itself must not overflow.
    huge = 1e300 if dtype == torch.float64 else info.max
    tiny = info.smallest_normal
    values = [INF, -INF, NAN, huge, -huge, 3e38, -3e38, tiny, tiny * info.eps, -tiny, 0.0, -0.0]
    some = st.lists(st.sampled_from(values), min_size=1, max_size=3, unique_by=repr).map(tuple)
    return st.just(()) | st.just((-INF,)) | some


@st.composite
def alpha_shapes(draw: st.DrawFn, target_shape: tuple[int, ...]) -> tuple[int, ...]:
    trailing = target_shape[draw(st.integers(0, len(target_shape))) :]
    ones = draw(st.tuples(*[st.booleans()] * len(trailing)))
    return tuple(1 if one else size for size, one in zip(trailing, ones, strict=True))


def legal_labels(
    label_dtype: torch.dtype, num_classes: int, ignore_index: int | None, ood_index: int | None
) -> list[int]:
    """Legal labels at the limits and inside them."""
    info = torch.iinfo(label_dtype)
    candidates = {0, 1, num_classes // 2, num_classes - 1, info.max, info.min, -1, -7}
    candidates |= {label for label in (ignore_index, ood_index) if label is not None}
    return sorted(
        label
        for label in candidates
        if info.min <= label <= info.max
        and kind_of(label, num_classes, ignore_index, ood_index) != "illegal"
    )


@st.composite
def cases(draw: st.DrawFn, max_logits: int = 4000, *, finite: bool = False) -> Case:
    """Legal input. ``finite``: no special logits, and weights that keep the loss finite."""
    shape = draw(shapes(max_logits))
    dtype = draw(st.sampled_from(DTYPES))
    label_dtype = draw(st.sampled_from(INT_DTYPES))
    special_label = st.sampled_from([*SPECIAL_LABELS, shape[1] - 1, shape[1]])
    ignore_index, ood_index = draw(special_label), draw(st.none() | special_label)
    legal = legal_labels(label_dtype, shape[1], ignore_index, ood_index)
    target_shape = (shape[0], *shape[2:])
    alphas = st.sampled_from([a for a in ALPHAS if not finite or abs(a) < 100])
    alpha_dtype = draw(st.sampled_from([None, None, *DTYPES]))
    alpha: float | tuple[float, ...] = draw(alphas)
    if alpha_dtype is not None:
        fits = alphas.filter(lambda a: abs(a) < torch.finfo(alpha_dtype).max)
        alpha = draw(st.lists(fits, min_size=1, max_size=3).map(tuple))
    return Case(
        shape=shape,
        dtype=dtype,
        layout=draw(layouts(len(shape))),
        label_dtype=label_dtype,
        label_layout=draw(layouts(len(shape) - 1)),
        labels=tuple(draw(st.lists(st.sampled_from(legal), min_size=1, max_size=4))),
        alpha=alpha,
        alpha_dtype=alpha_dtype,
        alpha_shape=draw(alpha_shapes(target_shape)) if alpha_dtype is not None else (),
        weight=draw(st.just(()) | st.lists(st.sampled_from(WEIGHTS), min_size=1).map(tuple)),
        weight_dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        label_smoothing=draw(st.just(0.0) | st.sampled_from(SMOOTHINGS)),
        reduction=draw(st.sampled_from([*REDUCTIONS, None])),
        ignore_index=ignore_index,
        ood_index=ood_index,
        upstream=draw(st.sampled_from(UPSTREAMS)),
        scale=draw(st.sampled_from([3.0, 0.1, 30.0])),
        offset=draw(st.sampled_from([0.0, 0.0, 1e4, -1e4])),
        special=() if finite else draw(specials(dtype)),
        seed=draw(st.integers(0, 2**20)),
    )

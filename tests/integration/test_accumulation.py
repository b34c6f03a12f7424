"""Batches in parts: with counts from outside, the losses of the parts add up to the whole one."""

from __future__ import annotations

import re
from types import SimpleNamespace

import optional
import pytest
import torch
from inputs import IGNORE, make_logits, make_target
from paths import ROOT

import oe_ext
from oe_ext import OutlierExposureLoss, count_labels, outlier_exposure_loss, reference

LOGITS, TARGET = make_logits((24, 5)), make_target((24, 5))
WEIGHT = torch.rand(5, dtype=torch.float64)
OPTIONS = [{}, {"weight": WEIGHT}, {"weight": WEIGHT, "label_smoothing": 0.1}]


def parts_of(size):
    return list(zip(LOGITS.split(size), TARGET.split(size), strict=True))


def as_pair(counts):
    return tuple(counts.tolist())


def as_scalars(counts):
    return [counts[0], counts[1].float()]


@pytest.mark.parametrize("given", [torch.Tensor.clone, torch.Tensor.float, as_pair, as_scalars])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "group_mean"])
def test_parts_add_up(device, reduction, options, given):
    options = {k: v.to(device) if k == "weight" else v for k, v in options.items()}
    counts = count_labels(
        [target.to(device) for _, target in parts_of(7)],
        weight=options.get("weight"),
        ignore_index=IGNORE,
    )
    assert counts.dtype == torch.float64
    if given == torch.Tensor.float:  # else the comparison is one of float32
        counts = counts.float().double()
    logits = LOGITS.to(device).requires_grad_()
    criterion = OutlierExposureLoss(0.5, reduction, ignore_index=IGNORE, **options)
    losses = [
        criterion(x, y.to(device), counts=given(counts))
        for x, (_, y) in zip(logits.split(7), parts_of(7), strict=True)
    ]
    (grad,) = torch.autograd.grad(sum(losses), logits)
    whole = logits.detach().requires_grad_()
    expected = reference.outlier_exposure_loss(
        whole, TARGET.to(device), 0.5, reduction, ignore_index=IGNORE, counts=counts, **options
    )
    (expected_grad,) = torch.autograd.grad(expected, whole)
    torch.testing.assert_close(sum(losses), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)
    own = reference.outlier_exposure_loss(
        whole, TARGET.to(device), 0.5, reduction, ignore_index=IGNORE, **options
    )
    torch.testing.assert_close(expected, own, rtol=1e-6, atol=1e-6)


def test_count_labels():
    target = torch.tensor([[0, 3, -1], [7, 2, 7]], dtype=torch.int16)
    for given in (target, [target], target.unbind(), iter(target)):
        assert count_labels(given).tolist() == [5, 1]
    weight = torch.arange(1.0, 9.0)
    assert count_labels(target, weight=weight).tolist() == [1 + 4 + 8 + 3 + 8, 1]
    assert count_labels(target, ood_index=7, ignore_index=-1).tolist() == [3, 2]
    assert count_labels([]).tolist() == [0, 0]
    assert count_labels(torch.empty(0, 4, dtype=torch.int64)).tolist() == [0, 0]


def test_with_statistics():
    plain = outlier_exposure_loss(LOGITS, TARGET, ignore_index=IGNORE, return_stats=True)
    loss, stats = outlier_exposure_loss(
        LOGITS, TARGET, ignore_index=IGNORE, return_stats=True, counts=(10, 20)
    )
    total = outlier_exposure_loss(LOGITS, TARGET, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(loss, total / 30)
    for name, value in stats._asdict().items():  # of this batch
        assert torch.equal(value, getattr(plain[1], name)), name


def test_under_vmap(device):
    x, y = LOGITS.reshape(2, 12, 5).to(device), TARGET.reshape(2, 12).to(device)
    counts = torch.tensor([[3.0, 4.0], [5.0, 6.0]], dtype=torch.float64, device=device)

    def loss(x, y, counts):
        return outlier_exposure_loss(x, y, 0.5, "group_mean", ignore_index=IGNORE, counts=counts)

    expected = [loss(*values) for values in zip(x, y, counts, strict=True)]
    torch.testing.assert_close(torch.vmap(loss)(x, y, counts), torch.stack(expected))


def test_new_counts_compile_once():
    compiled_calls = []

    def backend(graph, example_inputs):
        compiled_calls.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def step(x, y, inliers, outliers):
        return outlier_exposure_loss(x, y, ignore_index=IGNORE, counts=(inliers, outliers))

    total = outlier_exposure_loss(LOGITS, TARGET, reduction="sum", ignore_index=IGNORE)
    for numbers in ((3, 4), (30, 5), (7.5, 2.5), (8.5, 3.5), (9.5, 4.5)):
        torch.testing.assert_close(step(LOGITS, TARGET, *numbers), total / sum(numbers))
    assert len(compiled_calls) <= 3  # of integers, of the first floats, of any floats


BAD = [
    ((3,), TypeError, "or a tensor of two elements, got tuple of 1"),
    (3, TypeError, "or a tensor of two elements, got int"),
    ((3, "4"), TypeError, "an element of counts must be a number, got str"),
    ((3, -4), ValueError, "counts must not be negative, got -4"),
    ((3, float("nan")), ValueError, "an element of counts must be a finite number, got nan"),
    (torch.ones(3), RuntimeError, r"2 elements, got Double of shape \[3\]"),
    (torch.ones(2, device="meta"), RuntimeError, "logits and counts must be on the same device"),
    (torch.ones(2, requires_grad=True), NotImplementedError, "counts, which must not require"),
]


@pytest.mark.parametrize(("counts", "error", "message"), BAD)
def test_bad_counts(counts, error, message):
    with pytest.raises(error, match=message):
        outlier_exposure_loss(LOGITS, TARGET, ignore_index=IGNORE, counts=counts)


@pytest.mark.parametrize("reduction", ["sum", "none", None])
def test_only_a_mean_takes_counts(reduction):
    with pytest.raises(ValueError, match="counts need a reduction that divides by them, got"):
        outlier_exposure_loss(LOGITS, TARGET, reduction=reduction, counts=(1, 2))


def test_not_with_a_process_group():
    with pytest.raises(ValueError, match="processes of a process_group find their own counts"):
        outlier_exposure_loss(LOGITS, TARGET, counts=(1, 2), process_group="world")


FEATURES = torch.randn(24, 6, dtype=torch.float64)


def make_model():
    torch.manual_seed(3)
    return torch.nn.Linear(6, 5).double()


def whole_batches(reduction, steps):
    """The weights that a Trainer must reach."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        loss = reference.outlier_exposure_loss(
            model(FEATURES), TARGET, 0.5, reduction, ignore_index=IGNORE
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


class ForTrainer(torch.nn.Module):
    """A model as a Trainer calls it."""

    def __init__(self):
        super().__init__()
        self.linear = make_model()

    def forward(self, features):
        return SimpleNamespace(logits=self.linear(features))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize(("block", "reduction"), enumerate(["mean", "group_mean"]))
def test_trainer(tmp_path, block, reduction, accumulate):
    """transformers' Trainer, as the README says it: parts train as the whole batch does."""
    transformers = optional.module("transformers")
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {
        **vars(oe_ext),
        "model": ForTrainer(),
        "args": transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(FEATURES) // accumulate,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=3,
            learning_rate=0.5,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        "dataset": [{"features": x, "labels": y} for x, y in zip(FEATURES, TARGET, strict=True)],
    }
    for code in blocks[: block + 1]:
        exec(code, names)  # noqa: S102
    names["trainer"].train()
    expected = whole_batches(reduction, steps=3)
    for ours, theirs, before in zip(
        names["model"].parameters(), expected, make_model().parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-7)
        assert (ours - before).abs().max() > 1e-3

"""What calls with ``upsample="bilinear"`` return beside the loss, refuse, and take of memory."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from inputs import IGNORE, REDUCTIONS, make_logits
from oracles import max_error
from test_upsampled import make_labels

from oe_ext import OutlierExposureLoss, outlier_exposure_loss

OPERATOR = torch.ops.oe_ext.upsampled_outlier_exposure_loss


def test_statistics_and_scores():
    for width, align_corners in ((36, False), (33, True), (30, False)):
        logits = make_logits((2, 19, 4, 9), torch.float32)
        logits[0, 3] = logits[0, 2]  # the argmax is the first of two
        target = make_labels(19, (2, 16, width))
        module = OutlierExposureLoss(
            ignore_index=IGNORE,
            upsample="bilinear",
            align_corners=align_corners,
            return_stats=True,
            return_scores=True,
        )
        loss, stats, scores = module(logits.requires_grad_(), target)
        full = F.interpolate(
            logits.double(), target.shape[1:], mode="bilinear", align_corners=align_corners
        )
        expected = outlier_exposure_loss(
            full, target, ignore_index=IGNORE, return_stats=True, return_scores=True
        )
        torch.testing.assert_close(loss.double(), expected[0])
        for name, value, right in zip(stats._fields, stats, expected[1], strict=True):
            torch.testing.assert_close(value.double(), right.double(), msg=name)
        for value, right in zip(scores, expected[2], strict=True):
            torch.testing.assert_close(value.double(), right, equal_nan=True, rtol=2e-6, atol=2e-6)
        (grad,) = torch.autograd.grad(loss, logits)
        (without,) = torch.autograd.grad(
            outlier_exposure_loss(
                logits,
                target,
                ignore_index=IGNORE,
                upsample="bilinear",
                align_corners=align_corners,
            ),
            logits,
        )
        assert max_error(grad, without) <= 5e-7 * without.abs().max()


def test_the_module_shows_its_settings():
    module = OutlierExposureLoss(upsample="bilinear", align_corners=True)
    assert "upsample='bilinear', align_corners=True" in repr(module)
    assert "upsample" not in repr(OutlierExposureLoss())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"upsample": "nearest"}, ValueError, ["'bilinear'", "'nearest'"]),
        ({"upsample": None, "align_corners": True}, ValueError, ["align_corners", "upsample"]),
        ({"align_corners": 1}, TypeError, ["align_corners", "bool", "int"]),
        ({"logits": torch.randn(5, 3, 4)}, ValueError, ["[N, C, h, w]", "[5, 3, 4]"]),
        ({"target": torch.zeros(3, 8, 8).long()}, ValueError, ["[2, 5, 3, 4]", "[3, 8, 8]"]),
        ({"target": torch.zeros(2, 8).long()}, ValueError, ["[N, H, W]", "[2, 8]"]),
        ({"logits": torch.randn(2, 0, 3, 4)}, ValueError, ["at least one class"]),
        ({"logits": torch.randn(2, 5, 0, 4)}, ValueError, ["at least one row"]),
        ({"upsample": None}, ValueError, ["[2, 3, 4]", "[2, 8, 8]", "upsample='bilinear'"]),
        ({"logits": torch.randn(2, 5, 3, 4).long()}, TypeError, ["float16"]),
        ({"target": torch.full((2, 8, 8), 5)}, IndexError, ["[0, 5)", "position [0, 0, 0]"]),
        ({"weight": torch.ones(4)}, ValueError, ["weight", "[5]", "[4]"]),
        ({"weight": torch.ones(5, requires_grad=True)}, NotImplementedError, ["weight"]),
    ],
)
def test_errors(change, error, words):
    arguments = {
        "logits": torch.randn(2, 5, 3, 4),
        "target": torch.zeros(2, 8, 8, dtype=torch.int64),
        "upsample": "bilinear",
    }
    for call in (outlier_exposure_loss, None):
        if call is None:  # the operator itself
            if "upsample" in change or "align_corners" in change:
                continue
            call = OPERATOR
            del arguments["upsample"]
        with pytest.raises(error) as raised:
            call(**arguments | change)
        for word in words:
            assert word in str(raised.value)


def test_the_first_illegal_label_is_named():
    logits = torch.randn(2, 5, 3, 100)
    target = torch.zeros(2, 24, 800, dtype=torch.int64)
    target[1, 3, 790] = target[1, 5, 2] = 77  # the second one lies in an earlier strip
    for reduction, requires_grad in itertools.product(REDUCTIONS, [False, True]):
        with pytest.raises(IndexError, match=r"got 77 at position \[1, 3, 790\]"):
            outlier_exposure_loss(
                logits.requires_grad_(requires_grad),
                target,
                reduction=reduction,
                upsample="bilinear",
            )


MEMORY = """
import torch
from oe_ext import outlier_exposure_loss

torch.set_num_threads(2)

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

def step(size):
    logits = torch.randn(1, 19, size, size, requires_grad=True)
    target = torch.randint(0, 19, (1, 8 * size, 8 * size), dtype=torch.uint8)
    before = peak()
    outlier_exposure_loss(logits, target, ood_index=255, upsample="bilinear").backward()
    return peak() - before

step(16)
print(step(128))
"""


def test_memory():
    """Beyond the gradient, at most a tenth of a map of the full size."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    full = 19 * 1024 * 1024 * 4
    assert int(run.stdout) <= full / 64 + 0.1 * full

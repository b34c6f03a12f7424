"""Bad input: the type of the error, and a text with what was required and what arrived."""

import re

import numpy as np
import pytest
import torch
from inputs import INT_DTYPES

from oe_ext import OutlierExposureLoss, outlier_exposure_loss

LOGITS = torch.zeros(4, 3)
TARGET = torch.zeros(4, dtype=torch.int64)


def raises(error, *fragments):
    """Expects the error, with every fragment in its text."""
    pattern = "".join(f"(?=[\\s\\S]*{re.escape(fragment)})" for fragment in fragments)
    return pytest.raises(error, match=pattern)


@pytest.mark.parametrize("reduction", ["average", "Mean", "", "batchmean"])
def test_reduction(reduction):
    names = ["none", "sum", "mean", "group_mean", repr(reduction)]
    with raises(ValueError, "OutlierExposureLoss", *names):
        OutlierExposureLoss(reduction=reduction)
    with raises(ValueError, "outlier_exposure_loss", *names):
        outlier_exposure_loss(LOGITS, TARGET, reduction=reduction)


@pytest.mark.parametrize("alpha", [float("inf"), -float("inf"), float("nan")])
def test_alpha_that_is_not_finite(alpha):
    with raises(ValueError, "OutlierExposureLoss", "finite", str(alpha)):
        OutlierExposureLoss(alpha=alpha)
    with raises(ValueError, "outlier_exposure_loss", "finite", str(alpha)):
        outlier_exposure_loss(LOGITS, TARGET, alpha)


def test_alpha_tensor():
    with raises(ValueError, "does not broadcast", "[3]", "[4]"):
        outlier_exposure_loss(LOGITS, TARGET, torch.ones(3))
    with raises(ValueError, "does not broadcast", "[1, 4]", "[4]"):
        outlier_exposure_loss(LOGITS, TARGET, torch.ones(1, 4))
    with raises(TypeError, "alpha", "floating-point", "Long"):
        outlier_exposure_loss(LOGITS, TARGET, torch.ones((), dtype=torch.int64))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_rank_of_logits(shape):
    with raises(ValueError, "[N, C]", str(list(shape)), "[4]"):
        outlier_exposure_loss(torch.zeros(shape), TARGET)


@pytest.mark.parametrize(
    ("logits_shape", "target_shape", "expected"),
    [
        ((5, 3), (4, 1), [5]),
        ((5, 3), (4,), [5]),
        ((5, 3), (5, 3), [5]),
        ((2, 3, 4, 5), (2, 5, 4), [2, 4, 5]),
        ((2, 3, 4, 5), (2, 20), [2, 4, 5]),
        ((1, 3), (), [1]),
    ],
)
def test_shape_of_target(logits_shape, target_shape, expected):
    with raises(
        ValueError,
        f"target must have shape {expected}",
        f"got {list(target_shape)}",
        str(list(logits_shape)),
    ):
        outlier_exposure_loss(torch.zeros(logits_shape), torch.zeros(target_shape).long())


@pytest.mark.parametrize("shape", [(4, 0), (0, 0), (4, 0, 2)])
def test_no_classes(shape):
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    with raises(ValueError, "at least one class", str(list(shape))):
        outlier_exposure_loss(torch.zeros(shape), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_soft_labels(dtype):
    with raises(TypeError, "int64, int32, int16, int8 or uint8", "soft labels", "target.long()"):
        outlier_exposure_loss(LOGITS, TARGET.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint64])
def test_integers_that_are_no_labels_hear_of_a_way_out(dtype):
    with raises(TypeError, "target", "target.long() makes labels"):
        outlier_exposure_loss(LOGITS, TARGET.to(dtype))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bool, "Bool"), (torch.complex64, "Complex")])
def test_dtype_of_target(dtype, name):
    with raises(TypeError, "target", "int64, int32, int16, int8 or uint8", name):
        outlier_exposure_loss(LOGITS, TARGET.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int64, "Long"), (torch.complex64, "Complex"), (torch.bool, "Bool")]
)
def test_dtype_of_logits(dtype, name):
    with raises(TypeError, "logits", "float16, bfloat16, float32 or float64", name):
        outlier_exposure_loss(LOGITS.to(dtype), TARGET)


def test_none():
    with raises(TypeError, "logits must be a tensor", "None"):
        outlier_exposure_loss(None, TARGET)
    with raises(TypeError, "target must be a tensor", "None"):
        outlier_exposure_loss(LOGITS, None)


LONG = list(range(20_000))


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize(
    ("name", "bad", "got"),
    [
        ("target", LONG, "list"),
        ("target", np.zeros(20_000), "ndarray"),
        ("target", 3, "int"),
        ("logits", {"out": LOGITS, "aux": LOGITS}, "dict"),
        ("logits", [LOGITS], "list"),
        ("logits", (LOGITS, LOGITS), "tuple"),
        ("alpha", "0.5", "str"),
        ("alpha", LONG, "list"),
        ("alpha", None, "None"),
        ("alpha", 1j, "complex"),
        ("alpha", np.ones(3), "ndarray"),
        ("reduction", LONG, "list"),
        ("reduction", 1, "int"),
        ("ignore_index", LONG, "list"),
        ("ignore_index", False, "bool"),
        ("ignore_index", "255", "str"),
        ("ignore_index", 255.0, "float"),
        ("ignore_index", np.bool_(True), "bool"),
        ("ignore_index", torch.tensor(True), "Tensor"),
        ("ignore_index", torch.tensor([0, 255]), "Tensor"),
        ("ood_index", True, "bool"),
        ("ood_index", "254", "str"),
        ("ood_index", [0, 255], "list"),
    ],
    ids=str,
)
def test_an_argument_of_another_type_is_named_in_one_line(name, bad, got, stats):
    """A TypeError that names the type of the argument, never its value."""
    arguments = {"logits": LOGITS, "target": TARGET, name: bad}
    with raises(TypeError, f"outlier_exposure_loss: {name} must be", f"got {got}") as error:
        outlier_exposure_loss(**arguments, return_stats=stats)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120
    if name not in ("logits", "target"):
        with raises(TypeError, f"OutlierExposureLoss: {name} must be", f"got {got}") as error:
            OutlierExposureLoss(**{name: bad})
        assert len(str(error.value)) < 120


@pytest.mark.parametrize("alpha", [1, True, np.float32(1.0), np.array(1.0), np.int64(1)], ids=repr)
def test_numbers_of_other_types(alpha):
    expected = outlier_exposure_loss(LOGITS, TARGET - 1, 1.0)
    assert torch.equal(outlier_exposure_loss(LOGITS, TARGET - 1, alpha), expected)
    assert torch.equal(OutlierExposureLoss(alpha)(LOGITS, TARGET - 1), expected)


def test_process_group():
    for call in (
        lambda group: OutlierExposureLoss(process_group=group),
        lambda group: outlier_exposure_loss(LOGITS, TARGET, process_group=group),
    ):
        for name in ("all", "World", ""):
            with raises(ValueError, "process_group must be None, 'world' or a", f"got {name!r}"):
                call(name)
    with raises(TypeError, "process_group must be None, 'world' or a", "got int"):
        OutlierExposureLoss(process_group=3)


def test_devices_differ():
    with raises(RuntimeError, "same device", "cpu", "meta"):
        outlier_exposure_loss(LOGITS.to("meta"), TARGET)
    with raises(RuntimeError, "same device", "alpha", "cpu", "meta"):
        outlier_exposure_loss(
            LOGITS.to("meta"),
            TARGET.to("meta"),
            torch.ones(()),
        )


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", INT_DTYPES)
def test_label_out_of_range(dtype, requires_grad):
    logits = torch.zeros(2, 3, 4, requires_grad=requires_grad)
    target = torch.zeros(2, 4, dtype=dtype)
    target[1, 2] = 3
    with raises(IndexError, "[0, 3)", "got 3", "position [1, 2]", "C = 3"):
        outlier_exposure_loss(logits, target)
    # The first of several, whichever thread finds it.
    target[1, 3] = 99
    with raises(IndexError, "got 3", "position [1, 2]"):
        outlier_exposure_loss(logits, target)


@pytest.mark.parametrize("position", [0, 21, 39])
@pytest.mark.parametrize("label", [2**31 - 1, 2**31, 2**32 + 1, 2**40 + 2, 2**63 - 1])
def test_label_that_is_no_class_but_for_its_last_bits(label, position):
    """The CPU kernels compare labels in 32 bits."""
    target = torch.tensor([0, 1, 2, -1] * 10)
    target[position] = label
    with raises(IndexError, f"got {label}", f"position [{position}]"):
        outlier_exposure_loss(torch.zeros(40, 3), target)


def test_label_out_of_range_tells_of_special_labels_that_are_not_set():
    """Void pixels are 255 in many data sets; unsigned labels cannot be negative."""
    target = torch.tensor([0, 255, 2, 1])
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.int64):
        with raises(IndexError, "got 255", "ignore_index", "ood_index") as error:
            outlier_exposure_loss(LOGITS, target.to(dtype))
        assert ("negative" in str(error.value)) == (dtype == torch.int64)
        with raises(IndexError, "got 255", "ignore_index = 1", "; ood_index names"):
            outlier_exposure_loss(LOGITS, target.to(dtype), ignore_index=1)
        with raises(IndexError, "got 255", "ood_index = 1", "; ignore_index names"):
            outlier_exposure_loss(LOGITS, target.to(dtype), ood_index=1)


def test_label_out_of_range_names_the_special_labels():
    target = torch.tensor([0, 77, 2, 1])
    with raises(IndexError, "got 77", "ood_index = 9", "ignore_index = 8"):
        outlier_exposure_loss(LOGITS, target, ood_index=9, ignore_index=8)
    with raises(IndexError, "got -1", "position [2]", "ood_index = 9"):
        outlier_exposure_loss(LOGITS, torch.tensor([0, 9, -1, 1]), ood_index=9)


@pytest.mark.parametrize("num_rows", [100_000])
def test_label_out_of_range_with_threads(num_rows):
    target = torch.zeros(num_rows, dtype=torch.int64)
    target[[num_rows - 1, num_rows // 2]] = torch.tensor([5, 4])
    with raises(IndexError, "got 4", f"position [{num_rows // 2}]"):
        outlier_exposure_loss(torch.zeros(num_rows, 3), target)


def test_the_operator_checks_too():
    """Inference mode skips autograd; the operator is public; Meta tensors never reach a kernel."""
    operator = torch.ops.oe_ext.outlier_exposure_loss
    with torch.inference_mode(), raises(ValueError, "target must have shape [4]", "got [3]"):
        operator(LOGITS, TARGET[:3])
    with raises(ValueError, "target must have shape [4]", "got [3]"):
        operator(LOGITS.to("meta"), TARGET[:3].to("meta"))
    with raises(ValueError, "group_mean", "'median'"):
        operator(LOGITS.to("meta"), TARGET.to("meta"), 0.5, "median")


def test_backward_operator_checks_its_inputs():
    """Every mismatch must raise: the operator could write out of bounds."""
    forward = torch.ops.oe_ext._outlier_exposure_loss_forward
    backward = torch.ops.oe_ext._outlier_exposure_loss_backward
    options = (0.5, None, "mean", None, None)
    loss, _, row_max, row_sum_exp, counts, _ = forward(LOGITS, TARGET, *options, False)
    tensors = {
        "grad": loss,
        "logits": LOGITS,
        "target": TARGET,
        "row_max": row_max,
        "row_sum_exp": row_sum_exp,
        "counts": counts,
    }
    names = ["alpha", "alpha_tensor", "reduction", "ignore_index", "ood_index"]
    tensors.update(zip(names, options, strict=True))
    assert backward(**tensors).shape == LOGITS.shape
    for name, bad in [
        ("grad", torch.ones(4)),
        ("row_max", row_max[:3]),
        ("row_sum_exp", row_sum_exp.double()),
        ("counts", counts[:1]),
        ("counts", counts.int()),
    ]:
        with raises(RuntimeError, name, "must"):
            backward(**{**tensors, name: bad})
    with raises(IndexError, "got 9"):
        backward(**{**tensors, "target": TARGET + 9})

"""Every operator has a kernel for every backend of this build, and a frozen public schema."""

import pytest
import torch

from oe_ext import _ext

OPERATORS = [
    "oe_ext::outlier_exposure_loss",
    "oe_ext::outlier_exposure_loss.tensor_alpha",
    "oe_ext::_outlier_exposure_loss_forward",
    "oe_ext::_outlier_exposure_loss_backward",
    "oe_ext::_outlier_exposure_loss_backward_from_unit",
    "oe_ext::upsampled_outlier_exposure_loss",
    "oe_ext::upsampled_outlier_exposure_loss.tensor_alpha",
    "oe_ext::_upsampled_outlier_exposure_loss_forward",
    "oe_ext::_upsampled_outlier_exposure_loss_backward",
]


def test_the_list_is_complete():
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("oe_ext::")}
    assert names == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels(name):
    """A CUDA build has the CUDA kernels, with or without a GPU. If only torch is a CUDA build, they
    are replaced by an error."""
    of_cuda = _ext.has_cuda_kernels() or torch.version.cuda is not None
    expected = {"CPU": True, "Meta": True, "Autograd": True, "CUDA": of_cuda}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {key: has(name, key) for key in expected} == expected


def test_the_public_schema():
    operator = torch.ops.oe_ext.outlier_exposure_loss
    assert str(operator.default._schema) == (
        "oe_ext::outlier_exposure_loss(Tensor logits, Tensor target, float alpha=0.5, "
        'str reduction="mean", *, SymInt? ignore_index=None, SymInt? ood_index=None, '
        "Tensor? weight=None, float label_smoothing=0.) -> Tensor"
    )
    assert str(operator.tensor_alpha._schema) == (
        "oe_ext::outlier_exposure_loss.tensor_alpha(Tensor logits, Tensor target, Tensor alpha, "
        'str reduction="mean", *, SymInt? ignore_index=None, SymInt? ood_index=None, '
        "Tensor? weight=None, float label_smoothing=0.) -> Tensor"
    )


def test_the_public_schema_of_upsampled_logits():
    operator = torch.ops.oe_ext.upsampled_outlier_exposure_loss
    assert str(operator.default._schema) == (
        "oe_ext::upsampled_outlier_exposure_loss(Tensor logits, Tensor target, float alpha=0.5, "
        'str reduction="mean", *, SymInt? ignore_index=None, SymInt? ood_index=None, '
        "bool align_corners=False, Tensor? weight=None, float label_smoothing=0.) -> Tensor"
    )
    assert str(operator.tensor_alpha._schema) == (
        "oe_ext::upsampled_outlier_exposure_loss.tensor_alpha(Tensor logits, Tensor target, "
        'Tensor alpha, str reduction="mean", *, SymInt? ignore_index=None, '
        "SymInt? ood_index=None, bool align_corners=False, Tensor? weight=None, "
        "float label_smoothing=0.) -> Tensor"
    )

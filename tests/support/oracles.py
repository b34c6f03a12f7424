"""The oracles that the operator is compared with."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

from oe_ext import reference


def load_pytorch_ood_class() -> type[torch.nn.Module]:
    """``OutlierExposureLoss`` of the installed pytorch-ood, from its own files.

    The package's ``__init__`` files import torchvision and more, which the loss does not need.
    They are not executed.

    Raises:
        ModuleNotFoundError: pytorch-ood is not installed.
    """
    name = "pytorch_ood"
    if f"{name}.loss.oe" not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            command = "pip install --no-deps pytorch-ood==0.4.0"
            raise ModuleNotFoundError(f"pytorch-ood is missing: {command}", name=name)
        root = Path(spec.origin).parent
        for package in (name, f"{name}.loss", f"{name}.utils"):
            module = types.ModuleType(package)
            module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
            sys.modules[package] = module
        helpers = importlib.import_module(f"{name}.utils.utils")
        sys.modules[f"{name}.utils"].__dict__.update(
            {key: value for key, value in vars(helpers).items() if not key.startswith("__")}
        )
    return importlib.import_module(f"{name}.loss.oe").OutlierExposureLoss


def loss_and_grad(
    function, logits: Tensor, *args, upstream=None, **kwargs
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient (of ``<upstream, loss>`` if it is not a scalar)."""
    logits = logits.detach().requires_grad_()
    loss = function(logits, *args, **kwargs)
    if upstream is None:
        upstream = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    return loss.detach(), grad


def exact(logits: Tensor, *args, upstream=None, **kwargs) -> tuple[Tensor, Tensor]:
    """The reference's loss and gradient in float64."""
    if upstream is not None:
        upstream = upstream.double()
    return loss_and_grad(
        reference.outlier_exposure_loss, logits.double(), *args, upstream=upstream, **kwargs
    )


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute error, 0 for empty tensors; NaN and inf must be in the same places."""
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    same = torch.equal(actual.isnan(), expected.isnan()) and torch.equal(
        actual[expected.isinf()], expected[expected.isinf()]
    )
    if not same or not actual[finite].isfinite().all():
        return float("inf")
    return (actual - expected)[finite].abs().max().item() if finite.any() else 0.0

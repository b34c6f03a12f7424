"""The Outlier Exposure loss as one fused PyTorch operator in C++ and CUDA."""

from oe_ext import _ext
from oe_ext._version import __version__

_ext.load()  # registers the operators, before anything looks for them

from oe_ext import _vmap  # noqa: E402, F401
from oe_ext.functional import LossScores, LossStats, outlier_exposure_loss  # noqa: E402
from oe_ext.loss import OutlierExposureLoss  # noqa: E402

__all__ = [
    "LossScores",
    "LossStats",
    "OutlierExposureLoss",
    "__version__",
    "outlier_exposure_loss",
]

"""The Outlier Exposure loss as one fused PyTorch operator in C++ and CUDA."""

from oe_ext import _ext
from oe_ext._version import __version__

_ext.load()  # registers the operators, before anything looks for them

from oe_ext import _vmap  # noqa: E402, F401
from oe_ext.functional import (  # noqa: E402
    LossScores,
    LossStats,
    count_labels,
    outlier_exposure_loss,
)
from oe_ext.loss import OutlierExposureLoss  # noqa: E402

__all__ = [
    "LossScores",
    "LossStats",
    "OutlierExposureLoss",
    "__version__",
    "count_labels",
    "outlier_exposure_loss",
]

"""The Outlier Exposure loss as one fused PyTorch operator in C++ and CUDA."""

import sys

from oe_ext import _ext
from oe_ext._version import __version__

try:
    _ext.load()  # registers the operators, before anything looks for them
except ImportError as error:
    if "oe_ext.collect_env" not in sys.orig_argv:  # which tells of it, run by "python -m"
        raise
    _ext.fault = error
else:
    from oe_ext import _vmap  # noqa: F401
    from oe_ext.functional import LossScores, LossStats, count_labels, outlier_exposure_loss
    from oe_ext.loss import OutlierExposureLoss

__all__ = [
    "LossScores",
    "LossStats",
    "OutlierExposureLoss",
    "__version__",
    "count_labels",
    "outlier_exposure_loss",
]

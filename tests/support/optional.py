"""Packages that some tests use, and that an environment may lack.

``make test ENV=current`` uses an environment as it is, and skips tests whose package is missing.
Everywhere else a missing package is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from oracles import load_pytorch_ood_class


@contextmanager
def _may_be_missing(*packages: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name in packages and os.environ.get("OE_EXT_TEST_MISSING") == "skip":
            pytest.skip(f"{error.name} is not installed", allow_module_level=True)
        raise


def module(name: str) -> ModuleType:
    """Imports a module of an optional package."""
    with _may_be_missing(name.partition(".")[0]):
        return importlib.import_module(name)


def require(*packages: str) -> None:
    """Requires packages that another process will import."""
    for package in packages:
        with _may_be_missing(package):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"{package} is missing", name=package)


def pytorch_ood_class() -> type[torch.nn.Module]:
    """pytorch-ood's class, which ours replaces."""
    with _may_be_missing("pytorch_ood"):
        return load_pytorch_ood_class()

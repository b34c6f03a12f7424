"""Finds the compiled library, or builds it, and loads it once.

The order: what another copy has registered already; the prebuilt ``oe_ext._C``; a JIT build from
``csrc/`` of an editable checkout. ``OE_EXT_JIT=1`` skips the prebuilt one.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import re
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parent
_MARKER = re.compile(rb"oe_ext-built-with-torch=([0-9A-Za-z.+_-]+)")

#: The loaded module, and where it came from; None where the operators were registered elsewhere.
module: ModuleType | None = None
origin = "not loaded"


def load() -> None:
    """Registers the operators with torch. Calling it again does nothing.

    Raises:
        ImportError: there is no library and none can be built, or it was built for another torch.
    """
    global module, origin
    if module is not None:
        return
    if is_registered():
        origin = "registered by another library in this process"
        return
    if os.environ.get("OE_EXT_JIT") == "1":
        module, origin = _load_jit("OE_EXT_JIT=1")
        return
    path = prebuilt_library()
    if path is None:
        module, origin = _load_jit("oe_ext has no compiled library (oe_ext._C)")
        return
    module, origin = _load_prebuilt(path), str(path)


def is_registered() -> bool:
    """Whether the operators exist in this process. Registering them twice would abort it."""
    names = torch._C._dispatch_get_all_op_names()
    return "oe_ext::outlier_exposure_loss" in names


def prebuilt_library() -> Path | None:
    """The library beside this file, or None. Looking for it does not load it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = _PACKAGE / f"_C{suffix}"
        if path.is_file():
            return path
    return None


def built_with_torch(path: Path) -> str | None:
    """The version of torch that a library was compiled with, read from its file."""
    found = _MARKER.search(path.read_bytes())
    return found.group(1).decode() if found else None


def _load_prebuilt(path: Path) -> ModuleType:
    built = built_with_torch(path)
    if built is None or built.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"oe_ext was built with torch {built or 'of an unknown version'}, but torch "
            f"{torch.__version__} is installed, and torch's C++ interface differs between them. "
            f"{_how_to_rebuild()}",
            path=str(path),
        )
    try:
        return importlib.import_module("oe_ext._C")
    except ImportError as error:
        raise ImportError(
            f"oe_ext's library was found but could not be loaded: {error}\n"
            f"It was built with torch {built}; torch {torch.__version__} is installed. Likely "
            f"causes: another build of torch (CPU or CUDA, another C++ library), or another "
            f"Python. {_how_to_rebuild()}",
            path=str(path),
        ) from error


def _how_to_rebuild() -> str:
    if (_PACKAGE.parent / "csrc").is_dir():
        where = f"-e {_PACKAGE.parent}"
    else:
        where = "--force-reinstall --no-deps oe_ext"
    return f"Build it again for this torch:\n    pip install --no-build-isolation {where}"


def _load_jit(reason: str) -> tuple[ModuleType, str]:
    root = _PACKAGE.parent
    if not (root / "csrc" / "library.cpp").is_file():
        raise ImportError(
            f"{reason}, and it cannot be built here, since {root} holds no csrc/ folder. A JIT "
            "build needs an editable checkout:\n"
            "    git clone <the repository>; pip install --no-build-isolation -e oe_ext\n"
            "Without one, install a wheel, and unset OE_EXT_JIT."
        )
    from oe_ext import _jit

    return _jit.build_and_load(root)

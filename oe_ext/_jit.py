"""Builds the library from ``csrc/`` at import: for development, where no wheel is at hand."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from oe_ext import _build


def build_and_load(root: Path) -> tuple[ModuleType, str]:
    """Compiles what has changed in ``root / "csrc"`` and loads the library.

    Returns the module and the path of its file.
    """
    _build.find_cuda_home()  # before cpp_extension looks for it
    from torch.utils import cpp_extension

    build = _build.describe_build(root)
    name = module_name(root, build)
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with _locked(folder), _ninja_on_path():
        # Whoever holds our lock builds alone: a lock of torch's own is left from a killed build,
        # and torch would wait for it for ever.
        (folder / "lock").unlink(missing_ok=True)
        try:
            module = cpp_extension.load(
                name=name,
                sources=[str(root / source) for source in build.sources],
                # load() hands the flags to a shell as they are
                extra_cflags=[shlex.quote(flag) for flag in build.cxx_flags],
                extra_cuda_cflags=[shlex.quote(flag) for flag in build.nvcc_flags],
                extra_ldflags=[f"-l{library}" for library in build.libraries],
                build_directory=str(folder),
                with_cuda=build.cuda,
                verbose=os.environ.get("OE_EXT_VERBOSE") == "1",
            )
        except (RuntimeError, OSError) as error:
            raise ImportError(
                f"the JIT build of oe_ext in {folder} failed. It needs a C++20 compiler (g++ >= "
                "11), ninja and torch's headers; OE_EXT_VERBOSE=1 shows the build. The error "
                f"was:\n{error}"
            ) from error
    return module, f"{module.__file__} (JIT build of {root / 'csrc'})"


def module_name(root: Path, build: _build.Build) -> str:
    """A name that no other checkout and no other torch shares: torch's cache key has neither."""
    flags = [*build.cxx_flags, *build.nvcc_flags, *build.sources]
    key = "\0".join([str(root), sys.version, torch.__version__, *flags])
    return "oe_ext_jit_" + hashlib.sha256(key.encode()).hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a file lock that ends with the process, however the process ends."""
    with (folder / "oe_ext.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """ninja lies beside the interpreter, which is not on PATH where no venv is activated."""
    before = os.environ.get("PATH", "")
    beside = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join(part for part in (before, beside) if part)
    try:
        yield
    finally:
        os.environ["PATH"] = before

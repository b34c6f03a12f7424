"""Finds the compiled library, or builds it, and loads it once.

It tries, in this order: operators that another copy has already registered; the prebuilt
``oe_ext._C``, beside this file or of an install from the same sources; a JIT build from ``csrc/``
of an editable checkout. ``OE_EXT_JIT=1`` skips the prebuilt ones.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from oe_ext import _build
from oe_ext._version import __version__

_PACKAGE = Path(__file__).resolve().parent
_MARKER = re.compile(rb"oe_ext-built-with-torch=([0-9A-Za-z.+_-]+)")

#: The loaded module, and its origin; None if another library registered the operators.
module: ModuleType | None = None
origin = "not loaded"

#: Why nothing is loaded, where the import of oe_ext goes on without.
fault: ImportError | None = None

_errors: torch.library.Library | None = None  # while it lives, its kernels are registered


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
    path = prebuilt_library() or installed_library()
    try:
        wants_jit = _build.switch("OE_EXT_JIT")
    except ValueError as error:
        raise ImportError(str(error)) from error
    if wants_jit:
        module, origin = _load_jit("OE_EXT_JIT=1")
    elif path is None:
        module, origin = _load_jit(_no_library())
    else:
        module, origin = _load_prebuilt(path), str(path)
    _tell_compile_caches()
    if torch.version.cuda is not None and not has_cuda_kernels():
        _register_error_for_cuda()


def _tell_compile_caches() -> None:
    """Makes the library part of the key of torch.compile's caches, which outlive processes.
    Otherwise code compiled for another version of the operators would run, and could be wrong."""
    path = None if module is None else module.__file__
    library = b"" if path is None else Path(path).read_bytes()
    tag = f"oe_ext-{__version__}-{hashlib.sha256(library).hexdigest()[:16]}"
    config = torch.compiler.config
    config.cache_key_tag = " ".join(filter(None, [config.cache_key_tag, tag]))


def has_cuda_kernels() -> bool:
    """Whether the library was built with CUDA kernels, with or without a GPU here."""
    return module is not None and module.build_info()["cuda"] is not None


def is_registered() -> bool:
    """Whether the operators exist in this process. Registering them twice would abort it."""
    return "oe_ext::outlier_exposure_loss" in _operator_names()


def _operator_names() -> list[str]:
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return [name for name in names if name.startswith("oe_ext::")]


def _register_error_for_cuda() -> None:
    """Registers an error in place of the missing kernels. torch's own error talks about custom
    builds and other backends."""
    global _errors

    def no_kernel(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"oe_ext was built without CUDA kernels, and was called with CUDA tensors; "
            f"it came from {origin}. With a toolkit of CUDA {torch.version.cuda}, "
            f"build it again:\n    FORCE_CUDA=1 {_install_again()}"
        )

    _errors = torch.library.Library("oe_ext", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    for name in _operator_names():
        _errors.impl(name.removeprefix("oe_ext::"), no_kernel)  # type: ignore[no-untyped-call]


def prebuilt_library() -> Path | None:
    """The library beside this file, or None. Looking for it does not load it."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = _PACKAGE / f"_C{suffix}"
        if path.is_file():
            return path
    return None


def installed_library() -> Path | None:
    """The library of an install that this folder of sources shadows, or None.

    It must be of the same sources: its build ID is their hash.
    """
    root = _PACKAGE.parent
    if not (root / "csrc").is_dir():
        return None
    build_id = _build.build_id(root)
    for folder in sys.path:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(folder or ".", _PACKAGE.name, f"_C{suffix}")
            if path.is_file() and build_id in path.read_bytes():
                return path.resolve()
    return None


def _no_library() -> str:
    """Says what is missing, and what is there instead."""
    others = ", ".join(sorted(path.name for path in _PACKAGE.glob("_C.*.so")))
    this = f"oe_ext has no compiled library (oe_ext._C{importlib.machinery.EXTENSION_SUFFIXES[0]})"
    return f"{this}, but one for another Python or platform ({others})" if others else this


def load_file(name: str, path: Path) -> ModuleType:
    """The extension module in a file, which need not be where Python looks for modules.

    Raises:
        ImportError: it cannot be loaded.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module", path=str(path))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def built_with_torch(path: Path) -> str | None:
    """The version of torch that a library was compiled with, read from its file."""
    found = _MARKER.search(path.read_bytes())
    return found.group(1).decode() if found else None


def _load_prebuilt(path: Path) -> ModuleType:
    try:
        built = built_with_torch(path)
    except OSError as error:
        raise ImportError(
            f"oe_ext's library cannot be read: {error}. {_how_to_rebuild()}", path=str(path)
        ) from error
    if built is None or built.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"oe_ext was built with torch {built or 'of an unknown version'}, but torch "
            f"{torch.__version__} is installed, and torch's C++ interface differs between them. "
            f"{_how_to_rebuild()}",
            path=str(path),
        )
    try:
        if path.parent != _PACKAGE:
            return load_file("oe_ext._C", path)
        from oe_ext import _C  # named, so that programs that bundle others find it
    except ImportError as error:
        raise ImportError(
            f"oe_ext's library was found but could not be loaded: {error}\n"
            f"It was built with torch {built}; torch {torch.__version__} is installed. Likely "
            f"causes: another build of torch (CPU or CUDA, another C++ library), or another "
            f"Python. {_how_to_rebuild()}",
            path=str(path),
        ) from error
    return _C


def _how_to_rebuild() -> str:
    return f"Build it again for this torch:\n    {_install_again()}"


def _install_again() -> str:
    """A command that compiles it for the torch that is here, and leaves that as it is: not from
    pip's cache of wheels, whose names do not tell the torch, nor by a name that PyPI may lack."""
    if (_PACKAGE.parent / "csrc").is_dir():
        where = f"-e {shlex.quote(str(_PACKAGE.parent))}"
    else:
        where = f"--force-reinstall --no-cache-dir {_installed_from()}"
    return f"pip install --no-build-isolation --no-deps {where}"


def _installed_from() -> str:
    """The sources that pip has installed it from, if it wrote them down (PEP 610)."""
    beside = [str(_PACKAGE.parent)]
    texts = [
        found.read_text("direct_url.json")
        for found in importlib.metadata.distributions(name="oe_ext", path=beside)
    ]
    source = json.loads(next(filter(None, texts), "{}"))
    url: str = source.get("url", "")
    if "vcs_info" in source:
        version = source["vcs_info"]
        return shlex.quote(f"{version['vcs']}+{url}@{version['commit_id']}")
    if url and not url.endswith(".whl"):
        return shlex.quote(url)
    return "<a folder with the sources of oe_ext>"


def _load_jit(reason: str) -> tuple[ModuleType, str]:
    root = _PACKAGE.parent
    if not (root / "csrc" / "bindings.cpp").is_file():
        raise ImportError(
            f"{reason}, and it cannot be built here, since {root} holds no csrc/ folder. A JIT "
            "build needs an editable checkout:\n"
            "    git clone <the repository>; pip install --no-build-isolation -e oe_ext\n"
            "Without one, install a wheel, and unset OE_EXT_JIT."
        )
    from oe_ext import _jit

    return _jit.build_and_load(root)

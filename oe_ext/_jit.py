"""Builds the library from ``csrc/`` at import: for development, without a wheel."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import stat
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

    try:
        build = _build.describe_build(root)
    except (RuntimeError, ValueError) as error:
        raise ImportError(f"oe_ext cannot be built by JIT: {error}") from error
    name = module_name(root, build)
    # The name distinguishes interpreters and versions. torch's own function would create the
    # folder.
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(cache).resolve() / name  # a link may change later
    try:
        make_private(folder)
        with _locked(folder), _ninja_on_path():
            # Only the holder of our lock builds. A lock of torch is left over from a killed build,
            # and torch would wait for it forever.
            (folder / "lock").unlink(missing_ok=True)
            module = cpp_extension.load(
                name=name,
                sources=[str(root / source) for source in build.sources],
                # load() passes the flags to a shell unquoted
                extra_cflags=[shlex.quote(flag) for flag in build.cxx_flags],
                extra_cuda_cflags=[shlex.quote(flag) for flag in build.nvcc_flags],
                extra_ldflags=[
                    *_build.LINK_FLAGS,
                    *(f"-l{library}" for library in build.libraries),
                ],
                build_directory=str(folder),
                with_cuda=build.cuda,
                verbose=os.environ.get("OE_EXT_VERBOSE") == "1",
            )
    except (RuntimeError, OSError) as error:
        raise ImportError(
            f"the JIT build of oe_ext in {folder} failed. It needs a C++20 compiler (g++ >= 11), "
            "ninja (pip install ninja), torch's headers, and a folder that can be written to, with "
            "some MB free (TORCH_EXTENSIONS_DIR names another one); OE_EXT_VERBOSE=1 shows the "
            f"build. The error was:\n{error}"
        ) from error
    return module, f"{module.__file__} (JIT build of {root / 'csrc'})"


def make_private(folder: Path) -> None:
    """Creates a folder to load libraries from, or checks it: nobody else may change its files.

    Raises:
        ImportError: somebody else can change them, or could before.
    """
    for path in [*reversed(folder.parents), folder]:
        path.mkdir(mode=0o700, exist_ok=True)
    for path in (folder, *folder.parents):
        fault = _fault_of_folder(path, private=path == folder)
        if fault:
            raise _not_private(path, fault)
    for entry in os.scandir(folder):
        if entry.is_symlink() or entry.stat(follow_symlinks=False).st_uid != os.getuid():
            raise _not_private(folder, f"it holds {entry.name}, a link or another user's file")


def _fault_of_folder(path: Path, *, private: bool) -> str:
    """Says who else could replace files of a folder; empty for nobody."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder, but a link or a file"
    owners = {os.getuid()} if private else {os.getuid(), 0, *_unknown_users()}
    if status.st_uid not in owners:
        return f"it belongs to the user with number {status.st_uid}"
    writers = stat.S_IMODE(status.st_mode) & (stat.S_IWGRP | stat.S_IWOTH)
    if not private:
        if status.st_mode & stat.S_ISVTX:  # like /tmp: only owners can change their files
            return ""
        if status.st_gid == os.getgid():  # the user's own group, with a umask of 002
            writers &= ~stat.S_IWGRP
    return f"others can write to it (mode {stat.S_IMODE(status.st_mode):o})" if writers else ""


def _unknown_users() -> list[int]:
    """The number of all users that this user namespace does not know: in a rootless container, the
    root of the machine is one of them."""
    try:
        maps = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        unknown = int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return []
    ranges = [range(int(first), int(first) + int(count)) for first, _, count in maps]
    return [] if any(unknown in known for known in ranges) else [unknown]


def _not_private(path: Path, fault: str) -> ImportError:
    return ImportError(
        f"oe_ext neither builds in {path} nor loads a library from there: {fault}. Whoever can "
        "change a library can run code as you. Remove it, make it yours alone (chmod 700), or set "
        "TORCH_EXTENSIONS_DIR to a folder that is."
    )


def module_name(root: Path, build: _build.Build) -> str:
    """A name unique to this checkout and this torch: torch's cache key contains neither."""
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
    """Adds the interpreter's folder to PATH: ninja is there, also if no venv is activated."""
    before = os.environ.get("PATH", "")
    beside = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join(part for part in (before, beside) if part)
    try:
        yield
    finally:
        os.environ["PATH"] = before

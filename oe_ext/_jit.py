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

from oe_ext import _build, _ext


def build_and_load(root: Path) -> tuple[ModuleType, str]:
    """Loads the library of the sources in ``root / "csrc"``; compiles first what has changed.

    Returns the module and the path of its file.
    """
    with _environment_kept():
        _build.find_cuda_home()  # before cpp_extension looks for it
        try:
            build = _build.describe_build(root)
        except (RuntimeError, ValueError) as error:
            raise ImportError(f"oe_ext cannot be built by JIT: {error}") from error
        # The name distinguishes interpreters and versions.
        name = module_name(root, build)
        library = _cache() / name / f"{name}.so"
        try:
            make_private(library.parent)
            module = _load_or_compile(root, build, library)
        except (RuntimeError, OSError) as error:
            raise ImportError(
                f"the JIT build of oe_ext in {library.parent} failed. It needs a C++20 compiler "
                "(g++ >= 11), ninja (pip install ninja), torch's headers, and a folder that can be "
                "written to and that libraries can be loaded from, with some MB free "
                "(TORCH_EXTENSIONS_DIR names another one); OE_EXT_VERBOSE=1 shows the build. The "
                f"error was:\n{error}"
            ) from error
    return module, f"{module.__file__} (JIT build of {root / 'csrc'})"


def _cache() -> Path:
    """The folder for the libraries of all extensions, as torch chooses it."""
    from torch.utils import cpp_extension

    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    # A link may change later. torch's own function would create the folder.
    cache = Path(named or cpp_extension.get_default_build_root()).resolve()
    if not named and "~" in cache.parts:
        raise ImportError(
            "oe_ext has no folder for a JIT build, since this user has no home directory. Set "
            "HOME, or TORCH_EXTENSIONS_DIR to a folder."
        )
    return cache


def _load_or_compile(root: Path, build: _build.Build, library: Path) -> ModuleType:
    lock = library.with_name("oe_ext.lock")
    if lock.exists():  # else nothing has been built
        with _locked(lock, fcntl.LOCK_SH):
            module = _load_current(root, library)
        if module is not None:
            return module
    with _locked(lock, fcntl.LOCK_EX):
        # Another process may have built it meanwhile.
        return _load_current(root, library) or _compile(root, build, library)


def _load_current(root: Path, library: Path) -> ModuleType | None:
    """The module, if its file is whole, of these sources, and can be loaded."""
    record = _build.read_record(library.parent)
    if record.get("sources") != _build.hash_sources(root) or not library.is_file():
        return None
    if record.get("library") != _hash(library):
        return None  # half a file could end the process
    try:
        return _ext.load_file(library.stem, library)
    except ImportError:
        return None


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _compile(root: Path, build: _build.Build, library: Path) -> ModuleType:
    """Compiles what has changed; everything, if the library of these sources cannot be loaded."""
    from torch.utils import cpp_extension

    folder = library.parent
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError(f"the file system of {folder} is mounted with the option noexec")
    # Only the holder of our lock builds. A lock of torch is left over from a killed build, and
    # torch would wait for it forever.
    (folder / "lock").unlink(missing_ok=True)
    sources = _build.hash_sources(root)
    record = _build.read_record(folder)
    if record.get("sources") == sources and "library" in record:
        (folder / ".ninja_log").unlink(missing_ok=True)
    library.unlink(missing_ok=True)
    _build.forget_stale_objects(folder, root)
    try:
        module: ModuleType = cpp_extension.load(
            name=library.stem,
            sources=[str(root / source) for source in build.sources],
            # load() passes the flags to a shell unquoted
            extra_cflags=[shlex.quote(flag) for flag in build.cxx_flags],
            extra_cuda_cflags=[shlex.quote(flag) for flag in build.nvcc_flags],
            extra_ldflags=[*_build.link_flags(root), *(f"-l{name}" for name in build.libraries)],
            build_directory=str(folder),
            with_cuda=build.cuda,
            verbose=os.environ.get("OE_EXT_VERBOSE") == "1",
        )
    except ImportError as error:
        raise RuntimeError(f"{library} was built, but cannot be loaded: {error}") from error
    _build.write_record(folder, sources=sources, library=_hash(library))
    return module


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
def _locked(lock: Path, kind: int) -> Iterator[None]:
    """Holds a file lock that ends with the process, however the process ends."""
    with lock.open("r" if kind == fcntl.LOCK_SH else "w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"oe_ext: another process builds the library in {lock.parent}; waiting for it",
                file=sys.stderr,
            )
            fcntl.flock(file, kind)
        yield


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Changes of the environment end with it. The interpreter's folder is added to PATH: ninja is
    there, also if no venv is activated."""
    before = dict(os.environ)
    beside = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join(filter(None, [before.get("PATH"), beside]))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

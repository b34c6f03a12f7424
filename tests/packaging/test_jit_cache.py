"""The folder of the JIT build: it must be private, or nothing is built there or loaded from there.
Obstacles to a build end in one error that says what to do."""

import ctypes
import fcntl
import multiprocessing
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import programs
import pytest
from paths import ROOT

from oe_ext import _build, _jit

is_root = os.getuid() == 0
# Starts a program in which root, too, needs permissions.
AS_OTHER_USERS = ["setpriv", "--bounding-set=-dac_override"] if is_root else []


def test_every_folder_that_is_made_is_private(tmp_path):
    folder = tmp_path / "cache" / "oe_ext_jit_0"
    before = os.umask(0)
    try:
        _jit.make_private(folder)
    finally:
        os.umask(before)
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    _jit.make_private(folder)  # accepted the next time, too


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to(tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ImportError, match=rf"mode {mode:o}.*\n?.*chmod 700.*TORCH_EXTENSIONS_DIR"):
        _jit.make_private(folder)


def test_a_folder_in_one_that_others_can_write_to(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ImportError, match=re.escape(str(tmp_path / "open"))):
        _jit.make_private(tmp_path / "open" / "cache")
    (tmp_path / "open").chmod(0o1777)  # as /tmp
    _jit.make_private(tmp_path / "open" / "cache")


def test_a_link_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImportError, match="not a folder, but a link"):
        _jit.make_private(tmp_path / "cache")


def test_a_link_in_the_folder(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    (folder / "oe_ext_jit_0.so").symlink_to(tmp_path / "theirs.so")
    with pytest.raises(ImportError, match=r"holds oe_ext_jit_0\.so, a link"):
        _jit.make_private(folder)


@pytest.mark.skipif(not is_root, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "parent", "file"])
def test_another_users_property(tmp_path, what):
    folder = tmp_path / "parent" / "cache"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    library = folder / "oe_ext_jit_0.so"
    library.touch()
    os.chown({"folder": folder, "parent": folder.parent, "file": library}[what], 12345, 12345)
    with pytest.raises(ImportError, match=r"number 12345|another user's file"):
        _jit.make_private(folder)


def make_private_in_a_user_namespace(folder: Path) -> int:
    """As the user 12345, who is root in a namespace that knows nobody else; in a child process."""
    child = os.fork()
    if child != 0:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.setgid(12345)
        os.setuid(12345)
        libc = ctypes.CDLL(None)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is the user's
        if libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
            os._exit(3)
        Path("/proc/self/uid_map").write_text("0 12345 1")
        _jit.make_private(folder)
    except ImportError:
        os._exit(1)
    except BaseException:
        os._exit(2)
    os._exit(0)


@pytest.mark.skipif(not is_root, reason="only root can become another user")
def test_a_folder_in_a_rootless_container():
    """Where / belongs to a user that the namespace does not know."""
    parent = Path(tempfile.mkdtemp())
    try:
        os.chown(parent, 12345, 12345)
        status = make_private_in_a_user_namespace(parent / "cache")
        if status == 3:
            pytest.skip("this machine allows no user namespaces")
        assert status == 0
        assert stat.S_IMODE((parent / "cache").stat().st_mode) == 0o700
        (parent / "cache").chmod(0o777)
        assert make_private_in_a_user_namespace(parent / "cache") == 1
    finally:
        shutil.rmtree(parent)


def import_by_jit(
    checkout: Path,
    cache: Path,
    *wrapper: str,
    python: Path | str = sys.executable,
    **environment: str,
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*wrapper, python, "-c", "import oe_ext"],
        cwd=checkout,
        env=programs.jit_environment(checkout, cache, **environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The package and its sources, under a name with a space and letters beyond ASCII."""
    folder = tmp_path_factory.mktemp("jit") / "an é checkout"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "oe_ext", folder / "oe_ext", ignore=ignore)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


def path_without(tmp_path: Path, *missing: str) -> str:
    """A PATH with links to all programs of PATH but these."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for part in os.environ["PATH"].split(os.pathsep):
        for program in Path(part).glob("*") if Path(part).is_dir() else ():
            link = folder / program.name
            if program.name not in missing and not link.exists():
                link.symlink_to(program)
    return str(folder)


def assert_one_clear_error(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 1, done.stderr[-2000:]
    error = done.stderr[done.stderr.rindex("ImportError: ") :]
    for part in ("TORCH_EXTENSIONS_DIR", *parts):
        assert part in error


def test_no_compiler(checkout, tmp_path):
    path = path_without(tmp_path, "g++", "c++", "gcc", "cc")
    done = import_by_jit(checkout, tmp_path / "cache", PATH=path)
    assert_one_clear_error(done, "g++ >= 11")


def test_no_ninja(checkout, tmp_path):
    """ninja is neither on PATH nor beside the interpreter, where pip installs it."""
    python = tmp_path / "elsewhere" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    packages = os.pathsep.join([str(checkout), *filter(os.path.isdir, sys.path)])
    done = import_by_jit(
        checkout,
        tmp_path / "cache",
        python=python,
        PATH=path_without(tmp_path, "ninja"),
        PYTHONPATH=packages,
    )
    assert_one_clear_error(done, "Ninja is required", "pip install ninja")


def test_a_cache_that_cannot_be_made(checkout, tmp_path):
    """A file takes the folder's place, since root may write to read-only folders."""
    (tmp_path / "cache").touch()
    done = import_by_jit(checkout, tmp_path / "cache" / "inner")
    assert_one_clear_error(done, "can be written to", "File exists")


def test_a_cache_that_is_read_only(checkout, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    done = import_by_jit(checkout, cache, *AS_OTHER_USERS)
    assert_one_clear_error(done, "can be written to", f"Permission denied: '{cache}/")


@pytest.mark.packaging
def test_a_disk_with_no_room(checkout, tmp_path):
    """Files are limited to 8 KiB: the compiler fails as on a full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    (tmp_path / "limits").mkdir()
    (tmp_path / "limits" / "sitecustomize.py").write_text(limit)
    path = os.pathsep.join([str(tmp_path / "limits"), str(checkout)])
    done = import_by_jit(checkout, tmp_path / "cache", PYTHONPATH=path)
    assert_one_clear_error(done, "some MB free")


def test_a_cache_that_others_can_write_to(checkout, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert_one_clear_error(import_by_jit(checkout, tmp_path / "cache"), "others can write to it")


def test_a_cache_that_libraries_cannot_be_loaded_from(checkout, tmp_path):
    """Said before anything is compiled."""
    (tmp_path / "cache").mkdir(mode=0o700)
    mount = 'mount -t tmpfs -o noexec,mode=700 tmpfs "$0"'
    if subprocess.run(["unshare", "-m", "sh", "-c", mount, tmp_path / "cache"]).returncode != 0:
        pytest.skip("this machine lets nobody mount a file system")
    wrapper = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', tmp_path / "cache"]
    done = import_by_jit(checkout, tmp_path / "cache", *wrapper)
    assert_one_clear_error(done, "mounted with the option noexec")


def test_a_user_without_a_home(monkeypatch, tmp_path):
    """torch would take a folder named "~" in the current one."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=r"no home directory\. Set HOME, or TORCH_EXTENSIONS_DIR"):
        _jit._cache()
    assert not list(tmp_path.iterdir())


def test_who_waits_is_told(tmp_path, capsys):
    lock = tmp_path / "oe_ext.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        release = threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        release.start()
        with _jit._locked(lock, fcntl.LOCK_SH):
            release.join()
    assert f"another process builds the library in {tmp_path}; waiting" in capsys.readouterr().err
    with _jit._locked(lock, fcntl.LOCK_EX):
        pass
    assert not capsys.readouterr().err


class Small:
    """A checkout with one small source, which is compiled in a second."""

    def __init__(self, folder: Path) -> None:
        self.root, self.cache = folder / "checkout", folder / "cache"
        self.header = self.root / "csrc" / "value.h"
        self.header.parent.mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("small.cpp"), self.header.with_name("bindings.cpp"))
        self.header.write_text("constexpr long kValue = 1;\n")

    def replace(self, value: int) -> None:
        """By a file that is older than everything that has been built."""
        self.header.write_text(f"constexpr long kValue = {value};\n")
        os.utime(self.header, (1e9, 1e9))

    def value(self) -> int:
        """Builds and loads it in a process of its own."""
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()

        def run() -> None:
            os.environ["TORCH_EXTENSIONS_DIR"] = str(self.cache)
            kept = dict(os.environ)
            module, _ = _jit.build_and_load(self.root)
            assert dict(os.environ) == kept
            results.put(module.value())

        child = context.Process(target=run)
        child.start()
        child.join()
        assert child.exitcode == 0
        return results.get()

    @property
    def library(self) -> Path:
        (library,) = self.cache.glob("*/*.so")
        return library


@pytest.fixture
def small(tmp_path, monkeypatch) -> Small:
    monkeypatch.setenv("OE_EXT_CUDA", "0")
    return Small(tmp_path)


def test_a_source_that_an_older_one_replaces(small):
    """tar, rsync and cp -p keep times, and ninja compares them."""
    assert small.value() == 1
    small.replace(2)
    assert small.value() == 2
    small.replace(3)
    assert small.value() == 3


@pytest.mark.parametrize("damage", ["empty", "half", "other"])
def test_a_library_that_cannot_be_loaded_is_built_again(small, damage):
    assert small.value() == 1
    library = small.library
    whole = library.read_bytes()
    library.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "other": b"text"}[damage])
    assert small.value() == 1
    # As the last build left it, but not to be loaded: the objects are broken, too.
    object_file = library.with_name("bindings.o")
    object_file.write_bytes(b"")
    library.write_bytes(b"")
    _build.write_record(
        library.parent, sources=_build.hash_sources(small.root), library=_jit._hash(library)
    )
    assert small.value() == 1
    assert object_file.stat().st_size > 0


def test_a_current_library_needs_neither_a_compiler_nor_a_folder_to_write_to(small, tmp_path):
    assert small.value() == 1
    before = small.library.stat()
    code = (
        "import pathlib, sys; from oe_ext import _jit\n"
        "print(_jit.build_and_load(pathlib.Path(sys.argv[1]))[0].value())"
    )
    small.library.parent.chmod(0o500)
    try:
        done = subprocess.run(
            [*AS_OTHER_USERS, sys.executable, "-c", code, small.root],
            env=os.environ
            | {"TORCH_EXTENSIONS_DIR": str(small.cache), "PYTHONPATH": str(ROOT)}
            | {"PATH": path_without(tmp_path, "c++", "g++", "ninja")},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        small.library.parent.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
    assert small.library.stat().st_mtime_ns == before.st_mtime_ns

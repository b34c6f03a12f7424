"""Finding, checking and loading the library, and the errors that a user sees."""

import json
import modulefinder
import re
import shutil
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch

import oe_ext
from oe_ext import _build, _ext

PACKAGE = Path(oe_ext.__file__).parent


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that imports ``oe_ext`` from ``cwd``, if it is there."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=programs.environment(cwd, **environment),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def installed_copy(tmp_path):
    """The package as in an installed wheel: with the library, but without csrc/."""
    library = _ext.prebuilt_library()
    assert library is not None, "build it first: make build"
    # make test-pythons leaves a library for each Python
    ignored = shutil.ignore_patterns("__pycache__", "_C*.so")
    shutil.copytree(PACKAGE, tmp_path / "oe_ext", ignore=ignored)
    shutil.copy(library, tmp_path / "oe_ext")
    return tmp_path


def test_the_library_knows_its_torch():
    library = _ext.prebuilt_library() or Path(_ext.module.__file__)
    assert _ext.built_with_torch(library) == torch.__version__
    info = _ext.module.build_info()
    assert info["torch"] == torch.__version__
    assert info["compiler"].startswith(("g++", "clang"))


def test_an_installed_copy_works(installed_copy):
    done = python("import oe_ext; print(oe_ext.__file__, oe_ext._ext.origin)", installed_copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(installed_copy)) == 2


def test_another_torch_is_named(installed_copy):
    """The torch version is read from the file: loading the library could crash."""
    library = next((installed_copy / "oe_ext").glob("_C*.so"))
    marker = b"oe_ext-built-with-torch="
    content = library.read_bytes()
    version = torch.__version__.encode()
    other = b"9.9" + version[3:]
    assert content.count(marker + version) == 1
    library.write_bytes(content.replace(marker + version, marker + other))
    done = python("import oe_ext", installed_copy)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    for part in (
        f"built with torch {other.decode()}",
        f"torch {torch.__version__} is installed",
        "pip install --no-build-isolation",
    ):
        assert part in done.stderr


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "where"),
    [
        (None, "<a folder with the sources of oe_ext>"),
        ({"url": "file:///wheels/oe_ext-1.0-cp311-cp311-linux_x86_64.whl"}, "<a folder with"),
        ({"url": "file:///home/a%20b/oe_ext", "dir_info": {}}, "file:///home/a%20b/oe_ext"),
        (
            {"url": "https://example.org/x", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
            f"git+https://example.org/x@{COMMIT}",
        ),
    ],
)
def test_how_to_install_it_again(installed_copy, source, where):
    """A wheel of pip's cache would bring the same error, and torch must stay as it is."""
    if source is not None:
        folder = installed_copy / "oe_ext-9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: oe_ext\nVersion: 9\n")
        (folder / "direct_url.json").write_text(json.dumps(source))
    next((installed_copy / "oe_ext").glob("_C*.so")).write_bytes(b"")
    done = python("import oe_ext", installed_copy)
    (command,) = re.findall("pip install .*", done.stderr)
    options = "pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir "
    assert command.startswith(options + where)


def test_a_broken_library_is_reported_and_not_hidden(installed_copy):
    library = next((installed_copy / "oe_ext").glob("_C*.so"))
    library.write_bytes(b"oe_ext-built-with-torch=" + torch.__version__.encode() + b"\0")
    done = python("import oe_ext", installed_copy)
    assert done.returncode == 1
    assert "was found but could not be loaded" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


def test_a_library_that_cannot_be_read(installed_copy):
    """Reading it fails as for a user without the permission; root may read every file."""
    code = (
        "import pathlib; old = pathlib.Path.read_bytes\n"
        "def read_bytes(path):\n"
        "    if path.name.startswith('_C'): raise PermissionError(13, 'Permission denied')\n"
        "    return old(path)\n"
        "pathlib.Path.read_bytes = read_bytes; import oe_ext"
    )
    done = python(code, installed_copy)
    assert done.returncode == 1
    error = done.stderr[done.stderr.rindex("\nImportError: ") :]
    assert "library cannot be read: [Errno 13] Permission denied" in error
    assert "pip install --no-build-isolation" in error


def test_no_library_and_no_sources(installed_copy):
    next((installed_copy / "oe_ext").glob("_C*.so")).unlink()
    done = python("import oe_ext", installed_copy)
    assert done.returncode == 1
    assert "has no compiled library" in done.stderr
    assert "editable checkout" in done.stderr


def test_a_library_for_another_python(installed_copy):
    library = next((installed_copy / "oe_ext").glob("_C*.so"))
    library.rename(library.with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    done = python("import oe_ext", installed_copy)
    assert done.returncode == 1
    others = "but one for another Python or platform (_C.cpython-39-x86_64-linux-gnu.so)"
    assert others in done.stderr


def test_a_folder_of_sources_does_not_shadow_its_install(installed_copy, tmp_path):
    """As after "pip install ." in a checkout; but an install of other sources is not taken."""
    checkout = tmp_path / "checkout"
    shutil.copytree(PACKAGE, checkout / "oe_ext", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(PACKAGE.parent / "csrc", checkout / "csrc")
    path = {"PYTHONPATH": f"{checkout}:{installed_copy}"}
    code = "import oe_ext; print(oe_ext.__file__); print(oe_ext._ext.origin)"
    done = python(code, checkout, **path)
    assert done.returncode == 0, done.stderr
    package, library = done.stdout.splitlines()
    assert package.startswith(str(checkout))
    assert library.startswith(str(installed_copy / "oe_ext"))

    with (checkout / "csrc" / "bindings.cpp").open("a") as file:
        file.write("\n")
    (tmp_path / "no folder").touch()
    done = python(code, checkout, TORCH_EXTENSIONS_DIR=str(tmp_path / "no folder"), **path)
    assert done.returncode == 1
    assert "the JIT build of oe_ext in" in done.stderr


def test_a_second_import_after_the_first_was_removed(installed_copy):
    """Without a warning: it registers nothing again."""
    code = (
        "import sys, warnings, torch, oe_ext\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'oe_ext']:\n"
        "    del sys.modules[name]\n"
        "warnings.simplefilter('error')\n"
        "import oe_ext\n"
        "loss = lambda x: oe_ext.outlier_exposure_loss(x, torch.tensor([0, -1]))\n"
        "print(torch.vmap(loss)(torch.zeros(3, 2, 4))[2].item())\n"
    )
    done = python(code, installed_copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1.0397")


def test_jit_without_sources_says_so(installed_copy):
    done = python("import oe_ext", installed_copy, OE_EXT_JIT="1")
    assert done.returncode == 1
    assert "OE_EXT_JIT=1" in done.stderr
    assert "holds no csrc/ folder" in done.stderr


def test_a_switch_in_other_words(installed_copy, monkeypatch):
    done = python("import oe_ext", installed_copy, OE_EXT_JIT="true")
    assert "OE_EXT_JIT=1, and it cannot be built here" in done.stderr
    for value, meaning in ("ON", True), ("yes", True), ("No", False), ("off", False), ("", None):
        monkeypatch.setenv("OE_EXT_JIT", value)
        assert _build.switch("OE_EXT_JIT") is meaning
    done = python("import oe_ext", installed_copy, OE_EXT_JIT="no")
    assert done.returncode == 0, done.stderr


def test_a_switch_that_is_neither_on_nor_off(installed_copy):
    done = python("import oe_ext", installed_copy, OE_EXT_JIT="maybe")
    assert "\nImportError: the environment variable OE_EXT_JIT must be 1 or 0, got" in done.stderr


def test_what_bundles_programs_finds_the_library():
    """PyInstaller and its like read the code for imports, as the standard library's finder does."""
    finder = modulefinder.ModuleFinder(path=[str(PACKAGE.parent), *sys.path], excludes=["torch"])
    finder.import_hook("oe_ext._ext")
    assert "oe_ext._C" in finder.modules


def test_operators_that_exist_are_not_registered_again(installed_copy):
    """A second registration would abort the process."""
    code = (
        "import sys, torch, pathlib\n"
        "torch.ops.load_library(str(next(pathlib.Path('oe_ext').glob('_C*.so'))))\n"
        "import oe_ext\n"
        "print(oe_ext._ext.origin)\n"
        "print(oe_ext.outlier_exposure_loss(torch.zeros(2, 4), torch.tensor([0, -1])).item())\n"
    )
    done = python(code, installed_copy)
    assert done.returncode == 0, done.stderr
    assert "registered by another library" in done.stdout
    assert done.stdout.splitlines()[1].startswith("1.0397")


def test_loading_again_does_nothing():
    module = _ext.module
    _ext.load()
    assert _ext.module is module


def report(cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "oe_ext.collect_env"],
        cwd=cwd,
        env=programs.environment(cwd, **environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_collect_env():
    printed = report(PACKAGE.parent)
    for part in (oe_ext.__version__, torch.__version__, "library", "kernels", "CPU capability"):
        assert part in printed


@pytest.fixture
def checkout_without_library(tmp_path):
    """Enough of one for a JIT build to begin."""
    shutil.copytree(PACKAGE, tmp_path / "oe_ext", ignore=shutil.ignore_patterns("_C*.so"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "bindings.cpp").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"OE_EXT_JIT": "1", "OE_EXT_CUDA": "maybe"}, "OE_EXT_CUDA must be 1 or 0, got 'maybe'"),
        ({"OE_EXT_JIT": "1", "FORCE_CUDA": "1", "CUDA_HOME": "/nowhere"}, "FORCE_CUDA=1 asks"),
        ({"OE_EXT_JIT": "maybe"}, "OE_EXT_JIT must be 1 or 0, got 'maybe'"),
    ],
)
def test_what_cannot_be_built_is_an_import_error(checkout_without_library, environment, why):
    """collect_env tells of it."""
    printed = report(checkout_without_library, **environment)
    assert f"{oe_ext.__version__}, which cannot be imported: " in printed
    assert why in printed
    assert torch.__version__ in printed
    done = python("import oe_ext", checkout_without_library, **environment)
    assert done.returncode == 1
    assert why in done.stderr[done.stderr.rindex("\nImportError: ") :]


COMPILE = """
import torch
from torch._dynamo.utils import counters
from oe_ext import outlier_exposure_loss
logits = torch.randn(4, 5, requires_grad=True)
torch.compile(outlier_exposure_loss)(logits, torch.tensor([0, -1, 2, 3])).backward()
found = {name for name, number in counters["inductor"].items() if number and "cache" in name}
print("hit" if "fxgraph_cache_hit" in found else "miss")
"""


@pytest.mark.packaging
def test_code_that_was_compiled_for_another_library_is_not_used(installed_copy):
    """torch.compile's cache outlives a process. Without our key it would not notice changed
    operators, and a gradient would be wrong without an error."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(installed_copy / "cache")}

    def compile_loss() -> str:
        done = python(COMPILE, installed_copy, **cache)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [compile_loss(), compile_loss()] == ["miss", "hit"]
    (library,) = (installed_copy / "oe_ext").glob("_C*.so")
    with library.open("ab") as file:
        file.write(b"\0")  # after the end, which is not loaded
    assert [compile_loss(), compile_loss()] == ["miss", "hit"]

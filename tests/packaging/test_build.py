"""Which kernels a build contains, by torch, toolkit and environment, and the error for a user
without the CUDA kernels."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from paths import ROOT

from oe_ext import _build, _ext


def test_no_two_sources_share_a_stem():
    """torch's JIT names an object after its source's stem, so equal stems would collide."""
    sources = [path for path in (ROOT / "csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    assert len(sources) > 10
    stems = [path.stem for path in sources]
    assert sorted(set(stems)) == sorted(stems)


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Creates a folder that looks like a CUDA toolkit of a version; sets CUDA_HOME to it."""

    def make(version: int) -> Path:
        include = tmp_path / "cuda" / "include"
        include.mkdir(parents=True)
        (include / "cuda_runtime.h").touch()
        (include.parent / "bin").mkdir()
        (include.parent / "bin" / "nvcc").touch()
        (include / "cuda.h").write_text(f"#ifndef A\n#define CUDA_VERSION {version}\n#endif\n")
        monkeypatch.setenv("CUDA_HOME", str(include.parent))
        return include.parent

    for name in ("OE_EXT_CUDA", "FORCE_CUDA", "CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return make


@pytest.fixture
def torch_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize("version", [13000, 13020])
@pytest.mark.usefixtures("torch_with_cuda")
def test_a_toolkit_of_the_same_major_version(toolkit, version):
    toolkit(version)
    assert _build.wants_cuda()


@pytest.mark.usefixtures("torch_with_cuda")
def test_a_toolkit_of_another_major_version(toolkit, monkeypatch):
    """Only the CPU kernels are built, with a warning; requesting CUDA is an error."""
    home = toolkit(12040)
    both = rf"CUDA 13\.0, the toolkit in {home} is 12\.4\. Set CUDA_HOME to a toolkit of CUDA 13\.0"
    with pytest.warns(UserWarning, match=f"no CUDA kernels are built: .*{both}"):
        assert not _build.wants_cuda()
    for name in ("FORCE_CUDA", "OE_EXT_CUDA"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            with pytest.raises(RuntimeError, match=f"{name}=1 asks for CUDA kernels, but .*{both}"):
                _build.wants_cuda()
    monkeypatch.setenv("OE_EXT_CUDA", "0")
    assert not _build.wants_cuda()


@pytest.mark.usefixtures("torch_with_cuda")
def test_no_toolkit(toolkit, tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "find_cuda_home", lambda: None)
    assert not _build.wants_cuda()
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"no CUDA toolkit was found\. Set CUDA_HOME"):
        _build.wants_cuda()


@pytest.mark.parametrize("lacks", ["everything", "nvcc"])
@pytest.mark.usefixtures("torch_with_cuda")
def test_a_cuda_home_that_is_no_toolkit(toolkit, monkeypatch, lacks):
    """Without a request for CUDA kernels the others are built, with a warning."""
    home = toolkit(13000)
    (home / "bin" / "nvcc").unlink()
    if lacks == "everything":
        home = home / "nowhere"
        monkeypatch.setenv("CUDA_HOME", str(home))
    message = (
        rf"CUDA_HOME={home} holds no bin/nvcc\. Set CUDA_HOME to the folder that holds bin/nvcc"
    )
    with pytest.warns(UserWarning, match=f"no CUDA kernels are built: {message}"):
        assert not _build.wants_cuda()
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match=f"FORCE_CUDA=1 asks for CUDA kernels, but {message}"):
        _build.wants_cuda()


def test_torch_without_cuda(toolkit, monkeypatch):
    toolkit(13000)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not _build.wants_cuda()
    monkeypatch.setenv("OE_EXT_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"is a build without CUDA\. Install a CUDA build of"):
        _build.wants_cuda()


def test_a_switch_that_is_neither_on_nor_off(toolkit, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "perhaps")
    with pytest.raises(ValueError, match="FORCE_CUDA must be 1 or 0, got 'perhaps'"):
        _build.wants_cuda()


CALL_ON_CUDA = """
import torch
torch.version.cuda = "13.0"
import oe_ext
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
logits, target = torch.zeros(2, 4), torch.tensor([0, -1])
torch.ops.oe_ext._outlier_exposure_loss_forward.default.redispatch(
    cuda, logits, target, 0.5, None, "mean", None, None, False
)
"""


@pytest.mark.skipif(_ext.has_cuda_kernels(), reason="built with CUDA kernels")
def test_a_call_on_cuda_without_the_kernels():
    """Pretends that torch is a CUDA build, and calls the kernel through the dispatcher."""
    done = subprocess.run(
        [sys.executable, "-c", CALL_ON_CUDA], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    error = done.stderr[done.stderr.rindex("\nRuntimeError: ") :]
    for part in ("without CUDA kernels", "CUDA 13.0", "FORCE_CUDA=1 pip install"):
        assert part in error


def setup_py(tmp_path: Path, before: str = "", **environment: str) -> str:
    """The error of ``setup.py build_ext`` in its own process, after other statements."""
    code = (
        f"import runpy, sys, torch; {before}\n"
        f"sys.argv = ['setup.py', '-q', 'build_ext', '--build-temp', {str(tmp_path)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == 1, done.stdout
    return done.stderr[done.stderr.rindex("\nRuntimeError: ") :]


def test_a_torch_that_is_too_old(tmp_path):
    """The installed torch pretends to be 2.10.1."""
    error = setup_py(tmp_path, "torch.__version__ = '2.10.1'")
    assert "needs torch >= 2.11 to build, found 2.10.1: pip install 'torch>=2.11'" in error


def test_a_setuptools_that_is_too_old():
    """It cannot read pyproject.toml, and its own error would be about "project.license"."""
    code = (
        "import runpy, setuptools\n"
        "setuptools.__version__ = '65.5.0'\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert done.stderr == (
        "oe_ext needs setuptools >= 77 to build, found 65.5.0: pip install 'setuptools>=77'\n"
    )


def compile_with(*flags: str, source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles and links a source to ``library.so``, as a build does: its own flags come last."""
    file = folder / "source.cpp"
    file.write_text(source)
    torch_headers = ["-isystem", str(Path(torch.__file__).parent / "include"), f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CXX", "g++")
    commands = (
        [compiler, *flags, *_build.CXX_FLAGS, *torch_headers, "-fPIC", "-c", "source.cpp"],
        [compiler, "-shared", *flags, "source.o", "-o", "library.so", *_build.LINK_FLAGS],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode != 0:
            break
    return done


FAST = ["-ffast-math", "-Ofast", "-ffinite-math-only", "-fassociative-math"]


@pytest.mark.parametrize("flag", [*FAST, "-funsafe-math-optimizations"])
def test_flags_that_change_what_arithmetic_means(tmp_path, flag):
    """They are without effect, also on the process that loads the library."""
    source = (
        '#include "core/row_math.h"\n'
        '#define SEEN extern "C" __attribute__((visibility("default")))\n'
        "SEEN bool is_nan(float x) { return x != x; }\n"
        "SEEN float in_order(float a, float b) { return (a + b) - a; }\n"
    )
    done = compile_with(flag, source=source, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(tmp_path / "library.so"))
    library.is_nan.argtypes, library.is_nan.restype = [ctypes.c_float], ctypes.c_bool
    library.in_order.argtypes, library.in_order.restype = [ctypes.c_float] * 2, ctypes.c_float
    assert library.is_nan(float("nan"))
    assert library.in_order(1e8, 1.0) == 0.0
    subnormal = torch.full((16,), 2.0**-130)
    assert torch.equal(subnormal * 1.0, subnormal)
    assert subnormal[0] > 0


@pytest.mark.parametrize("flag", ["-ffast-math", "-ffinite-math-only"])
def test_the_maths_refuses_such_flags(tmp_path, flag, monkeypatch):
    """Where a build puts them last."""
    monkeypatch.setattr(_build, "CXX_FLAGS", [*_build.CXX_FLAGS, flag])
    done = compile_with(source='#include "core/row_math.h"\n', folder=tmp_path)
    assert done.returncode != 0
    assert "compile it with -fno-fast-math" in done.stderr


def test_link_time_optimisation_keeps_the_name_of_the_torch(tmp_path):
    source = (
        "#define OE_EXT_TORCH_VERSION 2.99.1+cpu\n"
        '#include "build_info.h"\n'
        "const char* torch_version() { return oe_ext::kBuiltWithTorch; }\n"
    )
    done = compile_with("-flto", source=source, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert _ext.built_with_torch(tmp_path / "library.so") == "2.99.1+cpu"


@pytest.fixture
def small_tree(tmp_path) -> Path:
    """What setup.py needs, with one small source."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "oe_ext", tree / "oe_ext", ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "csrc").mkdir()
    shutil.copy(Path(__file__).with_name("small.cpp"), tree / "csrc" / "bindings.cpp")
    (tree / "csrc" / "value.h").write_text("constexpr long kValue = 1;\n")
    return tree


def run_setup(tree: Path, *arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tree,
        env=os.environ | {"OE_EXT_CUDA": "0"} | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def value_of(tree: Path) -> int:
    """That of value.h, when the library in ``build`` was compiled."""
    (library,) = (tree / "build").glob("lib*/oe_ext/_C*.so")
    # dlopen takes two files for one if their names are equal.
    copy = Path(tempfile.mkdtemp(dir=tree)) / "copy.so"
    shutil.copy(library, copy)
    value: int = _ext.load_file("oe_ext._C", copy).value()
    return value


def test_not_times_decide_what_is_compiled(small_tree, tmp_path):
    run_setup(small_tree, "build")
    assert value_of(small_tree) == 1
    # With ninja: a header that is older than its object.
    (small_tree / "csrc" / "value.h").write_text("constexpr long kValue = 2;\n")
    os.utime(small_tree / "csrc" / "value.h", (1e9, 1e9))
    run_setup(small_tree, "build")
    assert value_of(small_tree) == 2
    # Without: a library that is newer than all sources, of another torch.
    (library,) = (small_tree / "build").glob("lib*/oe_ext/_C*.so")
    library.write_bytes(b"of another torch")
    no_ninja = "import torch.utils.cpp_extension as c; c.is_ninja_available = lambda: False"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(no_ninja)
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    run_setup(small_tree, "build_ext", PYTHONPATH=path)
    assert value_of(small_tree) == 2


def test_a_module_that_was_removed_is_not_in_the_next_wheel(small_tree):
    (small_tree / "oe_ext" / "gone.py").touch()
    run_setup(small_tree, "build")
    assert list((small_tree / "build").glob("lib*/oe_ext/gone.py"))
    (small_tree / "oe_ext" / "gone.py").unlink()
    run_setup(small_tree, "build")
    assert not list((small_tree / "build").glob("lib*/oe_ext/gone.py"))
    assert value_of(small_tree) == 1


def test_make_build_takes_no_library_of_another_torch(tmp_path):
    """Whoever has put it there."""
    for name in ("pyproject.toml", "setup.py", "oe_ext/_build.py", "csrc/bindings.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in ("v/installed-torch-2.13.0", "build/built-for-v-torch-2.13.0"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()

    def make_build() -> str:
        command = ["make", "-n", "-f", ROOT / "Makefile", "build", "VENV=v", "TORCH=2.13.0"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    library = tmp_path / "oe_ext" / "_C.cpython-311-x86_64-linux-gnu.so"
    library.write_bytes(b"\0oe_ext-built-with-torch=2.13.0+cpu\0")
    assert "Nothing to be done" in make_build()
    library.write_bytes(b"\0oe_ext-built-with-torch=2.14.1+cu130\0")
    assert "setup.py -q build_ext --inplace" in make_build()
    library.unlink()
    assert "setup.py -q build_ext --inplace" in make_build()


@pytest.mark.parametrize("command", ["bdist_wheel", "build_ext", "install", "editable_wheel"])
def test_no_torch_no_wheel(tmp_path, command):
    """Where pip would keep a wheel without a library in its cache."""
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        f"sys.argv = ['setup.py', '-q', {command!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    ignored = shutil.ignore_patterns("*.so", "build", "dist", ".*", "tests", "bench")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / "tree",
    )
    assert done.returncode == 1, done.stdout
    assert "this build sees none: first pip install 'torch>=2.11' 'setuptools" in done.stderr
    assert not list(tmp_path.rglob("*.whl"))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": ""}, "c++ is not on PATH"),
        ({"CXX": "no-such-compiler"}, "CXX='no-such-compiler' is not a program (torch takes"),
        ({"CXX": "g++ -pipe"}, "CXX='g++ -pipe' is not a program (torch takes"),
        ({"CXX": ""}, "CXX='' is not a program (torch takes"),
    ],
)
def test_no_compiler(tmp_path, environment, message):
    error = setup_py(tmp_path, **environment)
    assert f"needs a C++20 compiler, but {message}" in error
    assert "Install g++ >= 11" in error

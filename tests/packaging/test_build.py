"""Which kernels a build contains, by torch, toolkit and environment, and the error for a user
without the CUDA kernels."""

import os
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": ""}, "neither g++ nor c++ is on PATH"),
        ({"CXX": "no-such-compiler -O2"}, "CXX=no-such-compiler is not a program"),
    ],
)
def test_no_compiler(tmp_path, environment, message):
    error = setup_py(tmp_path, **environment)
    assert f"needs a C++20 compiler, but {message}. Install g++ >= 11" in error

"""The three ways in, each in a fresh place: pip with and without isolation, and JIT.

Slow (each builds the library), so they run with ``make test-packaging`` and in CI.
"""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parent.parent
TORCH = torch.__version__.partition("+")[0]
BUILD_REQUIREMENTS = ["setuptools>=77", "ninja", "pybind11>=2.13", "wheel"]
CHECK = (
    "import torch, oe_ext\n"
    "x = torch.zeros(2, 4, requires_grad=True)\n"
    "loss = oe_ext.OutlierExposureLoss()(x, torch.tensor([0, -1]))\n"
    "loss.backward()\n"
    "print('loss', loss.item(), 'from', oe_ext._ext.origin)\n"
)


def run(*command, cwd: Path, **environment: str) -> str:
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OE_EXT_", "PYTHONPATH", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env | environment,
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def new_environment(folder: Path, *packages: str) -> Path:
    """A virtual environment with these packages; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if packages:
        run(python, "-m", "pip", "install", "-q", *packages, cwd=folder)
    return python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The tracked files alone, without what earlier builds left, under a name with a space."""
    folder = tmp_path_factory.mktemp("a checkout") / "oe ext"
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """torch and what a build needs, for --no-build-isolation."""
    return new_environment(
        tmp_path_factory.mktemp("venv") / "v", f"torch=={TORCH}", "numpy", *BUILD_REQUIREMENTS
    )


def check_import(python: Path, cwd: Path, origin: str, **variables: str) -> None:
    output = run(python, "-c", CHECK, cwd=cwd, **variables)
    assert "loss 1.039720" in output
    assert origin in output


def test_wheel_and_sdist(checkout, environment, tmp_path):
    """Both are built, hold what they should, and the wheel works where there is no checkout."""
    build = "from setuptools import build_meta as b; print(b.build_{}('{}'))"
    run(environment, "-c", build.format("sdist", tmp_path), cwd=checkout)
    sdist = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", "csrc", "oe_ext", "tests", "examples", cwd=ROOT).split()
    assert set(tracked) <= names, "the sdist holds all that is needed to build and test it"
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"} <= names

    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    run(environment, "-c", build.format("wheel", tmp_path), cwd=source)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert any(name.startswith("oe_ext/_C.") and name.endswith(".so") for name in names)
    assert {"oe_ext/py.typed", "oe_ext/_C.pyi"} <= set(names)
    assert not any(name.startswith(("tests", "csrc", "examples")) for name in names)
    major_minor = ".".join(TORCH.split(".")[:2])
    assert f"Requires-Dist: torch=={major_minor}.*" in metadata

    run(environment, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    check_import(environment, tmp_path, "site-packages")
    run(environment, "-m", "pip", "uninstall", "-q", "-y", "oe_ext", cwd=tmp_path)


def test_no_build_isolation_editable(checkout, environment, tmp_path):
    install = ("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps")
    run(environment, *install, "-e", checkout, cwd=tmp_path)
    check_import(environment, tmp_path, str(checkout))
    run(environment, "-m", "pip", "uninstall", "-q", "-y", "oe_ext", cwd=tmp_path)


def test_isolation_takes_the_torch_of_the_environment(checkout, tmp_path):
    python = new_environment(tmp_path / "v", f"torch=={TORCH}", "numpy")
    run(python, "-m", "pip", "install", "-q", checkout, cwd=tmp_path)
    check_import(python, tmp_path, "site-packages")
    version = run(python, "-c", "import torch; print(torch.__version__)", cwd=tmp_path)
    assert version.strip().startswith(TORCH), "the build has not replaced torch"


def test_isolation_without_torch_brings_one(checkout, tmp_path):
    """A constraint stands in for the newest release, which is several GB."""
    python = new_environment(tmp_path / "v")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"torch=={TORCH}\n")
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        checkout,
        "numpy",
        cwd=tmp_path,
        PIP_CONSTRAINT=str(constraints),
        PIP_BUILD_CONSTRAINT=str(constraints),
    )
    check_import(python, tmp_path, "site-packages")


def test_jit(checkout, tmp_path):
    """An editable checkout without a library builds itself on import, and finds it the next time,
    though a killed build has left torch's lock behind."""
    extensions = tmp_path / "torch extensions"
    variables = {
        "PYTHONPATH": str(checkout),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "OE_EXT_JIT": "1",
    }
    check_import(sys.executable, tmp_path, "JIT build", **variables)
    (folder,) = extensions.glob("oe_ext_jit_*")
    (folder / "lock").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.o")}
    check_import(sys.executable, tmp_path, "JIT build", **variables)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.o")}
    assert before
    assert after == before, "nothing is compiled twice"

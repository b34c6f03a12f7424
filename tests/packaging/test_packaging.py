"""What is released, and the three ways to install and load it, each in a fresh place: pip with and
without isolation, and JIT.

These tests are slow, since each builds the library; ``make test-packaging`` and CI run them.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import programs
import psutil
import pytest
import torch
from paths import ROOT

import oe_ext

pytestmark = pytest.mark.packaging

TORCH = torch.__version__.partition("+")[0]
MAJOR_MINOR = ".".join(TORCH.split(".")[:2])
BUILD_REQUIREMENTS = ["setuptools>=77", "ninja", "pybind11>=2.13", "wheel"]
# Values against float64, with -inf and NaN among the logits, and what an import may not change.
CHECK = """
import torch, oe_ext
from oe_ext import reference
logits = 3 * torch.randn(64, 19, generator=torch.Generator().manual_seed(0))
target = torch.arange(64) % 20 - 1
logits[3, 7], logits[10, 2], logits[11] = -torch.inf, torch.nan, torch.nan
found = []
for module, x in (oe_ext, logits), (reference, logits.double()):
    x = x.clone().requires_grad_()
    rows = module.outlier_exposure_loss(x, target, reduction="none")
    rows.nansum().backward()
    found += [rows.detach().double(), x.grad.double()]
torch.testing.assert_close(found[:2], found[2:], rtol=2e-6, atol=2e-6, equal_nan=True)
assert torch.full((64,), 2.0**-130).mul(1.0).min() > 0, "subnormal numbers are flushed"
loss = oe_ext.OutlierExposureLoss()(torch.zeros(2, 4), torch.tensor([0, -1]))
print("loss", loss.item(), "from", oe_ext._ext.origin)
"""


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
    """The tracked files only, without leftovers of earlier builds, under a name with a space and
    non-ASCII letters."""
    folder = tmp_path_factory.mktemp("a checkout") / "öe ext 外れ値"
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """torch and the build requirements, for --no-build-isolation."""
    return new_environment(
        tmp_path_factory.mktemp("venv") / "v", f"torch=={TORCH}", "numpy", *BUILD_REQUIREMENTS
    )


@pytest.fixture(scope="module")
def quickly(tmp_path_factory) -> dict[str, str]:
    """The variables that name a compiler which optimises nothing, for half the time."""
    compiler = tmp_path_factory.mktemp("bin") / "quick-c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    return {"CXX": str(compiler)}


def check_import(python: Path, cwd: Path, origin: str, **variables: str) -> None:
    output = run(python, "-c", CHECK, cwd=cwd, **variables)
    assert "loss 1.039720" in output
    assert origin in output


def made_by_make_dist(pattern: str) -> Path:
    (path,) = (ROOT / "dist").glob(pattern)
    return path


def test_sdist():
    """The sdist holds all tracked files, so the project can be built and tested from it."""
    sdist = made_by_make_dist("*.tar.gz")
    assert sdist.name == f"oe_ext-{oe_ext.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    tracked = set(run("git", "ls-files", "-z", cwd=ROOT).split("\0")) - {""}
    generated = {name for name in names if name.startswith("oe_ext.egg-info/")}
    assert names - generated - {"PKG-INFO", "setup.cfg"} == tracked - {".gitignore", ".ci/run"}


def test_wheel():
    """The wheel holds only the package and its library, and requires its torch version."""
    wheel = made_by_make_dist("*.whl")
    assert wheel.name.startswith(f"oe_ext-{oe_ext.__version__}-cp")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert len([name for name in names if name.endswith(".so")]) == 1
    package = {name for name in names if not name.endswith(".so") and ".dist-info/" not in name}
    assert package == set(run("git", "ls-files", "oe_ext", cwd=ROOT).split())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert f"Requires-Dist: torch=={MAJOR_MINOR}.*" in metadata


def test_cibuildwheel_knows_what_to_build():
    """Builds no wheel: that needs containers."""
    command = (sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--archs", "x86_64")
    output = run(*command, "--print-build-identifiers", ROOT, cwd=ROOT)
    expected = [f"cp3{minor}-manylinux_x86_64" for minor in range(10, 15)]
    assert output.split() == expected


def test_the_recipe_for_conda_renders():
    """Builds no package: that needs conda-forge's channel."""
    from rattler_build import PlatformConfig, RenderConfig, Stage0Recipe, VariantConfig

    variants = VariantConfig(
        {"python": ["3.10", "3.14"], "cxx_compiler": ["gxx"], "c_stdlib": ["sysroot"]}
    )
    platform = PlatformConfig(target_platform="linux-64", experimental=True)
    recipe = Stage0Recipe.from_file(str(ROOT / "conda" / "recipe.yaml"))
    rendered = [variant.recipe for variant in recipe.render(variants, RenderConfig(platform))]
    assert len(rendered) == 2
    for one in rendered:
        assert one.package.version == oe_ext.__version__
        requirements = one.to_dict()["requirements"]
        assert "gxx_linux-64" in requirements["build"]
        assert any(str(part).startswith("pytorch") for part in requirements["host"])
        assert (ROOT / "conda" / one.to_dict()["source"][0]["path"] / "setup.py").is_file()


def test_wheel_and_editable(checkout, environment, tmp_path):
    """Each install replaces the other in either order, and uninstalls without leftovers."""
    pip = (environment, "-m", "pip")
    wheel = ("install", "-q", "--no-deps", made_by_make_dist("*.whl"))
    editable = ("install", "-q", "--no-build-isolation", "--no-deps", "-e", checkout)
    run(*pip, *wheel, cwd=tmp_path)
    check_import(environment, tmp_path, "site-packages")
    # Flags of the user's that would change values: without effect.
    fast = {"CFLAGS": "-ffast-math", "CXXFLAGS": "-Ofast", "LDFLAGS": "-ffast-math"}
    run(*pip, *editable, cwd=tmp_path, **fast)
    check_import(environment, tmp_path, str(checkout))
    run(*pip, *wheel, "--force-reinstall", cwd=tmp_path)
    check_import(environment, tmp_path, "site-packages")
    # The checkout has its own library, from the editable install.
    check_import(environment, checkout, str(checkout))
    listed = json.loads(run(*pip, "list", "--format=json", cwd=tmp_path))
    assert [entry for entry in listed if "editable_project_location" in entry] == []
    run(*pip, "uninstall", "-y", "oe_ext", cwd=tmp_path)
    look = "import importlib.util; print(importlib.util.find_spec('oe_ext'))"
    assert run(environment, "-c", look, cwd=tmp_path).strip() == "None"


def test_isolation_takes_the_torch_of_the_environment(checkout, quickly, tmp_path):
    python = new_environment(tmp_path / "v", f"torch=={TORCH}", "numpy")
    for library in (checkout / "oe_ext").glob("_C*.so"):  # of an editable install
        library.unlink()
    run(python, "-m", "pip", "install", "-q", checkout, cwd=tmp_path, **quickly)
    check_import(python, tmp_path, "site-packages")
    # In the folder of sources, too, which has no library of its own.
    check_import(python, checkout, "site-packages")
    version = run(python, "-c", "import torch; print(torch.__version__)", cwd=tmp_path)
    assert version.strip().startswith(TORCH), "the build has not replaced torch"


def test_isolation_without_torch_brings_one(checkout, quickly, tmp_path):
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
        **quickly,
    )
    check_import(python, tmp_path, "site-packages")


@pytest.mark.parametrize("place", ["a .pth file", "PYTHONPATH", "the user's packages"])
def test_isolation_finds_torch_wherever_python_does(checkout, tmp_path, place):
    """The wheel names the torch that it is made for. Without its library, which takes minutes."""
    of_the_user = place == "the user's packages"
    python = tmp_path / "v" / "bin" / "python"
    venv.create(tmp_path / "v", with_pip=True, system_site_packages=of_the_user)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==0\n")  # none is fetched
    variables = {name: str(constraints) for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    variables |= {"PYTHONUSERBASE": str(tmp_path / "user"), "OE_EXT_DEFER_BUILD": "1"}
    packages = str(Path(torch.__file__).parent.parent)
    if place == "PYTHONPATH":
        variables["PYTHONPATH"] = packages
    else:
        where = "site.getusersitepackages()" if of_the_user else "site.getsitepackages()[0]"
        folder = Path(
            run(python, "-c", f"import site; print({where})", cwd=tmp_path, **variables)[:-1]
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "torch.pth").write_text(packages)
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", checkout, cwd=tmp_path, **variables)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        assert f"Requires-Dist: torch=={MAJOR_MINOR}.*" in archive.read(metadata).decode()


def test_an_isolated_build_that_hides_torch_says_so(checkout, environment, tmp_path):
    """uv makes an environment for the build: it could only be for another torch."""
    pip = (environment, "-m", "pip")
    run(*pip, "download", "-q", *BUILD_REQUIREMENTS, "-d", "wheels", cwd=tmp_path)
    run(*pip, "install", "-q", "uv", cwd=tmp_path)
    install = [environment.with_name("uv"), "pip", "install", "--python", environment]
    done = subprocess.run(
        [*install, "--no-index", "--find-links", "wheels", "--no-deps", checkout],
        cwd=tmp_path,
        env=os.environ | {"UV_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    error = " ".join(done.stderr.split())  # uv breaks lines
    assert "this build sees none: first pip install 'torch>=2.11'" in error
    assert "then oe_ext with --no-build-isolation" in error


def start_jit(checkout: Path, cache: Path, variables: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHECK],
        cwd=checkout.parent,
        env=programs.jit_environment(checkout, cache, **variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_while_compiling(process: subprocess.Popen, cache: Path) -> None:
    """Kills a process with its children, like a machine that is switched off."""
    deadline = time.monotonic() + 120
    while not (any(cache.glob("*/*.o")) and any(cache.glob("*/lock"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing was compiled"
        time.sleep(0.1)
    python = psutil.Process(process.pid)
    for member in [python, *python.children(recursive=True)]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.communicate()


def test_jit(checkout, quickly, tmp_path):
    """A checkout without a library builds itself on import. A killed build leaves torch's lock
    behind, but blocks nobody. Two processes at once share one build, and the next one finds it."""
    cache = tmp_path / "torch extensions 外れ値"
    killed = start_jit(checkout, cache, quickly)
    kill_while_compiling(killed, cache)
    (folder,) = cache.glob("oe_ext_jit_*")
    assert (folder / "lock").exists()
    assert not list(folder.glob("*.so"))

    both = [start_jit(checkout, cache, quickly), start_jit(checkout, cache, quickly)]
    for process in both:
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
        assert "loss 1.039720" in output
        assert "JIT build" in output
    outputs = [line.split("\t")[3] for line in ninja_log(folder) if line.count("\t") >= 4]
    assert outputs
    assert sorted(set(outputs)) == sorted(outputs), "compiled once"

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.o")}
    again = start_jit(checkout, cache, quickly)
    assert again.communicate(timeout=600)[0].count("loss 1.039720") == 1
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.o")} == before
    assert before


@pytest.mark.cuda_build
def test_jit_with_cuda(checkout, tmp_path):
    """Every operator gets its CUDA kernel, without a GPU."""
    code = CHECK + (
        "names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith('oe_ext::')]\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print('kernels', sum(has(name, 'CUDA') for name in names), 'of', len(names))\n"
        "print('cuda', oe_ext._ext.module.build_info())\n"
    )
    environment = programs.jit_environment(checkout, tmp_path / "cache", FORCE_CUDA="1")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout.parent,
        env=environment | {"TORCH_CUDA_ARCH_LIST": "8.0"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss 1.039720" in done.stdout
    assert re.search(r"kernels ([1-9]\d*) of \1$", done.stdout, re.MULTILINE), done.stdout
    assert "'cuda_arch_list': '8.0'" in done.stdout


def ninja_log(folder: Path) -> list[str]:
    return (folder / ".ninja_log").read_text().splitlines()

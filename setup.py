"""Builds ``oe_ext._C`` with the torch of the environment that it is installed into."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIN_SETUPTOOLS = 77  # reads the license of pyproject.toml; older ones fail there with a riddle

if int(setuptools.__version__.partition(".")[0]) < MIN_SETUPTOOLS:
    sys.exit(
        f"oe_ext needs setuptools >= {MIN_SETUPTOOLS} to build, found {setuptools.__version__}: "
        f"pip install 'setuptools>={MIN_SETUPTOOLS}'"
    )


def load_build_description():
    """``oe_ext/_build.py``, without importing the package, which needs the library first."""
    spec = importlib.util.spec_from_file_location("oe_ext_build", ROOT / "oe_ext" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def environment_path():
    """Where this interpreter finds packages if it is not started in an isolated build.

    pip hides them by variables, and its own process still shows which ones it was started with.
    """
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    variables = {name: value for name, value in os.environ.items() if name not in hiding}
    try:
        pip = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        pip = b""
    for name, _, value in (variable.partition(b"=") for variable in pip.split(b"\0")):
        if os.fsdecode(name) in hiding:
            variables[os.fsdecode(name)] = os.fsdecode(value)
    code = "import json, sys; print(json.dumps([path for path in sys.path if path]))"
    done = subprocess.run([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE)
    return json.loads(done.stdout) if done.returncode == 0 else []


def find_torch():
    """Makes the environment's torch importable under build isolation; False where there is none.

    pip's isolated build runs the environment's own interpreter with its packages hidden. Requiring
    torch in pyproject.toml instead would compile against whatever version is newest.
    """
    if importlib.util.find_spec("torch") is None:
        hidden = [path for path in environment_path() if path not in sys.path]
        sys.path += hidden
        # for the processes that ninja starts
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [os.environ.get("PYTHONPATH"), *hidden])
        )
        importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


class BuildPackage(build_py):
    """What an earlier build has left in its folder does not go into the next wheel."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "oe_ext", ignore_errors=True)
        super().run()


def torch_arguments(build):
    build.find_cuda_home()  # before cpp_extension looks for it
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    minimum = tuple(int(part) for part in build.MIN_TORCH.split("."))
    if version < minimum:
        raise RuntimeError(
            f"oe_ext needs torch >= {build.MIN_TORCH} to build, found {torch.__version__}: "
            f"pip install 'torch>={build.MIN_TORCH}'"
        )

    class BuildOperators(BuildExtension):
        def run(self):
            build.require_compiler()
            build.forget_stale_objects(Path(self.build_temp), ROOT)
            self.force = True  # the library may be newer than its sources, and of another torch
            super().run()

    what = build.describe_build(ROOT)
    extension = (CUDAExtension if what.cuda else CppExtension)(
        "oe_ext._C",
        what.sources,
        extra_compile_args={"cxx": what.cxx_flags, "nvcc": what.nvcc_flags},
        extra_link_args=build.link_flags(ROOT),
        libraries=what.libraries,
    )
    # The Makefile compiles in place, where later edits need only what has changed: an editable
    # install would first compile everything in a temporary folder.
    deferred = os.environ.get("OE_EXT_DEFER_BUILD") == "1"
    return {
        "ext_modules": [] if deferred else [extension],
        "cmdclass": {"build_ext": BuildOperators, "build_py": BuildPackage},
        # Objects of one torch are never taken for those of another.
        "options": {"build_ext": {"build_temp": f"build/temp-torch-{torch.__version__}"}},
        # The C++ interface of torch changes with its minor version.
        "install_requires": [f"torch=={version[0]}.{version[1]}.*"],
    }


def arguments_without_torch(build):
    """Enough for pip to ask what the build needs, and for an sdist; no wheel without a library."""
    requirement = f"torch>={build.MIN_TORCH}"
    # uv and build isolate by an environment of their own, which has been made for this build.
    hides_environment = Path(setuptools.__file__).is_relative_to(sys.prefix)

    class BuildOperators(build_ext):
        def run(self):
            sys.exit(
                "oe_ext is compiled for the torch that is installed, and this build sees none: "
                f"first pip install '{requirement}' 'setuptools>={MIN_SETUPTOOLS}' ninja "
                "'pybind11>=2.13', then oe_ext with --no-build-isolation (the isolated builds of "
                "uv and of build hide the torch of the environment)."
            )

    return {
        "ext_modules": [setuptools.Extension("oe_ext._C", [])],
        "cmdclass": {"build_ext": BuildOperators},
        # pip goes on to install what it builds with, the same torch.
        "setup_requires": [] if hides_environment else [requirement],
        "install_requires": [requirement],
    }


build = load_build_description()
setuptools.setup(**(torch_arguments if find_torch() else arguments_without_torch)(build))

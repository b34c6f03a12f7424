"""Builds ``oe_ext._C`` with the torch of the environment that it is installed into."""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

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


def find_torch():
    """Makes the environment's torch importable under build isolation; False where there is none.

    pip's isolated build runs the environment's own interpreter with its site-packages hidden.
    Requiring torch in pyproject.toml instead would compile against whatever version is newest.
    """
    if importlib.util.find_spec("torch") is None:
        site = sysconfig.get_path("purelib")
        sys.path.append(site)
        # for the processes that ninja starts
        os.environ["PYTHONPATH"] = os.pathsep.join(
            path for path in (os.environ.get("PYTHONPATH"), site) if path
        )
        importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


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
            super().run()

    what = build.describe_build(ROOT)
    extension = (CUDAExtension if what.cuda else CppExtension)(
        "oe_ext._C",
        what.sources,
        extra_compile_args={"cxx": what.cxx_flags, "nvcc": what.nvcc_flags},
        extra_link_args=build.LINK_FLAGS,
        libraries=what.libraries,
        depends=[str(path) for path in sorted((ROOT / "csrc").rglob("*.*h"))],
    )
    # The Makefile compiles in place, where later edits need only what has changed: an editable
    # install would first compile everything in a temporary folder.
    deferred = os.environ.get("OE_EXT_DEFER_BUILD") == "1"
    return {
        "ext_modules": [] if deferred else [extension],
        "cmdclass": {"build_ext": BuildOperators},
        # Objects of one torch are never taken for those of another.
        "options": {"build_ext": {"build_temp": f"build/temp-torch-{torch.__version__}"}},
        # The C++ interface of torch changes with its minor version.
        "install_requires": [f"torch=={version[0]}.{version[1]}.*"],
    }


def arguments_without_torch(build):
    """Enough for pip to ask what the build needs, and for an sdist; no wheel without a library."""
    requirement = f"torch>={build.MIN_TORCH}"

    class BuildOperators(build_ext):
        def run(self):
            sys.exit(
                "oe_ext is compiled for the torch that is installed, and there is none: first "
                f"pip install '{requirement}', then oe_ext"
            )

    return {
        "ext_modules": [setuptools.Extension("oe_ext._C", [])],
        "cmdclass": {"build_ext": BuildOperators},
        "setup_requires": [requirement],
        "install_requires": [requirement],
    }


build = load_build_description()
setuptools.setup(**(torch_arguments if find_torch() else arguments_without_torch)(build))

"""What is written in two places, for those who read only one, says the same in both."""

import re

import pytest
from paths import ROOT

import oe_ext

PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == oe_ext.__version__
    assert len(set(versions)) == len(versions)


def test_the_version_is_written_nowhere_else():
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "conda/recipe.yaml"):
        assert oe_ext.__version__ not in (ROOT / name).read_text(), name


def test_the_pythons():
    classifiers = re.findall(r"Python :: (3\.\d+)\"", PYPROJECT)
    wheels = re.search(r"^build = \"(.*)\"", PYPROJECT, re.MULTILINE)[1].split()
    assert wheels == [f"cp{version.replace('.', '')}-*" for version in classifiers]
    assert f'requires-python = ">={classifiers[0]}"' in PYPROJECT
    pythons = re.search(r"^PYTHONS \?= (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert pythons.split() == [f"python{version}" for version in classifiers]


@pytest.mark.parametrize("package", ["torch", "setuptools", "ninja", "pybind11"])
def test_wheels_are_built_as_the_makefile_builds(package):
    makefile = (ROOT / "Makefile").read_text()
    torch = re.search(r"^TORCH +\?= (\S+)", makefile, re.MULTILINE)[1]
    requirement = re.compile(rf"\b{package}\b[=>0-9.]*")
    installed = re.search(r"pip install -q (torch==.*)", makefile)[1].replace("$(TORCH)", torch)
    before_build = re.search(r"^before-build = \"(.*)\"", PYPROJECT, re.MULTILINE)[1]
    assert requirement.search(before_build)[0] == requirement.search(installed)[0]

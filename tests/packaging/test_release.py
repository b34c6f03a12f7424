"""Facts that are written in two places agree."""

import re
from pathlib import Path
from typing import Any

import optional
import pytest
from paths import ROOT

import oe_ext

PYPROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def makefile(variable: str) -> list[str]:
    """The words in a variable of the Makefile."""
    return re.search(rf"^{variable} +\?= (.*)", MAKEFILE, re.MULTILINE)[1].split()


def read_yaml(path: Path) -> Any:
    return optional.module("yaml").safe_load(path.read_text())


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
    assert makefile("PYTHONS") == [f"python{version}" for version in classifiers]


@pytest.mark.parametrize("package", ["torch", "setuptools", "ninja", "pybind11"])
def test_wheels_are_built_as_the_makefile_builds(package):
    (torch,) = makefile("TORCH")
    requirement = re.compile(rf"\b{package}\b[=>0-9.]*")
    installed = re.search(r"pip install -q (torch==.*)", MAKEFILE)[1].replace("$(TORCH)", torch)
    before_build = re.search(r"^before-build = \"(.*)\"", PYPROJECT, re.MULTILINE)[1]
    assert requirement.search(before_build)[0] == requirement.search(installed)[0]


def test_github_tests_the_promised_pythons_and_torches():
    """Every Python with the default torch, and every torch with one of the Pythons."""
    matrix = read_yaml(ROOT / ".github/workflows/tests.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert [f"python{version}" for version in matrix["python"]] == makefile("PYTHONS")
    assert matrix["torch"] == makefile("TORCH")
    others = matrix["include"]
    assert {row["python"] for row in others} <= set(matrix["python"])
    assert sorted(matrix["torch"] + [row["torch"] for row in others]) == sorted(makefile("TORCHES"))


def test_there_are_workflows():
    assert {path.name for path in WORKFLOWS} >= {"tests.yml", "wheels.yml"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_make_targets_and_nothing_else(path):
    workflow = read_yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0
        steps = job["steps"]
        assert any("run" in step for step in steps)
        for step in steps:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
                continue
            target = re.fullmatch(r"make ([a-z-]+)( [A-Z]+=\S+)*", step["run"])
            assert target, step["run"]
            assert re.search(rf"^{target[1]}:", MAKEFILE, re.MULTILINE), target[1]


def test_pre_commit_has_the_versions_of_make_lint():
    """And takes nothing from elsewhere."""
    repositories = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    lint = re.findall(r"\"(.*?)\"", re.search(r"^lint = \[(.*)\]", PYPROJECT, re.MULTILINE)[1])
    assert len(lint) >= 4
    assert {one for hook in hooks for one in hook["additional_dependencies"]} == set(lint)
    for hook in hooks:
        (requirement,) = hook["additional_dependencies"]
        assert hook["entry"].split()[0] == requirement.partition("==")[0]

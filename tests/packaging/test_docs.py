"""The documentation, executed: its Python runs, and the things that its text names exist."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import optional
import pytest
import torch.utils.cpp_extension
from paths import ROOT

import oe_ext

Sybil = optional.module("sybil").Sybil
PythonCodeBlockParser = optional.module("sybil.parsers.markdown").PythonCodeBlockParser

TESTS = ROOT / "tests" / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "bench").glob("*.md")),
    TESTS,
]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def bash_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S))


def python_blocks(page: Path) -> list:
    return list(Sybil(parsers=[PythonCodeBlockParser()], path=str(page.parent)).parse(page))


def test_there_are_blocks_to_run():
    assert len(python_blocks(ROOT / "README.md")) >= 1
    for name in ("README.md", "CONTRIBUTING.md"):
        assert len(re.findall(r"\bmake [a-z]", bash_of(ROOT / name))) >= 2


@EACH_PAGE
def test_python_runs(page, tmp_path):
    """Runs the blocks in the order of the page, in two processes, which some blocks need."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(block.parsed for block in python_blocks(page)))
    if not script.read_text():
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@EACH_PAGE
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.M))
    assert "test" in targets
    text = bash_of(page) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", page.read_text()))
    assert set(re.findall(r"^make ([a-z][a-z0-9-]*)", text, re.M)) <= targets


def test_contributing_names_every_make_target():
    targets = set(re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", MAKEFILE, re.M)[1].split()) - {"\\"}
    assert {"test", "docs"} <= targets
    named = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", CONTRIBUTING))
    assert targets - named == set()


@EACH_PAGE
def test_files_exist(page):
    """The paths of links and pictures, and paths of this tree in text or commands."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    code = bash_of(page).split() + re.findall(r"`([^`\n]+)`", page.read_text())
    folders = "csrc|oe_ext|tests|bench|examples|docs|cmake|\\.github"
    for word in code:
        found = re.fullmatch(rf"((?:{folders})/[\w./-]*\w)(?:::\w+)?", word)
        if found and not (ROOT / found[1]).exists():
            missing.append(found[1])
    assert missing == []


def test_every_test_has_a_row():
    """tests/README.md links each file of tests and each helper."""
    links = {TESTS.parent / link for link in re.findall(r"\]\(([^)#]+)", TESTS.read_text())}
    patterns = ("*/test_*.py", "support/*.py", "cpp/*_test.cpp")
    files = {path for pattern in patterns for path in TESTS.parent.glob(pattern)}
    assert len(files) > 50
    assert sorted(files - links) == []


# Variables that other programs read; their effect is not ours.
FOREIGN_VARIABLES = {
    "TORCH_CUDA_ARCH_LIST": "torch.utils.cpp_extension",
    "ATEN_CPU_CAPABILITY": "libtorch_cpu.so",
}


def test_environment_variables_are_read():
    text = "\n".join(page.read_text() for page in PAGES)
    variables = set(re.findall(r"\b((?:OE_EXT|ATEN|TORCH|FORCE|HYPOTHESIS)_[A-Z_]+)(?==|`)", text))
    assert {"OE_EXT_JIT", "FORCE_CUDA", "ATEN_CPU_CAPABILITY"} <= variables
    paths = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "cmake", ROOT / "Makefile"]
    paths += [ROOT / "oe_ext", ROOT / "csrc"]
    sources = [path for root in paths for path in ([root] if root.is_file() else root.rglob("*"))]
    names = {".py", ".txt", ".cmake", ".in", ".h", ".cpp", ""}
    code = "\n".join(
        path.read_text() for path in sources if path.is_file() and path.suffix in names
    )
    for variable in variables - set(FOREIGN_VARIABLES):
        assert re.search(rf"\b{variable}\b", code), f"nothing reads {variable}"

    cpp_extension = Path(torch.utils.cpp_extension.__file__).read_text()
    assert "TORCH_CUDA_ARCH_LIST" in cpp_extension
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert b"ATEN_CPU_CAPABILITY" in library.read_bytes()


def shown_parameters(name: str, page: str) -> list[list[str]]:
    """Of every call of a name whose arguments are all ``name=default`` or a plain name, as in a
    signature: ``f(logits, target, alpha=0.5, *, ignore_index=None)``."""
    calls = re.findall(rf"^(?:[\w.]+ = )?(?:\w+\.)*{name}\((.*?\*,.*?)\)", page, re.M)
    return [re.split(r",\s*", call) for call in calls]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("OutlierExposureLoss", oe_ext.OutlierExposureLoss),
        ("outlier_exposure_loss", oe_ext.outlier_exposure_loss),
    ],
)
def test_signatures_are_the_codes(name, function):
    """A signature may omit the last parameters. The others must have the order, kinds and defaults
    of the code."""
    shown = shown_parameters(name, README)
    assert shown, f"the README shows no signature of {name}"
    actual = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in actual:
            actual.append("*")
        default = parameter.default
        suffix = "" if default is parameter.empty else f"={default!r}".replace("'", '"')
        actual.append(parameter.name + suffix)
    for parameters in shown:
        assert parameters == actual[: len(parameters)]


def test_the_reference_has_every_public_name():
    """Sphinx documents all exports of some modules, and those of the package by name."""
    modules = re.findall(r"^\.\. automodule:: (\S+)\n   :members:$", API, re.M)
    assert set(modules) == {"oe_ext.distributed", "oe_ext.reference"}
    shown = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", API, re.M)
    assert set(shown) == set(oe_ext.__all__) - {"__version__"}


def test_the_schemas_are_the_codes():
    operators = [
        torch.ops.oe_ext.outlier_exposure_loss,
        torch.ops.oe_ext.upsampled_outlier_exposure_loss,
    ]
    shown = [
        " ".join(text.split()) for text in re.findall(r"^(oe_ext::.*?-> Tensor)$", API, re.M | re.S)
    ]
    actual = [
        str(getattr(operator, name)._schema)
        for operator in operators
        for name in ("default", "tensor_alpha")
    ]
    assert [schema.replace('"', "'") for schema in shown] == [
        schema.replace('"', "'") for schema in actual
    ]

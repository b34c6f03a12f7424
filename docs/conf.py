"""Sphinx: the pages of this folder, and those of the root and of bench/ that they include."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # the checkout, whatever is installed

import oe_ext  # noqa: E402

project = "oe_ext"
author = copyright = "The oe_ext developers"
version = release = oe_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"oe_ext {release}"
templates_path = []
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the sections Args and Returns say more
napoleon_numpy_docstring = False
# Every reference must lead somewhere, except into torch, which is not documented here.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"torch\..*")]

# Files outside this folder, and the page here that includes each.
INCLUDED = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "bench" / "RESULTS.md": "benchmarks.md",
    ROOT / "bench" / "CUDA.md": "cuda.md",
    ROOT / "tests" / "README.md": "tests.md",
}
RELATIVE_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def links_from_here(text: str, page: Path) -> str:
    """The text of a page with its links written as this folder needs them. A link to a file that is
    no page, a source for example, becomes a download."""

    def rewrite(match: re.Match[str]) -> str:
        target = (page.parent / match[1]).resolve()
        return f"]({INCLUDED.get(target) or os.path.relpath(target, DOCS)}"

    return RELATIVE_LINK.sub(rewrite, text)


def on_source(app: Sphinx, docname: str, content: list[str]) -> None:
    content[0] = links_from_here(content[0], DOCS / f"{docname}.md")


def on_include(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    content[0] = links_from_here(content[0], (DOCS / path).resolve())


def setup(app: Sphinx) -> None:
    app.connect("source-read", on_source)
    app.connect("include-read", on_include)

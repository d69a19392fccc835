"""The site: `make docs` builds it strictly from the pages as they stand in the repository, readable offline.

The source folder is the repository's root, so that links between README, docs and research are the same in both.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

import localgrad

project = "localgrad"
copyright = "the localgrad maintainers"  # Sphinx's own name
release = version = localgrad.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "docs/**.md", "research/docs/**.md"]
exclude_patterns = [".*", "runs", "site", "src", "tests"]

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True  # attributes of dataclasses stand in their docstrings, and would be there twice

html_theme = "furo"
html_title = f"localgrad {release}"
html_show_sourcelink = False
html_copy_source = False

ENTRANCE = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">'
ELSEWHERE = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="(?:https?:)?//')


def setup(app: Sphinx) -> None:
    """Let the folder open at its first page, and see that every page can be read offline."""
    app.connect("build-finished", finish)


def finish(app: Sphinx, error: Exception | None) -> None:
    """Write the entrance; refuse pages that load something from elsewhere."""
    if error is not None or app.builder.name != "html":
        return
    folder = Path(app.outdir)
    (folder / "index.html").write_text(ENTRANCE, encoding="utf-8")
    for page in folder.rglob("*.html"):
        if ELSEWHERE.search(page.read_text(encoding="utf-8")):
            raise SphinxError(f"{page}: it loads something from elsewhere, so it can't be read offline.")

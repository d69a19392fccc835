"""The site: `make docs` builds it strictly from the pages as they stand in the repository, readable offline.

The source folder is the repository's root, so that links between README, docs and research are the same in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def setup(app: Any) -> None:
    """Let the folder open at its first page."""

    def write_entrance(app: Any, error: Exception | None) -> None:
        if error is None and app.builder.name == "html":
            text = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">'
            (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")

    app.connect("build-finished", write_entrance)

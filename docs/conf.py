"""Sphinx builds the site from the Markdown files as they are: `make docs`.

The sources stay plain Markdown, so that they read well without the site. What only the site has is
added here to their text: the navigation, the docstrings of the API, the keys of recipes.
"""

import re
from pathlib import Path
from typing import Any

from infir2 import __version__
from infir2.config.help import describe_keys
from infir2.config.schema import EvalRecipe, RlRecipe

NAVIGATION = {
    "Start": ["install", "first-cpu-run", "first-gpu-run", "data"],
    "Train": ["cpt", "sft", "rl", "report", "evaluation", "answers", "use-the-model", "serving"],
    "Plan and launch": ["hardware", "plan", "launch", "parallel", "from-slime-megatron"],
    "Reference": ["keys", "metrics", "formats", "engines", "troubleshooting", "glossary"],
    "Library": ["own-loop", "api"],
    "Background": ["recipe", "numerics", "DESIGN", "reliability", "results/index", "LOG"],
    "Project": ["/SECURITY", "/CONTRIBUTING", "/CHANGELOG"],
}

project = "InfiR2"
release = __version__
html_title = f"InfiR2 {release}"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"]
myst_heading_anchors = 4
default_role = "code"
autodoc_typehints = "none"
suppress_warnings = ["misc.highlighting_failure"]


def _toctrees() -> str:
    blocks = [
        "\n".join([f"```{{toctree}}\n:hidden:\n:caption: {caption}\n", *pages, "```"])
        for caption, pages in NAVIGATION.items()
    ]
    return "\n\n".join(blocks)


def _results() -> str:
    files = sorted(path.stem for path in Path(__file__).parent.glob("results/*.md"))
    names = [name for name in files if name != "index"]
    return "\n".join(["```{toctree}\n:hidden:\n", *names, "```"])


def _docstrings(text: str) -> str:
    names = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
    kinds = {True: "autoclass", False: "autofunction"}
    blocks = [f".. {kinds[name.rpartition('.')[2][0].isupper()]}:: {name}\n" for name in names]
    return "\n".join(["```{eval-rst}", *blocks, "```"])


def _keys() -> str:
    parts = [("cpt, sft and rl", RlRecipe), ("eval", EvalRecipe)]
    return "\n\n".join(
        f"## Keys of {name}\n\n```text{describe_keys(of, 84)}\n```" for name, of in parts
    )


def add_generated(_: Any, name: str, source: list[str]) -> None:
    """Append what a page has only on the site, and call pages by their titles."""
    source[0] = re.sub(r"\[[\w./-]+\.md\](\([\w./-]+\.md\))", r"[]\1", source[0])
    if name == "docs/index":
        source[0] += f"\n\n{_toctrees()}\n"
    elif name == "docs/results/index":
        source[0] += f"\n\n{_results()}\n"
    elif name == "docs/api":
        source[0] += f"\n\n{_docstrings(source[0])}\n"
    elif name == "docs/keys":
        source[0] += f"\n\n{_keys()}\n"


def add_entry(app: Any, error: Exception | None) -> None:
    """The site's first page is that of docs/."""
    if error is None:
        to = '<meta http-equiv="refresh" content="0; url=docs/index.html">'
        Path(app.outdir, "index.html").write_text(f"<!doctype html>{to}\n", encoding="utf-8")


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", add_generated)
    app.connect("build-finished", add_entry)

"""The documentation site: `make docs` writes it to build/docs.

The source folder is the repository itself, so that the links between README, RESULTS and the pages of docs/ are right
both on a code host and on the site. Every warning is an error there: a broken link, a name that the API reference does
not know, a page that is missing in `NAVIGATION`.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

NAVIGATION = {
    "Start": [
        "Where to start <docs/README>",
        "docs/quickstart",
        "Quickstart notebook <examples/quickstart>",
        "docs/recipes",
        "docs/faq",
    ],
    "Guides": [
        "docs/how-it-works",
        "docs/retrofit",
        "docs/language-models",
        "docs/logging",
        "docs/semantics",
        "docs/speed",
        "docs/scale",
        "docs/deploy",
    ],
    "The paper": ["docs/reproduce", "docs/laboratory"],
    "Results": [
        "RESULTS",
        "docs/results/few-images",
        *sorted(f"docs/results/few-images/{page.stem}" for page in (ROOT / "docs/results/few-images").glob("*.md")),
        "docs/results/speed",
        "docs/results/memory",
        "docs/results/coverage",
        "docs/results/after-training",
        "docs/results/many-processes",
        "docs/results/exactness",
        "docs/results/language-model",
        "docs/results/did-not-work",
        "benchmarks/README",
    ],
    "Reference": ["docs/api", "docs/versions", "CHANGELOG", "CONTRIBUTING", "SECURITY"],
}
"""The pages of the site, by their headings in the sidebar; a page's own title may be replaced there."""
PAGES = [re.sub(r".*<(.*)>", r"\1", page) for pages in NAVIGATION.values() for page in pages]

project = PROJECT["name"]
version = release = PROJECT["version"]
author = copyright = "the stochastic-depth authors"  # noqa: A001

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["README.md", "docs/**.md", *(f"{page}.*" for page in PAGES)]
exclude_patterns = [".*", "build", "dist", "results", "runs", "tests", "stochastic_depth*", "benchmarks/tables"]
nitpicky = True
# PyTorch's own inventory of names would have to be downloaded, and backquoted code in docstrings need not be a name.
_OTHERS = [
    r"(torch|nn|collections|typing|contextlib|numpy)\..*",
    "Axes|DeviceMesh|FSDPModule|MixedPrecisionPolicy|OffloadPolicy",
    r"(.*\.)?(Branch|Init|Record|Shortcut)",
]
nitpick_ignore_regex = [("py:obj", ".*"), *(("py:.*", names) for names in _OTHERS)]

smartquotes_action = "D"  # Dashes only: the quotes of "batch", a value, must stay as they are.
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"stochastic-depth {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "mailto": None, "source": "{{path}}#{{fragment}}"}
nb_execution_mode = "off"  # The tests run the notebook; the site shows what was committed.

# In docstrings, a name between backquotes becomes a link if the reference has it, and is code if not.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def add_navigation(_app: Sphinx, page: str, source: list[str]) -> None:
    """Put the table of contents into the README, which as a page of a code host has none."""
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += "\n\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```\n"


def link_to_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Point links to code and its lines to the site's copies of these files."""
    folder = PurePosixPath(page).parent

    def fixed_link(link: re.Match[str]) -> str:
        target = (ROOT / folder / link["path"]).resolve()
        if not target.is_file() or str(target.relative_to(ROOT).with_suffix("")) in app.env.found_docs:
            return link[0]  # A page of the site; or a broken link, of which MyST complains.
        up = "../" * len(folder.parts)
        return f"](source:{up}source/{target.relative_to(ROOT)}.html#{link['line'] or 'L1'})"

    source[0] = re.sub(r"\]\((?P<path>[\w./-]+\.(py|md))(#(?P<line>L\d+)(-L\d+)?)?\)", fixed_link, source[0])


def source_pages(_app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file that the documentation may link to, with an anchor for each line."""
    formatter = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
    folders = ("stochastic_depth", "examples", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    for file in sorted([*files, *(ROOT / "results").glob("*.md")]):
        name = str(file.relative_to(ROOT))
        code = highlight(file.read_text(), get_lexer_for_filename(name), formatter)
        code = code.replace('"L-', '"L').replace('"#L-', '"#L')  # #L12, as code hosts have it
        yield f"source/{name}", {"title": name, "body": f'<h1>{name}</h1><div class="source">{code}</div>'}, "page.html"


def convert_backquotes(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Treat backquotes as in Markdown: code that is not a name stays as it is, and an s may follow ("`Residual`s")."""

    def converted(code: re.Match[str]) -> str:
        quoted = code[1] if re.fullmatch(r"`[a-zA-Z_][\w.]*`", code[1]) else f"`{code[1]}`"
        return f"{quoted}\\ {code[2]}" if code[2] else quoted

    lines[:] = [re.sub(r"(`[^`]+`)(\w?)", converted, line) for line in lines]


def copy_home(app: Sphinx, error: Exception | None) -> None:
    """The README is the home page."""
    if error is None and app.builder.name == "html":
        (Path(app.outdir) / "index.html").write_bytes((Path(app.outdir) / f"{root_doc}.html").read_bytes())


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_navigation)
    app.connect("source-read", link_to_source)
    app.connect("html-collect-pages", source_pages)
    app.connect("autodoc-process-docstring", convert_backquotes)
    app.connect("build-finished", copy_home)

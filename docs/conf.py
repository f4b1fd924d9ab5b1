"""Settings of the documentation site, which `make docs` builds."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from astroid.astroid_manager import MANAGER
from astroid.manager import AstroidManager
from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx import addnodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_prep", "pretrain", "launcher")

project = "jepa-pretrain"
html_title = "Pretraining with LLM-JEPA"
html_theme = "furo"
html_extra_path = ["site"]
html_copy_source = False
html_show_copyright = False
extensions = ["myst_parser", "autoapi.extension"]

# The repository is the source folder, so links between its pages are the same on the site.
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
myst_heading_anchors = 6
highlight_language = "text"

# The reference is made from the source code, without importing it.
autoapi_root = "docs/api"
autoapi_dirs = [str(ROOT / name) for name in PACKAGES]
autoapi_python_use_implicit_namespaces = True  # launcher/ has no __init__.py
autoapi_options = ["members", "undoc-members", "show-inheritance", "show-module-summary"]
autoapi_add_toctree_entry = False
suppress_warnings = ["autoapi.python_import_resolution"]  # autoapi does not find constants that are assigned as a tuple


class OtherModules(set[str]):
    """Names of the modules outside the project and the standard library. Reading torch and others takes minutes."""

    def __contains__(self, name: object) -> bool:
        """Return whether autoapi must not read a module."""
        return (
            str(name).partition(".")[0] not in PACKAGES and str(name).partition(".")[0] not in sys.stdlib_module_names
        )


AstroidManager.brain["module_denylist"] = MANAGER.module_denylist = OtherModules()


class NotebookParser(MystParser):
    """A parser that reads a notebook as the Markdown of its cells, with the outputs that are stored in it."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the text of a notebook."""
        super().parse("\n\n".join(map(cell_markdown, json.loads(inputstring)["cells"])), document)


def cell_markdown(cell: dict[str, Any]) -> str:
    """Return a cell of a notebook and its outputs, which are texts, Markdown and PNG images, as Markdown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        if "image/png" in data:
            parts.append(f"![plots](data:image/png;base64,{''.join(data['image/png'].split())})")
        elif "text/markdown" in data:  # its headings would be sections of the page
            parts.append(re.sub(r"^#+ (.*)$", r"**\1**", "".join(data["text/markdown"]), flags=re.MULTILINE))
        else:
            parts.append(f"`````text\n{''.join(data['text/plain']).strip()}\n`````")
    return "\n\n".join(parts)


def setup(app: Sphinx) -> None:
    """Register the parser of notebooks and the functions below."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.connect("autodoc-process-docstring", rewrite_docstring)
    app.connect("doctree-read", resolve_links, priority=0)  # before Sphinx collects downloads
    app.connect("html-page-context", collapse_sidebar, priority=0)  # before the theme makes the sidebar


def rewrite_docstring(_app: Sphinx, _kind: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Rewrite the lines of a docstring as reStructuredText.

    Docstrings are plain text with code in backticks. Blocks that are indented by four spaces are shown as they are.
    """
    blocks = [
        f"::\n\n{block}" if block.startswith("    ") else re.sub(r"(`+)(.+?)\1|[*_|\\]", escape, block, flags=re.DOTALL)
        for block in "\n".join(lines).split("\n\n")
    ]
    lines[:] = "\n\n".join(blocks).split("\n")


def escape(match: re.Match[str]) -> str:
    """Return code, or a character with a meaning in reStructuredText, as reStructuredText."""
    if match[2] is None:
        return f"\\{match[0]}"
    before, after = match.string[: match.start()][-1:], match.string[match.end() :][:1]
    code = f"``{' '.join(match[2].split())}``"
    return ("\\ " if before.strip() else "") + code + ("\\ " if after.strip() else "")


def resolve_links(app: Sphinx, document: nodes.document) -> None:
    """Resolve the links that do not lead to a page.

    A file is copied to its path on the site. A folder, and the built-in `type` in a signature, have no link.
    """
    for link in list(document.findall(addnodes.download_reference)):
        name, path = app.env.relfn2path(link["reftarget"], app.env.docname)
        copy = app.outdir / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        link.replace_self(nodes.reference("", "", *link.children, refuri=link["reftarget"], internal=True))
    for link in list(document.findall(addnodes.pending_xref)):
        is_folder = (
            link["reftype"] == "myst" and Path(app.env.relfn2path(link["reftarget"], app.env.docname)[1]).is_dir()
        )
        if is_folder or link["reftarget"] == "type":
            link.replace_self(link.children)


def collapse_sidebar(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _document: Any) -> None:
    """Expand only the current branch of the sidebar: all modules on each page would triple the build time."""
    list_pages = context["toctree"]
    context["toctree"] = lambda **options: list_pages(**{**options, "collapse": True})

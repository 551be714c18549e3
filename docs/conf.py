"""The documentation site: `make docs` builds it into build/docs, and a warning is an error.

Pages are Markdown (MyST). README.md, CHANGELOG.md, ARCHITECTURE.md and CONTRIBUTING.md are pages
of the site as they are. The API reference comes from the docstrings, the page of commands from the
program's own options, and tables of measurements from results/ (tables.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import spectral_window
from spectral_window.cli.program import command_names, load_command

project = "spectral-window"
author = "The spectral-window maintainers"
version = release = spectral_window.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["*.py"]
html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_show_copyright = False
templates_path: list[str] = []

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# links of ARCHITECTURE.md and others to files that are no pages
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # fields of a NamedTuple are described once, by "Attributes:"
napoleon_custom_sections = [("Shapes", "params_style")]
default_role = "code"  # `x` in a docstring is code, as in Markdown
highlight_language = "text"
smartquotes = False  # it would make a dash of the two hyphens of an option


# ------------------------------------------------------------------------------- docstrings

_HEADER = re.compile("(Args|Attributes|Examples?|Note|Raises|Returns|Shapes|Yields):$")
_ITEM = re.compile(r"[-*] |\d+\. |>>> ")
_MARKUP = re.compile(r"(`+[^`]+`+|(?<!\S)\*\w[^*]*\*(?!\w))")  # `code` and *emphasis*


def plain_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make a docstring of plain text valid reStructuredText, in place.

    The docstrings hold formulas and drawings: `|a|`, `x**2` and `name_` are no markup, and lines
    that are indented outside a Google-style section are a drawing, shown as it stands.
    """
    text: list[str] = []
    section = False
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        block = paragraph.split("\n")
        first, indented = block[0], [line for line in block if line.startswith(" ")]
        section = bool(_HEADER.match(first)) or (section and first.startswith(" "))
        if indented and not section and not _ITEM.match(first):
            text += ["::", "", *("    " + line for line in block)]
        else:
            text += map(_escape, block)
        text.append("")
    lines[:] = text


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of a NamedTuple, which its docstring describes."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def _escape(line: str) -> str:
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = _MARKUP.split(line)
    for index in range(0, len(parts), 2):  # between them; "D." at the start would be a numbering
        text = re.sub(r"([|*\\])|(?<=\w)_(?!\w)", r"\\\g<0>", parts[index])
        parts[index] = re.sub(r"\b([A-Za-z])\.(?=\s|$)", r"\1\\.", text)
    return "".join(parts)


# ------------------------------------------------------------------------------- commands


def _shown(metavar: str) -> str:
    """An argument without what typer adds: {MODEL} is MODEL, [[BENCH]...]... is [BENCH]..."""
    metavar = re.sub(r" <.*>$|[{}]", "", metavar)
    return re.sub(r"^\[(\[.*\]\.\.\.)\]\.\.\.$", r"\1", metavar)


class Commands(SphinxDirective):
    """A section for every command of the program: usage, arguments and options."""

    def run(self) -> list[nodes.Node]:
        return [self.section(name, load_command(name)) for name in command_names()]

    def section(self, name: str, command: Any) -> nodes.section:
        context = command.make_context(name, [], resilient_parsing=True)
        pieces = [_shown(piece) for piece in command.collect_usage_pieces(context)]
        section = nodes.section(ids=[name], names=[name])
        section += nodes.title(text=name)
        section += nodes.paragraph(text=" ".join((command.help or "").split()))
        text = " ".join(["spectral-window", name, *pieces])
        section += nodes.literal_block(text, text, language="text")
        options = nodes.definition_list(classes=["options"])
        options += [item for each in command.params for item in self.item(each, context)]
        section += options
        section += nodes.paragraph(text=command.epilog)
        return section

    def item(self, parameter: Any, context: Any) -> Iterator[nodes.definition_list_item]:
        names, about = parameter.get_help_record(context)
        item = nodes.definition_list_item()
        item += nodes.term("", "", nodes.literal(text=_shown(names)))
        item += nodes.definition("", nodes.paragraph(text=" ".join(about.split())))
        yield item


def setup(app: Sphinx) -> None:
    app.add_directive("commands", Commands)
    app.connect("autodoc-skip-member", skip)
    # before napoleon, which makes the sections of Google style
    app.connect("autodoc-process-docstring", plain_text, priority=400)

"""How the pages are built: `make docs` writes them to build/docs, and any warning is an error."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

from attention_rl_trainer import __version__

sys.path.insert(0, str(Path(__file__).parent))
# It speaks of a package that only 4-bit weights on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in record.getMessage())

project = "attention-rl-trainer"
author = "the attention-rl-trainer authors"
copyright = f"2026, {author}"  # as Sphinx calls it
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "option_lists"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["pages.css"]

myst_heading_anchors = 4
# The notebook runs anew at each build, so that its pictures are those of this version.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# A name in single backticks is a link where this package documents it, and plain code elsewhere.
default_role = "py:obj"

nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    # Other packages' pages would have to be fetched; the build asks no network.
    (
        "py:.*",
        r"(accelerate|collections|contextlib|datasets|numpy|os|pathlib|peft|re|rich|tokenizers|torch|transformers)\..*",
    ),
    # What annotations are written as that cannot be read at run time: ranges and choices, which options.md spells out.
    ("py:class", r"(Count|CountOrZero|Coefficient|Positive|Share|Bytes|SaveStrategy|WeightBits)"),
    (
        "py:class",
        r"(Advantage|Credit|HeadAggregation|HeadSimilarity|KLReference|SelectorGradient|WarmStartOrder|Window)",
    ),
    ("py:class", r"(attention_rl_trainer\.options\.(AtLeast|Above)|dict\[str|tuple\[~.*|inf)"),
]


def before_napoleon(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Leave a config's list of options to the page that has their types and defaults too."""
    if what in ("attribute", "property"):
        # Else what stands before a colon in the first line would be taken for a type.
        lines[:0] = ["..", ""]
    if name.endswith(".AttentionGuidedRLConfig"):
        first = next(number for number, line in enumerate(lines) if line.startswith("**"))
        lines[first:] = ["Every option is in :doc:`options`."]


def without_arguments_of_protocols(
    app: Sphinx, what: str, name: str, thing: object, options: object, arguments: str | None, returned: str | None
) -> tuple[str, None] | None:
    """Show a protocol without the constructor that it has by chance."""
    return ("", None) if getattr(thing, "_is_protocol", False) else None


def name_pages_by_title(app: Sphinx, page: str, source: list[str]) -> None:
    """Let a link that shows a file's name, as is readable in the repository, show the title of its page."""
    source[0] = re.sub(r"\[([\w/]+\.md)\]\(\1(#[\w-]+)?\)", r"[](\1\2)", source[0])


def setup(app: Sphinx) -> None:
    """Change what autodoc found, and what the pages say."""
    app.connect("autodoc-process-signature", without_arguments_of_protocols)
    app.connect("source-read", name_pages_by_title)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)

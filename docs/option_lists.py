"""Two directives that write options into the pages when these are built, from where the options are declared.

`method-options` lists those of `AttentionGuidedRLConfig`, under a heading for each of its groups; `options` takes the
dotted name of any other dataclass of options.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from attention_rl_trainer.config import OPTION_GROUPS, AttentionGuidedRLConfig
from attention_rl_trainer.options import meaning_of, options_by_heading


class MethodOptions(SphinxDirective):
    """Every option of the method, by the heading that ``--help`` shows it under."""

    def run(self) -> list[nodes.Node]:
        """Write a section for each heading."""
        hints = get_type_hints(AttentionGuidedRLConfig, include_extras=True)
        sections: list[nodes.Node] = []
        for heading, items in options_by_heading(AttentionGuidedRLConfig, OPTION_GROUPS).items():
            section = nodes.section(ids=[f"{heading}-options"], names=[f"{heading} options"])
            section += nodes.title(text=heading.capitalize())
            section += nodes.paragraph(text=meaning_of(OPTION_GROUPS[heading]))
            section += definitions(items, hints)
            sections.append(section)
        return sections


class DataclassOptions(SphinxDirective):
    """The options of a dataclass that the Trainer's own and those of the method do not have."""

    required_arguments = 1
    option_spec: ClassVar = {}

    def run(self) -> list[nodes.Node]:
        """Write a list."""
        module, _, name = self.arguments[0].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        own = [item for item in fields(kind) if item.init]
        return [definitions(own, get_type_hints(kind, include_extras=True), f"{name}.")]


def definitions(items: Iterable[Field[Any]], hints: dict[str, Any], prefix: str = "") -> nodes.definition_list:
    """Make a list of terms (name, type, default, other names) and definitions (help), with the names as anchors."""
    listed = nodes.definition_list()
    for item in items:
        term = nodes.term(ids=[f"{prefix}{item.name}"])
        term += nodes.literal(text=item.name)
        names = [alias for alias in item.metadata.get("aliases", ()) if alias.strip("-").replace("-", "_") != item.name]
        default = "required" if _default(item) is MISSING else f"default {_shown(_default(item))}"
        term += nodes.inline(text=f"  {described_type(hints[item.name])}; {default}", classes=["option-type"])
        if names:
            term += nodes.inline("", "", *_with_flags(f", also {', '.join(names)}"), classes=["option-type"])
        meaning = nodes.paragraph("", "", *_with_flags(item.metadata.get("help", "").replace("%%", "%")))
        listed += nodes.definition_list_item("", term, nodes.definition("", meaning))
    return listed


def _with_flags(text: str) -> list[nodes.Node]:
    """Set what is in backticks and flags as code; as prose their two hyphens would become a dash."""
    parts = re.split(r"(`[^`]+`|--[\w-]+)", text)
    return [
        nodes.literal(text=part.strip("`")) if part.startswith(("--", "`")) else nodes.Text(part)
        for part in parts
        if part
    ]


def described_type(hint: Any) -> str:
    """Say in words what an annotation admits."""
    if get_origin(hint) is Annotated:
        kind, *ranges = get_args(hint)
        return ", ".join([described_type(kind), *map(str, ranges)])
    if get_origin(hint) is Literal:
        return " | ".join(map(_shown, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        arms = [described_type(arm) for arm in get_args(hint) if arm is not NoneType]
        return " or ".join([*arms, *(["none"] if NoneType in get_args(hint) else [])])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(_shown(member.value) for member in hint)
    if get_origin(hint) is not None:
        return f"{get_origin(hint).__name__} of {', '.join(described_type(part) for part in get_args(hint))}"
    return getattr(hint, "__name__", str(hint))


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _shown(value: Any) -> str:
    value = getattr(value, "value", value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) or "empty"


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives."""
    app.add_directive("method-options", MethodOptions)
    app.add_directive("options", DataclassOptions)
    return {"parallel_read_safe": True}

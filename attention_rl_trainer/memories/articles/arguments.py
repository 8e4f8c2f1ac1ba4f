"""The arguments of a template as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from mwparserfromhell.nodes import Template
from mwparserfromhell.wikicode import Wikicode

Render: TypeAlias = Callable[[Wikicode | None], str]

_YES = re.compile(r"y|yes|on|true|t|1|in", re.IGNORECASE)


class Arguments:
    """The arguments of a template; each is rendered when it is asked for, since most are not."""

    def __init__(self, template: Template, render: Render) -> None:
        self._template = template
        self._render = render

    @property
    def name(self) -> str:
        """The name of the template as it is written."""
        return self._render(self._template.name)

    @property
    def are_none(self) -> bool:
        """Whether the template is only named."""
        return not self._template.params

    def get(self, *names: int | str) -> str:
        """Return the first of the named arguments that is there and not empty, without white space around it."""
        for name in names:
            if self._template.has(str(name)) and (text := self._render(self._template.get(name).value).strip()):
                return text
        return ""

    def has(self, name: str) -> bool:
        """Whether an argument is there, if only as a name."""
        return bool(self._template.has(name))

    def is_on(self, name: str) -> bool:
        """Whether an argument says yes."""
        return _YES.fullmatch(self.get(name)) is not None

    def positional(self, first: int = 1) -> Iterator[str]:
        """Yield the arguments without names from one on, empty ones too."""
        number = first
        while self._template.has(str(number)):
            yield self.get(number)
            number += 1

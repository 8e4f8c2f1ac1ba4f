"""From the markup of a wiki page to the text a reader sees: plain paragraphs, headings and list items, one per line.

mwparserfromhell finds the nodes of a page; this module says what becomes of each kind of node, and tidies what the
removed ones leave in the text.
"""

from __future__ import annotations

import re

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Node, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

from attention_rl_trainer.memories.articles.brackets import count_unpaired
from attention_rl_trainer.memories.articles.templates import raised, render_template

APPARATUS_TITLES = frozenset(
    {
        "bibliography",
        "citations",
        "cited sources",
        "external links",
        "explanatory notes",
        "footnotes",
        "further reading",
        "gallery",
        "general references",
        "image gallery",
        "notes",
        "notes and references",
        "references",
        "references and notes",
        "references and sources",
        "see also",
        "sources",
        "works cited",
    }
)
"""Titles (lower case) of sections that are left out unless they hold prose."""

MIN_PROSE_CHARACTERS = 200
"""A line outside a list that is at least as long, and ends as a sentence does, counts as prose."""

MAX_UNPAIRED_WORK = 20_000_000
"""Unpaired brackets times characters of their section, over a page: what takes the parser seconds. In the 214 pages of
the embedded dumps the most is 62,289."""

_LIST_ITEM = "\ue000"
"""Stands at the start of a list item while a page is taken apart; a private-use character no article contains."""

_DROPPED_TAGS = frozenset(
    {
        "ce",
        "chem",
        "gallery",
        "graph",
        "hiero",
        "imagemap",
        "includeonly",
        "indicator",
        "inputbox",
        "mapframe",
        "maplink",
        "math",
        "ref",
        "references",
        "score",
        "section",
        "source",
        "style",
        "syntaxhighlight",
        "table",
        "templatedata",
        "templatestyles",
        "timeline",
    }
)
_BLOCK_TAGS = frozenset({"blockquote", "center", "div", "p", "poem", "ul", "ol", "dl"})
_LIST_TAGS = frozenset({"li", "dt", "dd"})

_DROPPED_LINK_PREFIXES = frozenset({"file", "image", "media", "category"})
_LANGUAGE_PREFIX = re.compile(r"[a-z]{2,3}(-[a-z]+)*")

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_HEADING = re.compile(r"^(={1,6})(.+?)\1[ \t]*$", re.MULTILINE)
_MAGIC_WORD = re.compile(r"__[A-Z]{3,}__")
_STRAY_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>")
_UNCLOSED = re.compile(r"\{\{.*|\[\[\s*(?:file|image|category)\s*:.*", re.IGNORECASE)
_STRAY_BRACKETS = re.compile(r"\}\}|\[\[|\]\]|\{\||\|\}")
_STYLE_QUOTES = re.compile(r"'{2,}")
_TABLE_LINE = re.compile(r"^[^\S\n]*(?:\{\||\|[-}+]?|!).*$", re.MULTILINE)
_SPACES = re.compile(r"[ \t\u00a0\u2009\u200a\u202f]+")
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u2060\ufeff]")
_TIDY: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"([(\[])[\s,;:/]+"), r"\1"),
    # Looking back, a long run is tried from its beginning alone.
    (re.compile(r"(?<![\s,;:])[\s,;:]+([)\]])"), r"\1"),
    (re.compile(r"([,;])(?:\s*[,;])+"), r"\1"),
    (re.compile(r"\(\)|\[\]"), ""),
    (re.compile(r"^[,;:]+ *"), ""),
    (re.compile(r"(?<![\w)\]])\^(?=[-+−]?\d)"), ""),
    (re.compile(r"(?<! ) +([,.;:!?)])(?=\s|$|[)\"'])"), r"\1"),
    (re.compile(r" {2,}"), " "),
)
_NOTHING_LEFT = re.compile(r"[\W_]*")
_END_OF_SENTENCE = re.compile(r"[.!?][\"')”’]*$")


class TangledMarkupError(ValueError):
    """Markup has so many brackets and tags without their partners that parsing it could take hours."""


def plain_text(markup: str) -> str:
    """Turn the markup of a page into the text a reader sees.

    Templates, tables, references, files, categories, galleries, formulas, comments, magic words and addresses are
    gone; of a link its words stay. A template that stands for words in a sentence, such as a measure or a quotation in
    another language, is replaced by them. A heading is a line of its own, and goes with its section where that is
    empty, or is an apparatus (`APPARATUS_TITLES`) without prose.

    Returns:
        Lines of text; one blank line at most between two of them, none at either end.

    Raises:
        TangledMarkupError: brackets without partners would cost more than `MAX_UNPAIRED_WORK`.
    """
    kept = _without_empty_parts(_sections(_COMMENT.sub("", markup.replace(_LIST_ITEM, ""))))
    text = "\n\n".join(part for section in kept for part in (section.title, section.body) if part)
    return text.replace(_LIST_ITEM, "").strip()


class _Section:
    """A heading, its level, and the tidy text up to the next one; before the first there is no title, and level 0."""

    __slots__ = ("body", "level", "title")

    def __init__(self, title: str, level: int, body: str) -> None:
        self.title = title
        self.level = level
        self.body = body

    @property
    def is_apparatus(self) -> bool:
        return self.title.lower().rstrip(":.") in APPARATUS_TITLES

    @property
    def has_prose(self) -> bool:
        lines = self.body.split("\n")
        return any(
            len(line) >= MIN_PROSE_CHARACTERS and not line.startswith(_LIST_ITEM) and _END_OF_SENTENCE.search(line)
            for line in lines
        )


def _sections(markup: str) -> list[_Section]:
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
    sections = [_Section("", 0, _plain(pieces[0]))]
    for marks, title, body in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        sections.append(_Section(_plain(title).replace("\n", " "), len(marks), _plain(body)))
    return sections


def _plain(markup: str) -> str:
    return _tidy(_render(mwparserfromhell.parse(markup, skip_style_tags=True)))


def _without_empty_parts(sections: list[_Section]) -> list[_Section]:
    """Leave out each apparatus without prose, then each heading that has no text under it."""
    kept: list[_Section] = []
    position = 0
    while position < len(sections):
        section = sections[position]
        end = _end_of_part(sections, position)
        if section.is_apparatus and not any(part.has_prose for part in sections[position:end]):
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


def _render(code: Wikicode | None) -> str:
    return "" if code is None else "".join(_render_node(node) for node in code.nodes)


def _render_node(node: Node) -> str:
    match node:
        case Text():
            return str(node.value)
        case Wikilink():
            return _render_wikilink(node)
        case Template():
            return render_template(node, _render)
        case Tag():
            return _render_tag(node)
        case HTMLEntity():
            return str(node.normalize())
        case ExternalLink():
            return _render(node.title) if node.brackets else ""
        case Heading():
            return f"\n\n{_render(node.title)}\n\n"
        case _:  # comments, and the arguments a template's own page declares
            return ""


def _render_wikilink(link: Wikilink) -> str:
    target = str(link.title).strip()
    prefix, colon, _ = target.partition(":")
    prefix = prefix.strip().lower()
    if colon and prefix in _DROPPED_LINK_PREFIXES:
        return ""
    if link.text is not None:
        return _render(link.text)
    if colon and prefix and target.startswith(prefix) and _LANGUAGE_PREFIX.fullmatch(prefix):
        return ""
    return _render(link.title).strip().lstrip(":")


def _render_tag(tag: Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return ""
    if name in _LIST_TAGS:
        return f"{_LIST_ITEM}{_render(tag.contents)}"
    if name == "br":
        return "\n"
    contents = _render(tag.contents)
    if name == "sup":
        return raised(contents)
    return f"\n{contents}\n" if name in _BLOCK_TAGS else contents


def _tidy(text: str) -> str:
    """Remove what the parser could not pair, and the traces that removed nodes leave in lines and brackets."""
    text = _MAGIC_WORD.sub("", _STRAY_TAG.sub("", _TABLE_LINE.sub("", text)))
    text = _INVISIBLE.sub("", _STRAY_BRACKETS.sub("", _UNCLOSED.sub("", text)))
    text = _STYLE_QUOTES.sub(_apostrophes, text)
    lines = (_tidy_line(line) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _apostrophes(quotes: re.Match[str]) -> str:
    """Keep what is left of a run of quotes after 2 for italics, 3 for bold, or 5 for both."""
    length = len(quotes[0])
    return "'" * (max(length - 5, 0) if length > 4 else length // 4)


def _tidy_line(line: str) -> str:
    is_item = line.startswith(_LIST_ITEM)
    line = _SPACES.sub(" ", line.replace(_LIST_ITEM, "")).strip()
    for pattern, replacement in _TIDY:
        line = pattern.sub(replacement, line)
    line = line.strip()
    if _NOTHING_LEFT.fullmatch(line):
        return ""
    return f"{_LIST_ITEM}{line}" if is_item else line

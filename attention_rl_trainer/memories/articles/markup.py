"""From the markup of a wiki page to the text a reader sees: plain paragraphs, headings and list items, one a line.

Part of the sources of articles (section 3 of the design). mwparserfromhell finds the nodes of a page; this module says
what becomes of each kind of node, and tidies what the removed ones leave behind. It knows nothing about dumps, files,
data sets or which pages are articles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Node, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

from attention_rl_trainer.memories.articles.brackets import count_unpaired

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

    Args:
        markup: Source of the page, as a wiki stores it.

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
            return _render_template(node)
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
        return _raised(contents)
    return f"\n{contents}\n" if name in _BLOCK_TAGS else contents


def _raised(contents: str) -> str:
    """Keep an exponent apart from the number before it: 10 with a raised 6 is not 106."""
    return f"^{contents}" if re.fullmatch(r"[-+−]?\d+", contents.strip()) else contents


def _render_template(template: Template) -> str:
    name = " ".join(str(template.name).replace("_", " ").split()).lower()
    if name in _PUNCTUATION_TEMPLATES:
        return _PUNCTUATION_TEMPLATES[name]
    if name in _WORDS_OF_TEMPLATES:
        return _WORDS_OF_TEMPLATES[name](template)
    if name.startswith("lang-"):
        return _argument(template, 1)
    if name in _PRINTED_ARGUMENT:
        return _argument(template, _PRINTED_ARGUMENT[name]) or _argument(template, "text")
    return ""


def _argument(template: Template, name: int | str) -> str:
    return _render(template.get(name).value).strip() if template.has(str(name)) else ""


def _positional(template: Template) -> Iterator[str]:
    number = 1
    while template.has(str(number)):
        yield _argument(template, number)
        number += 1


def _measure(template: Template) -> str:
    """Print the value and unit of {{convert|5|to|6|km|mi}}, without the conversion."""
    words = list(_positional(template))
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


def _date(template: Template) -> str:
    """Print {{start date|1969|7|16}} as 1969-07-16."""
    numbers = [word for word in _positional(template) if word.isdigit()][:3]
    return "-".join(number.zfill(2) for number in numbers)


def _fraction(template: Template) -> str:
    """Print {{frac|1|2}} as 1/2 and {{frac|3|1|2}} as 3 1/2."""
    parts = [part for part in _positional(template) if part]
    if len(parts) == 3:
        return f"{parts[0]} {parts[1]}/{parts[2]}"
    return "/".join(parts if len(parts) == 2 else ["1", *parts])


def _value(template: Template) -> str:
    """Print {{val|1.5|e=6|u=m/s}} as 1.5 x 10^6 m/s."""
    exponent = _argument(template, "e")
    power = f" × 10^{exponent}" if exponent else ""
    return f"{_argument(template, 1)}{power} {_argument(template, 'u') or _argument(template, 'ul')}".strip()


_WORDS_OF_TEMPLATES: dict[str, Callable[[Template], str]] = {
    "as of": lambda t: f"As of {_date(t)}",
    "birth date": _date,
    "c.": lambda t: f"c. {_argument(t, 1)}",
    "chem": lambda t: "".join(_positional(t)),
    "chem2": lambda t: "".join(_positional(t)),
    "circa": lambda t: f"c. {_argument(t, 1)}",
    "convert": _measure,
    "cvt": _measure,
    "frac": _fraction,
    "fraction": _fraction,
    "math": lambda t: _argument(t, 1),
    "ship": lambda t: " ".join(part for part in list(_positional(t))[:2] if part),
    "sfrac": _fraction,
    "start date": _date,
    "sup": lambda t: _raised(_argument(t, 1)),
    "uss": lambda t: f"USS {_argument(t, 1)}",
    "val": _value,
}
"""Templates that stand for words inside a sentence, and how each is printed."""


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

"""From a MediaWiki XML dump to rows: title, text, and why a page is not an article.

A dump is read page by page in constant memory, so that one of the whole Wikipedia streams.
"""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, TypedDict, cast
from xml.etree import ElementTree

from attention_rl_trainer.memories.articles.literal import protect
from attention_rl_trainer.memories.articles.markup import TangledMarkupError, plain_page
from attention_rl_trainer.memories.articles.sites import ENGLISH_WIKI, WikiSite

BROKEN_DUMP: Final = "broken_dump"
"""Reason of the row that stands for the rest of a dump that could not be read; its title says where the break is."""

MAX_PAGE_BYTES = 2**26
"""Bytes of XML that a page, or a revision in its history, may have. Wikipedia's have 2 MiB of text at most, which is 12
MiB where each character is written as an entity."""
MAX_BLOCK_BYTES = 2**26
"""Bytes that one kibibyte of a compressed file may become: a block holds 900 kB, but of one character 46 MB."""

WIKITEXT: Final = "wikitext"
"""Content model of an article; others are JSON, style sheets, programs."""

_MODELS_OF_FORMATS = {"text/x-wiki": WIKITEXT, "": WIKITEXT}
"""What an older dump, which names the format of a page alone, holds; its other formats are their own names."""

_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
_NUM_NAMED_TEMPLATES = 10
_PAGE_FIELDS = ("title", "ns", "redirect", "revision")
_PIECE_BYTES = 2**16
_COMPRESSED_PIECE_BYTES = 2**10
_PART_BYTES = 2**20

_logger = logging.getLogger(__name__)


class BrokenDumpError(ValueError):
    """A MediaWiki dump breaks off, or is damaged, or the file is not one."""


class ArticleRow(TypedDict):
    """A page as a row; ``text`` is empty where ``skip_reason`` is not."""

    title: str
    text: str
    skip_reason: str
    lost_templates: str
    """JSON: how often a template, by its name, was left out of the text though it may print words; "" for none."""


@dataclass(frozen=True, slots=True)
class WikiPage:
    """The latest revision of a page of a dump."""

    title: str
    """With its namespace prefix."""
    namespace: int
    """Its number; articles are in 0."""
    is_redirect: bool
    """Whether the dump itself marks the page as a redirect."""
    markup: str
    model: str = WIKITEXT
    """What its markup is: "wikitext", "wikibase-item", "css", …"""
    site: WikiSite = field(default=ENGLISH_WIKI, compare=False, repr=False)


def read_wiki_pages(path: Path) -> Iterator[WikiPage]:
    """Read the pages of a dump, ``.xml``, ``.xml.bz2`` or ``.xml.gz``, one after the other.

    Yields:
        Each page that is there in full, also those before a break.

    Raises:
        BrokenDumpError: the file is not a MediaWiki dump, or breaks off; names the last page read.
        OSError: the file cannot be opened.
    """
    last_title, num_pages = "", 0
    with path.open("rb") as file:
        try:
            for page in _parse_pages(_pieces(file, path.suffix.lower()), path):
                yield page
                last_title, num_pages = page.title, num_pages + 1
        except (ElementTree.ParseError, EOFError, OSError, zlib.error) as error:
            where = f"after page {num_pages}, {last_title!r}" if num_pages else "before its first page"
            raise BrokenDumpError(
                f"the MediaWiki dump {str(path)!r} breaks {where}: {error}; "
                "get the file again, or compare its checksum."
            ) from error


def check_wiki_dumps(paths: Sequence[Path]) -> None:
    """Read each dump as far as its first page, and log what is not known of its wiki.

    Raises:
        BrokenDumpError: the file is not a MediaWiki dump, or breaks off before its first page, or holds none.
        OSError: the file cannot be opened.
    """
    notes: dict[str, None] = {}
    for path in paths:
        page = next(read_wiki_pages(path), None)
        if page is None:
            raise BrokenDumpError(
                f"the MediaWiki dump {str(path)!r} holds no page; get the file again, or compare its checksum."
            )
        notes[page.site.what_is_not_known] = None
    for note in filter(None, notes):
        _logger.warning("%s", note)


def article_rows(paths: tuple[str, ...]) -> Iterator[ArticleRow]:
    """Read dumps in the given order as rows; pages that are not articles are rows too, so that they can be counted.

    Yields:
        One row per page. Where a dump breaks off, one last row for it whose reason is `BROKEN_DUMP`.

    Raises:
        BrokenDumpError: a dump holds no page that can be read.
    """
    for path in paths:
        num_rows = 0
        try:
            for page in read_wiki_pages(Path(path)):
                yield article_row(page)
                num_rows += 1
        except BrokenDumpError as error:
            if num_rows == 0:
                raise
            _logger.warning("%s", error)
            yield {"title": str(error), "text": "", "skip_reason": BROKEN_DUMP, "lost_templates": ""}


def streamed_article_rows(paths: tuple[str, ...]) -> Iterator[ArticleRow]:
    """Read as `article_rows`, and log at the end which templates were lost."""
    lost: Counter[str] = Counter()
    for row in article_rows(paths):
        lost.update(_lost_templates(row["lost_templates"]))
        yield row
    _report_lost_templates(lost)


def report_lost_templates(column: Iterable[str]) -> None:
    """Log which templates the articles of a table lack, by its column ``lost_templates``, and how often."""
    lost: Counter[str] = Counter()
    for value, num_rows in Counter(column).items():
        lost.update({name: num_rows * count for name, count in _lost_templates(value).items()})
    _report_lost_templates(lost)


def _lost_templates(value: str) -> dict[str, int]:
    return cast(dict[str, int], json.loads(value)) if value else {}


def _report_lost_templates(lost: Counter[str]) -> None:
    if not lost:
        return
    named = ", ".join(f"{name!r} ({count})" for name, count in lost.most_common(_NUM_NAMED_TEMPLATES))
    more = f" and {len(lost) - _NUM_NAMED_TEMPLATES:,} others" if len(lost) > _NUM_NAMED_TEMPLATES else ""
    _logger.warning(
        "Inside of sentences %d templates were left out whose words are not known: %s%s. Each article names its own in "
        "the column 'lost_templates'.",
        lost.total(),
        named,
        more,
    )


def article_row(page: WikiPage) -> ArticleRow:
    """Turn a page into a row.

    Its ``skip_reason`` is "" for an article, else "not_an_article" (of another namespace), "content_model:" and the
    name of what is not wikitext ("content_model:wikibase-item"), "redirect", "disambiguation", "list",
    "tangled_markup" (see `TangledMarkupError`) or "empty".
    """
    reason, text, lost = _skip_reason(page), "", ""
    if not reason:
        try:
            plain = plain_page(page.markup, page.site)
        except TangledMarkupError:
            reason = "tangled_markup"
        else:
            text = plain.text
            reason = "" if text else "empty"
            if text and plain.lost_templates:
                lost = json.dumps(plain.lost_templates, ensure_ascii=False)
    return {"title": page.title, "text": text, "skip_reason": reason, "lost_templates": lost}


def _skip_reason(page: WikiPage) -> str:
    if page.namespace != 0:
        return "not_an_article"
    if page.model != WIKITEXT:
        return f"content_model:{page.model}"
    site = page.site
    if page.is_redirect or site.is_redirect(page.markup):
        return "redirect"
    # A template that is only spoken of, inside of <nowiki> or a comment, says nothing of the page.
    if site.is_disambiguation(page.title, page.markup) and site.is_disambiguation(page.title, protect(page.markup)):
        return "disambiguation"
    if site.is_list(page.title, page.markup) and site.is_list(page.title, protect(page.markup)):
        return "list"
    return ""


def _pieces(file: BinaryIO, suffix: str) -> Iterator[bytes]:
    if suffix == ".bz2":
        return _decompress(iter(partial(file.read, _COMPRESSED_PIECE_BYTES), b""))
    if suffix == ".gz":
        file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    return iter(partial(file.read, _PIECE_BYTES), b"")


def _decompress(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress a bz2 file, and hand out nothing that has not passed its checksum.

    `bz2.open` hands out a block while it decodes it, and compares the checksum at the end. One wrong bit can rotate a
    block, which then reads as whole pages in the wrong places.

    Args:
        pieces: the file, in pieces much smaller than a compressed block.

    Raises:
        EOFError: the file ends inside a stream.
        OSError: a block is damaged.
    """
    decompressor = bz2.BZ2Decompressor()
    is_inside = False
    for piece in pieces:
        rest = piece
        while rest:
            if decompressor.eof:
                decompressor = bz2.BZ2Decompressor()
            yield _whole_blocks(decompressor, rest)
            is_inside, rest = not decompressor.eof, decompressor.unused_data
    if is_inside:
        raise EOFError("the compressed file ends before its end-of-stream marker")


def _whole_blocks(decompressor: bz2.BZ2Decompressor, piece: bytes) -> bytes:
    """Decompress what ends in a piece; what it only begins is kept by the decompressor."""
    parts = [decompressor.decompress(piece, _PART_BYTES)]
    size = len(parts[0])
    # The end of a block, and with it the checksum, may be left for the next call.
    while not decompressor.eof and (part := decompressor.decompress(b"", _PART_BYTES)):
        parts.append(part)
        size += len(part)
        if size > MAX_BLOCK_BYTES:
            raise OSError(f"{len(piece)} bytes decompress to more than {MAX_BLOCK_BYTES:,}")
    return b"".join(parts)


def _parse_pages(pieces: Iterable[bytes], path: Path) -> Iterator[WikiPage]:
    root: ElementTree.Element | None = None
    page: ElementTree.Element | None = None
    site = ENGLISH_WIKI
    size = 0

    def measured() -> Iterator[bytes]:
        nonlocal size
        for piece in pieces:
            if size > MAX_PAGE_BYTES:
                raise OSError(f"a page has more than {MAX_PAGE_BYTES:,} bytes")
            size += len(piece)
            yield piece

    for event, element in _parse_xml(measured()):
        if root is None:
            root = element
            if _local_name(root) != "mediawiki":
                raise BrokenDumpError(
                    f"{str(path)!r} is XML, but not a MediaWiki dump: its root element is <{_local_name(root)}>, "
                    "expected <mediawiki>."
                )
        elif event == "end" and _local_name(element) == "siteinfo":
            site = _site(element, root.get(_LANGUAGE, ""))
        elif event == "start" and _local_name(element) == "page":
            page = element
        elif event == "end" and _local_name(element) == "revision" and page is not None:
            # Of a page's history the last revision alone is read; nothing else is kept, however much there is.
            fields = _children(page)
            page[:] = [fields[name] for name in _PAGE_FIELDS if name in fields]
            size = 0
        elif event == "end" and _local_name(element) == "page":
            yield _page(element, site)
            size = 0
            root.clear()  # else the empty shells of millions of pages pile up


def _parse_xml(pieces: Iterable[bytes]) -> Iterator[tuple[str, ElementTree.Element]]:
    parser: ElementTree.XMLPullParser[ElementTree.Element] = ElementTree.XMLPullParser(("start", "end"))
    for piece in pieces:
        parser.feed(piece)
        yield from _element_events(parser)
    parser.close()
    yield from _element_events(parser)


def _element_events(
    parser: ElementTree.XMLPullParser[ElementTree.Element],
) -> Iterator[tuple[str, ElementTree.Element]]:
    # The other kinds of event, which carry no elements, are not asked for.
    return cast(Iterator[tuple[str, ElementTree.Element]], parser.read_events())


def _site(element: ElementTree.Element, language: str) -> WikiSite:
    fields = _children(element)
    numbers = {
        (name.text or "").replace("_", " ").lower(): int(name.get("key", "0"))
        for name in fields.get("namespaces", ())
        if name.get("key", "0").lstrip("-").isdecimal()
    }
    return WikiSite(_text(fields.get("sitename")), language.lower() or ENGLISH_WIKI.language, numbers)


def _page(element: ElementTree.Element, site: WikiSite) -> WikiPage:
    fields = _children(element)
    namespace = _text(fields.get("ns")) or "0"
    if not namespace.lstrip("-").isdecimal():
        raise ElementTree.ParseError(
            f"page {_text(fields.get('title'))!r} has the namespace {namespace!r}, expected a number"
        )
    revision = _children(fields.get("revision", ()))
    return WikiPage(
        title=_text(fields.get("title")),
        namespace=int(namespace),
        is_redirect="redirect" in fields,
        markup=_text(revision.get("text")),
        model=_text(revision.get("model")) or _model_of_format(_text(revision.get("format"))),
        site=site,
    )


def _model_of_format(format_name: str) -> str:
    return _MODELS_OF_FORMATS.get(format_name, format_name)


def _children(element: Iterable[ElementTree.Element]) -> dict[str, ElementTree.Element]:
    """Name what an element holds; of several of a name, the last."""
    return {_local_name(child): child for child in element}


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None else element.text or ""


def _local_name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]

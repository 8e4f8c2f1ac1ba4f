"""From a MediaWiki XML dump to rows: title, text, and why a page is not an article.

A dump is read page by page in constant memory, so that one of the whole Wikipedia streams.
"""

from __future__ import annotations

import bz2
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypedDict, cast
from xml.etree import ElementTree

from attention_rl_trainer.memories.articles.markup import TangledMarkupError, plain_text

BROKEN_DUMP: Final = "broken_dump"
"""Reason of the row that stands for the rest of a dump that could not be read; its title says where the break is."""

_DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:airport disambiguation|chinese title disambiguation|dab|disamb|disambig|disambiguation"
    r"|disambiguation page|disambig-\w+|genus disambiguation|geodis|hndis|hospital disambiguation|letter-ndash dab"
    r"|letter disambiguation|lettercombdisambig|mathdab|mathematical disambiguation|mil-unit-dis|numberdis"
    r"|place name disambiguation|roaddis|schooldis|school disambiguation|species latin name disambiguation"
    r"|station disambiguation|taxonomy disambiguation)\s*(?:\||\}\})",
    re.IGNORECASE,
)
_DISAMBIGUATION_TITLE = "(disambiguation)"
_LIST_TITLES = ("Index of ", "List of ", "Lists of ", "Outline of ")
_LIST_TEMPLATE = re.compile(
    r"\{\{\s*(?:set index article|sia|given name|surname|plant common name|shipindex|mountainindex)\s*(?:\||\}\})",
    re.IGNORECASE,
)
_REDIRECT = re.compile(r"\s*#redirect\b", re.IGNORECASE)

MAX_PAGE_BYTES = 2**26
"""Bytes of XML that a page, or a revision in its history, may have. Wikipedia's have 2 MiB of text at most, which is 12
MiB where each character is written as an entity."""
MAX_BLOCK_BYTES = 2**26
"""Bytes that one kibibyte of a compressed file may become: a block holds 900 kB, but of one character 46 MB."""

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


def read_wiki_pages(path: Path) -> Iterator[WikiPage]:
    """Read the pages of a dump, ``.xml`` or ``.xml.bz2``, one after the other.

    Yields:
        Each page that is there in full, also those before a break.

    Raises:
        BrokenDumpError: the file is not a MediaWiki dump, or breaks off; names the last page read.
        OSError: the file cannot be opened.
    """
    last_title, num_pages = "", 0
    with path.open("rb") as file:
        is_compressed = path.suffix.lower() == ".bz2"
        pieces = iter(partial(file.read, _COMPRESSED_PIECE_BYTES if is_compressed else _PIECE_BYTES), b"")
        try:
            for page in _parse_pages(_decompress(pieces) if is_compressed else pieces, path):
                yield page
                last_title, num_pages = page.title, num_pages + 1
        except (ElementTree.ParseError, EOFError, OSError) as error:
            where = f"after page {num_pages}, {last_title!r}" if num_pages else "before its first page"
            raise BrokenDumpError(
                f"the MediaWiki dump {str(path)!r} breaks {where}: {error}; "
                "get the file again, or compare its checksum."
            ) from error


def check_wiki_dump(path: Path) -> None:
    """Read a dump as far as its first page.

    Raises:
        BrokenDumpError: the file is not a MediaWiki dump, or breaks off before its first page, or holds none.
        OSError: the file cannot be opened.
    """
    if next(read_wiki_pages(path), None) is None:
        raise BrokenDumpError(
            f"the MediaWiki dump {str(path)!r} holds no page; get the file again, or compare its checksum."
        )


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
            yield {"title": str(error), "text": "", "skip_reason": BROKEN_DUMP}


def article_row(page: WikiPage) -> ArticleRow:
    """Turn a page into a row.

    Its ``skip_reason`` is "" for an article, else "not_an_article" (of another namespace), "redirect",
    "disambiguation", "list", "tangled_markup" (see `TangledMarkupError`) or "empty".
    """
    reason, text = _skip_reason(page), ""
    if not reason:
        try:
            text = plain_text(page.markup)
        except TangledMarkupError:
            reason = "tangled_markup"
    return {"title": page.title, "text": text, "skip_reason": reason or ("" if text else "empty")}


def _skip_reason(page: WikiPage) -> str:
    if page.namespace != 0:
        return "not_an_article"
    if page.is_redirect or _REDIRECT.match(page.markup):
        return "redirect"
    if page.title.endswith(_DISAMBIGUATION_TITLE) or _DISAMBIGUATION.search(page.markup):
        return "disambiguation"
    if page.title.startswith(_LIST_TITLES) or _LIST_TEMPLATE.search(page.markup):
        return "list"
    return ""


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
        elif event == "start" and _local_name(element) == "page":
            page = element
        elif event == "end" and _local_name(element) == "revision" and page is not None:
            # Of a page's history the last revision alone is read; nothing else is kept, however much there is.
            fields = _children(page)
            page[:] = [fields[name] for name in _PAGE_FIELDS if name in fields]
            size = 0
        elif event == "end" and _local_name(element) == "page":
            yield _page(element)
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


def _page(element: ElementTree.Element) -> WikiPage:
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
    )


def _children(element: Iterable[ElementTree.Element]) -> dict[str, ElementTree.Element]:
    """Name what an element holds; of several of a name, the last."""
    return {_local_name(child): child for child in element}


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None else element.text or ""


def _local_name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]

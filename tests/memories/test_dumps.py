"""MediaWiki dumps: their pages as rows, and what is read of a damaged one."""

from __future__ import annotations

import bz2
import contextlib
import random
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from made_up_sources import dump, numbered_dump, page, write

from attention_rl_trainer.memories.articles import dumps
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.stream import (
    ArticleStream,
)

ODD_PAGES = {
    "Redirect": ("redirect", page("Redirect", "x", extra='<redirect title="Real" />')),
    "Old redirect": ("redirect", page("Old redirect", " #redirect [[Real]]")),
    "Ada": ("disambiguation", page("Ada", "Ada may be:\n* a\n{{disambiguation|geo}}")),
    "Ada (disambiguation)": ("disambiguation", page("Ada (disambiguation)", "Ada may be")),
    "Aa": ("disambiguation", page("Aa", "rivers\n{{ Geodis }}")),
    "List of lists": ("list", page("List of lists", "* a")),
    "Smith": ("list", page("Smith", "* John\n{{surname}}")),
    "Talk:Real": ("not_an_article", page("Talk:Real", "hello", namespace=1)),
    "Tangle": ("tangled_markup", page("Tangle", "{{a|" * 3000)),
    "Bare": ("empty", page("Bare", "{{stub}}\n{{disambiguation needed}}")),
    "Real": ("", page("Real", "A page about {{disambiguation needed}} ''real'' things & <small>more</small>.")),
}


def test_pages_that_are_not_articles_are_rows_with_a_reason_and_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.xml", dump(*(markup for _, markup in ODD_PAGES.values())))
    rows = list(dumps.article_rows((str(path),)))
    assert {row["title"]: row["skip_reason"] for row in rows} == {t: reason for t, (reason, _) in ODD_PAGES.items()}
    assert [row["text"] for row in rows if row["text"]] == ["A page about real things & more."]


def test_the_latest_of_several_revisions_is_read(tmp_path: Path) -> None:
    history = page("T", "old").replace("</page>", "<revision><text>new</text></revision></page>")
    path = write(tmp_path / "history.xml", dump(history))
    assert [p.markup for p in dumps.read_wiki_pages(path)] == ["new"]


def test_a_page_without_namespace_or_text_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "bare.xml", dump("<page><title>T</title><revision><text /></revision></page>"))
    assert list(dumps.read_wiki_pages(path)) == [dumps.WikiPage("T", 0, False, "")]


def test_a_page_without_an_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumps, "MAX_PAGE_BYTES", 300_000)
    texts = ["a" * 250_000, "b" * 250_000, "c" * 600_000]
    path = write(tmp_path / "large.xml", dump(*(page(text[0], text) for text in texts)))
    rows = list(dumps.article_rows((str(path),)))
    assert [row["skip_reason"] for row in rows] == ["", "", "broken_dump"]
    assert re.search(r"breaks after page 2, 'b': a page has more than 300,000 bytes", rows[-1]["title"])


def test_a_long_history_is_not_a_long_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumps, "MAX_PAGE_BYTES", 300_000)
    revisions = "".join(f"<revision><text>{number} {'a' * 100_000}</text></revision>" for number in range(30))
    history = page("T", "first").replace("</page>", f"{revisions}</page>")
    path = write(tmp_path / "history.xml", dump(history, page("U", "next")))
    pages = list(dumps.read_wiki_pages(path))
    assert [(item.title, item.markup[:5]) for item in pages] == [("T", "29 aa"), ("U", "next")]


@pytest.mark.parametrize(
    "content", ["<x>{}</x><revision /> ".format("a" * 50_000) * 40, "<x />" * 40_000 + "<revision />" * 2_000]
)
def test_what_is_between_revisions_is_not_kept(content: str, tmp_path: Path) -> None:
    path = write(tmp_path / "odd.xml", dump(page("T", "old").replace("</page>", f"{content}</page>")))
    start = time.process_time()
    tracemalloc.start()
    (found,) = dumps.read_wiki_pages(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.title, found.markup) == ("T", "")
    assert peak < 30_000_000
    assert time.process_time() - start < 10


def test_a_few_bytes_that_become_gigabytes_are_refused(tmp_path: Path) -> None:
    """Forty bytes are a block of 46 MB of one character."""
    head, tail = numbered_dump(2).split("<page><title>T1<")
    zeros = bz2.compress(b"x" * 400_000_000)
    assert len(zeros) < 1024
    path = tmp_path / "bomb.xml.bz2"
    path.write_bytes(bz2.compress(head.encode()) + bz2.compress(b"<page><title>") + zeros + bz2.compress(tail.encode()))
    tracemalloc.start()
    rows = list(dumps.article_rows((str(path),)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row["skip_reason"] for row in rows] == ["", "broken_dump"]
    assert "bytes decompress to more than 67,108,864" in rows[-1]["title"]
    assert peak < 4 * dumps.MAX_BLOCK_BYTES


def truncated_xml(folder: Path) -> Path:
    whole = numbered_dump(400)
    return write(folder / "cut.xml", whole[: whole.index("page 300") + 3])


def truncated_bz2(folder: Path) -> Path:
    path = folder / "cut.xml.bz2"
    # Blocks of a bz2 file are read whole: two streams, the second one cut.
    first, second = numbered_dump(400).split("<page><title>T300<")
    path.write_bytes(bz2.compress(first.encode()) + bz2.compress(f"<page><title>T300<{second}".encode())[:-30])
    return path


def damaged_bz2(folder: Path) -> Path:
    path = truncated_bz2(folder)
    content = bytearray(path.read_bytes())
    middle = len(content) - 100
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(bytes(content))
    return path


BREAKS = [truncated_xml, truncated_bz2, damaged_bz2]


@pytest.fixture(scope="module")
def pages_in_blocks() -> tuple[bytes, list[str]]:
    """A dump in one bz2 stream of 23 blocks, and the markup of its pages."""
    source = random.Random(1)
    words = ["the", "river", "flows", "from", "a", "mountain", "lake", "to", "northern", "sea", "its", "valley", "was"]
    markup = [" ".join(source.choice(words) for _ in range(120)) for _ in range(3000)]
    pages = (page(f"T{number}", text) for number, text in enumerate(markup))
    return bz2.compress(dump(*pages).encode(), compresslevel=1), markup


def block_starts(content: bytes) -> list[int]:
    """Find the bits at which the blocks of a bz2 file begin, by the number that each begins with."""
    bits = f"{int.from_bytes(content, 'big'):0{8 * len(content)}b}"
    return [found.start() for found in re.finditer(f"{0x314159265359:048b}", bits)]


# A block begins with its number (48 bits), its checksum (32), a flag, and the place (24) of its first byte: with
# another place the block is rotated, and holds whole pages that no other check could tell from the true ones.
@pytest.mark.parametrize("bit_of_block", [5, 60, 95, 97, 99, 101, 103, 1000, 30_000])
@pytest.mark.parametrize("block", [2, 12])
def test_nothing_of_a_block_with_one_wrong_bit_is_read(
    block: int, bit_of_block: int, pages_in_blocks: tuple[bytes, list[str]], tmp_path: Path
) -> None:
    intact, markup = pages_in_blocks
    starts = block_starts(intact)
    assert len(starts) == 23
    content = bytearray(intact)
    byte, bit = divmod(starts[block] + bit_of_block, 8)
    content[byte] ^= 0x80 >> bit
    path = tmp_path / "flipped.xml.bz2"
    path.write_bytes(content)
    read = []
    with pytest.raises(dumps.BrokenDumpError, match=r"breaks after page \d+, 'T\d+': Invalid data stream"):
        read.extend(wiki_page.markup for wiki_page in dumps.read_wiki_pages(path))
    assert read == markup[: len(read)]
    # The blocks before it are read, of about 132 pages each; but one less where the damage is found within its first
    # kilobyte, in the same piece of the file as the end of the block before.
    assert len(read) > 120 * (block - (bit_of_block < 8 * 1024))


def test_every_block_before_the_end_of_a_cut_dump_is_read(
    pages_in_blocks: tuple[bytes, list[str]], tmp_path: Path
) -> None:
    intact, markup = pages_in_blocks
    path = tmp_path / "cut.xml.bz2"
    path.write_bytes(intact[: len(intact) // 2])
    read = []
    with pytest.raises(
        dumps.BrokenDumpError, match=r"'T\d+': the compressed file ends before its end-of-stream marker"
    ):
        read.extend(wiki_page.markup for wiki_page in dumps.read_wiki_pages(path))
    assert read == markup[: len(read)]
    assert len(read) > 1500 - 2 * 140


def test_a_stream_whose_first_bytes_are_damaged_is_not_taken_for_the_end(tmp_path: Path) -> None:
    whole = numbered_dump(300)
    cut = whole.index("<page><title>T200<")
    second = bytearray(bz2.compress(whole[cut:].encode()))
    second[0] ^= 1
    path = tmp_path / "header.xml.bz2"
    path.write_bytes(bz2.compress(whole[:cut].encode()) + second)
    with pytest.raises(dumps.BrokenDumpError, match="breaks after page 200, 'T199': Invalid data stream"):
        list(dumps.read_wiki_pages(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("<title>T7</title><ns>0<", "<title>T7</title><ns>zero<"), "page 'T7' has the namespace 'zero', expected a"),
        (("page 7.", "page \x00 7."), "not well-formed"),
        (("page 7.", "page &never; 7."), "undefined entity"),
        (('</title><ns>0</ns><id>1</id><revision><id>2</id><text xml:space="preserve">The text of page 7', ""), "mism"),
    ],
)
def test_damaged_xml_is_a_break_after_the_page_before_it(damage: tuple[str, str], message: str, tmp_path: Path) -> None:
    whole = numbered_dump(20)
    assert damage[0] in whole
    path = write(tmp_path / "damaged.xml", whole.replace(*damage))
    with pytest.raises(dumps.BrokenDumpError, match=f"breaks after page 7, 'T6': .*{message}"):
        list(dumps.read_wiki_pages(path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_break_of_a_dump_is_counted_in_every_epoch(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = truncated_xml(tmp_path)
    with contextlib.nullcontext() if streaming else pytest.warns(UserWarning, match="Articles are missing"):
        table = load_articles(str(path), streaming=streaming)
    stream = ArticleStream(table, source="cut", seed=7, num_epochs=3)
    assert Counter(item.position.epoch for item in stream) == {0: 300, 1: 300, 2: 300}
    assert stream.skipped == {"broken_dump": 3}
    assert caplog.text.count("breaks after page 300, 'T299'") == (3 if streaming else 1)


@pytest.mark.parametrize("make", BREAKS)
def test_the_pages_before_a_break_are_read_and_the_break_is_named(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    titles = []
    with pytest.raises(dumps.BrokenDumpError, match=r"breaks after page \d+, 'T\d+'") as raised:
        titles.extend(page.title for page in dumps.read_wiki_pages(path))
    num_pages = int(re.search(r"after page (\d+)", str(raised.value))[1])
    assert str(path) in str(raised.value)
    assert 200 < num_pages <= 300


@pytest.mark.parametrize("make", BREAKS)
def test_a_break_is_a_counted_row_and_is_named_in_every_run(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"Articles are missing: .*breaks after page \d+, 'T\d+'"):
            table = load_articles(str(path))
    stream = ArticleStream(table, source="cut", seed=0, num_epochs=1)
    assert len(list(stream)) == len(table) - 1 > 200
    assert stream.skipped == {"broken_dump": 1}


def test_a_break_of_a_streamed_dump_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = list(load_articles(str(truncated_xml(tmp_path)), streaming=True))
    assert rows[-1]["skip_reason"] == "broken_dump"
    assert "breaks after page 300, 'T299'" in caplog.text


def test_a_dump_that_breaks_before_its_first_page_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.xml", dump(page("T", "text"))[:150])
    with pytest.raises(dumps.BrokenDumpError, match="breaks before its first page"):
        load_articles(str(path))


def test_a_dump_without_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(dumps.BrokenDumpError, match="holds no page; get the file again"):
        load_articles(str(write(tmp_path / "none.xml", dump())))


def test_other_xml_is_refused_by_its_root(tmp_path: Path) -> None:
    path = write(tmp_path / "feed.xml", "<rss><channel/></rss>")
    with pytest.raises(
        dumps.BrokenDumpError, match="is XML, but not a MediaWiki dump: its root element is <rss>, expected <mediawiki>"
    ):
        load_articles(str(path))


def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.xml.bz2"
    path.write_text(numbered_dump(1))
    with pytest.raises(dumps.BrokenDumpError, match="Invalid data stream"):
        load_articles(str(path))

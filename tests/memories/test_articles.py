"""Sources of articles: markup to text, dumps to rows, names to data sets, and the resumable stream over them."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import logging
import random
import re
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from xml.sax.saxutils import escape

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_rl_trainer import hub
from attention_rl_trainer.memories.articles import dumps, sources
from attention_rl_trainer.memories.articles.markup import plain_text
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.stream import Article, ArticleStream, PositionedArticle, iter_wikipedia_articles
from attention_rl_trainer.types import StreamPosition

HANDWRITTEN_PAGE = Path(__file__).parent / "data" / "handwritten_page.wiki"
PROSE = "This sentence is long enough, with its many words, to be prose and not one more entry of a list. " * 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No prepared data set of another test, or of the user, is found."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.forget_hub_answer()
    yield tmp_path / "datasets_cache"
    hub.forget_hub_answer()


# Markup


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Anarchism''' is a ''political'' [[philosophy]].", "Anarchism is a political philosophy."),
        ("A [[Category theory|category]] and [[dog]]s.", "A category and dogs."),
        ("Text.{{infobox|a={{nested|b={{deeper}}}}|c=[[d]]}} More.", "Text. More."),
        ("Before\n{| class=wikitable\n|-\n! Head\n|-\n| cell || cell\n|}\nAfter", "Before\n\nAfter"),
        ("Outer {|\n| in {|\n| deep\n|}\n|}\nleft.", "Outer\n\nleft."),
        ("Fact.<ref name=a>{{cite web|url=x}}</ref><ref name=a /> More.", "Fact. More."),
        ("[[File:A.jpg|thumb|A [[link]] and ''style'']]Prose.", "Prose."),
        ("[[image:A.jpg|thumb|caption]]Prose.[[Category:Things]] [[de:Ding]]", "Prose."),
        ("See [[:Category:Things]] and [[wikt:word|word]].", "See Category:Things and word."),
        ("Area <math>x^2 {y}</math> is <!-- hidden -->known.", "Area is known."),
        ("<gallery>\nFile:A.jpg|A\n</gallery>\nProse. __NOTOC__", "Prose."),
        ("Its [http://a.example site], [http://b.example] and http://c.example end.", "Its site, and end."),
        ("A name (; {{IPA|x}}, born 1809) and ({{lang-xx}}) ends ({{a}}; ).", "A name (born 1809) and ends."),
        ("Caf&eacute;&nbsp;bar &ndash; open", "Café bar – open"),
        ("one\n\n\n\n\ntwo", "one\n\ntwo"),
        ("H<sub>2</sub>O is 10<sup>6</sup> and 3<sup>rd</sup>", "H2O is 10^6 and 3rd"),
        ("* one\n* two\n# three\n: four\n; term : its meaning", "one\ntwo\nthree\nfour\nterm its meaning"),
        ("A<br/>B<br>C", "A\nB\nC"),
        ("<nowiki>[[kept]] ''as'' is</nowiki>", "kept as is"),
        ("Broken {{template without an end\nnext line", "Broken\nnext line"),
        ("Broken [[File:A.svg|thumb|no end\nnext line", "Broken\nnext line"),
        ("Broken [[link and ''style\n|-\n| row\nlast</ref>", "Broken link and style\n\nlast"),
        ("Wait ... what", "Wait ... what"),
        ("'''A''''s and ''L'Étranger'' and '''''both''''',", "A's and L'Étranger and both,"),
        ("* {{cite|x}}, vol. 3\n: <math>x</math>;", "vol. 3"),
        ("<sup>14</sup>C", "14C"),
        ("<!-- == Not a heading ==\n{{ -->Text.<!-- no end", "Text."),
        ("", ""),
        ("{{stub}}\n[[Category:A]]", ""),
    ],
)
def test_markup_becomes_the_text_a_reader_sees(markup: str, text: str) -> None:
    assert plain_text(markup) == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{convert|5|km|mi}}", "5 km"),
        ("{{convert|5|to|6|km|mi|abbr=on}}", "5 to 6 km"),
        ("{{cvt|5|-|6|kg}}", "5–6 kg"),
        ("{{lang|fr|une ''maison''}}", "une maison"),
        ("{{lang-de|Haus}}", "Haus"),
        ("{{Nowrap|[[a|b]] c}}", "b c"),
        ("a{{ndash}}b", "a–b"),
        ("it{{'s}}", "it's"),
        ("{{frac|1|2}} {{frac|3|1|2}} {{frac|4}}", "1/2 3 1/2 1/4"),
        ("{{val|1.5|e=6|u=m}} {{val|7}}", "1.5 × 10^6 m 7"),
        ("{{As of|2015|3}}", "As of 2015-03"),
        ("{{start_date|1969|7|16}}", "1969-07-16"),
        ("{{circa|1900}}", "c. 1900"),
        ("{{USS|Hornet|CV-12}}", "USS Hornet"),
        ("{{ship|HMS|Beagle||2}}", "HMS Beagle"),
        ("{{chem|H|2|O}}", "H2O"),
        ("10{{sup|6}}", "10^6"),
        ("{{quote|text=Veni.}}", "Veni."),
        ("{{math|x}} {{unknown|x}}.", "x."),
    ],
)
def test_a_template_that_stands_for_words_is_replaced_by_them(template: str, words: str) -> None:
    assert plain_text(template) == words


def test_headings_are_lines_and_go_with_an_empty_section() -> None:
    markup = "Lead.\n== Filled ==\nText.\n=== Empty ===\n{{table}}\n== Also ''empty'' ==\n=== Below ===\n[[File:x.png]]"
    assert plain_text(markup) == "Lead.\n\nFilled\n\nText."


def test_a_heading_over_a_filled_subsection_stays() -> None:
    assert plain_text("== Above ==\n=== Below ===\nText.") == "Above\n\nBelow\n\nText."


@pytest.mark.parametrize(
    "unclosed", ["''italics", "'''bold", "{|\n| cell", "<ref>note", "{{template", "[[link", "<div>"]
)
def test_what_is_not_closed_ends_with_its_section(unclosed: str) -> None:
    markup = f"Lead.\n\n{unclosed}\n== History ==\nText.\n{{|\n| cell\n|}}\n== References ==\n* Roe.\n"
    assert plain_text(markup).endswith("\n\nHistory\n\nText.")


def test_an_apparatus_is_left_out_with_its_subsections() -> None:
    markup = "Lead.\n== References ==\n{{reflist}}\n* Doe, ''Book''.\n=== Sources ===\n* Roe.\n== History ==\nText."
    assert plain_text(markup) == "Lead.\n\nHistory\n\nText."


@pytest.mark.parametrize("title", ["See also", "External links", "Further reading", "Notes and references", "NOTES:"])
def test_the_apparatus_is_known_by_its_title(title: str) -> None:
    assert plain_text(f"Lead.\n== {title} ==\n* [[a]]") == "Lead."


def test_an_apparatus_with_prose_stays_but_not_for_a_long_list_item() -> None:
    assert plain_text(f"Lead.\n== Sources ==\n{PROSE}").startswith("Lead.\n\nSources\n\nThis sentence")
    assert plain_text(f"Lead.\n== Sources ==\n* {PROSE}") == "Lead."


def test_a_handwritten_page_reads_as_an_article() -> None:
    markup = HANDWRITTEN_PAGE.read_text(encoding="utf-8")
    expected = HANDWRITTEN_PAGE.with_suffix(".txt").read_text(encoding="utf-8")
    assert plain_text(markup) == expected.rstrip("\n")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["{{", "}}", "[[", "]]", "|", "==", "\n", "{|", "|}", "|-", "''", "<ref>", "</ref>", "<br>", "(", ")", ";",
             "word", " ", "File:", "http://a.example", "* ", "&amp;", "<!--", "-->", "<nowiki>", "\ue000"]
        ),
        max_size=30,
    )
)  # fmt: skip
def test_no_markup_however_broken_leaves_its_clutter(pieces: list[str]) -> None:
    text = plain_text("".join(pieces))
    for clutter in ("{{", "}}", "[[", "]]", "{|", "\n\n\n", "()", "\ue000", "''"):
        assert clutter not in text
    assert text == text.strip()


@pytest.mark.parametrize("unit", ["\n", " \n", " ,", " ", "x", "(", "'", "{|", "|", "\u202e", "<!--"])
def test_a_page_of_one_thing_repeated_takes_no_longer_than_its_length_asks_for(unit: str) -> None:
    def seconds(num_characters: int) -> float:
        start = time.process_time()
        plain_text(unit * (num_characters // len(unit)))
        return time.process_time() - start

    # Time in proportion to the square would be 256 times as long.
    assert seconds(320_000) < 64 * max(seconds(20_000), 0.01)


# Dumps


def page(title: str, text: str, namespace: int = 0, extra: str = "") -> str:
    return (
        f"<page><title>{escape(title)}</title><ns>{namespace}</ns><id>1</id>{extra}<revision><id>2</id>"
        f'<text xml:space="preserve">{escape(text)}</text></revision></page>'
    )


def dump(*pages: str) -> str:
    head = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo><sitename>T</sitename></siteinfo>'
    return f"{head}{''.join(pages)}</mediawiki>"


def numbered_dump(num_pages: int) -> str:
    return dump(*(page(f"T{i}", f"The text of page {i}.") for i in range(num_pages)))


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = {".bz2": bz2.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return path


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


def test_pages_that_are_no_articles_are_rows_with_a_reason_and_no_text(tmp_path: Path) -> None:
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


def test_a_long_history_is_no_long_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dumps, "MAX_PAGE_BYTES", 300_000)
    revisions = "".join(f"<revision><text>{number} {'a' * 100_000}</text></revision>" for number in range(30))
    history = page("T", "first").replace("</page>", f"{revisions}</page>")
    path = write(tmp_path / "history.xml", dump(history, page("U", "next")))
    pages = list(dumps.read_wiki_pages(path))
    assert [(item.title, item.markup[:5]) for item in pages] == [("T", "29 aa"), ("U", "next")]


@pytest.mark.parametrize(
    "content", ["<x>{}</x><revision /> ".format("a" * 50_000) * 40, "<x />" * 40_000 + "<revision />" * 2_000]
)
def test_what_stands_between_revisions_is_not_kept(content: str, tmp_path: Path) -> None:
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
    stream = stream_of(table, num_epochs=3)
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
    with pytest.raises(dumps.BrokenDumpError, match="holds no page"):
        load_articles(str(write(tmp_path / "none.xml", dump())))


def test_other_xml_is_refused_by_its_root(tmp_path: Path) -> None:
    path = write(tmp_path / "feed.xml", "<rss><channel/></rss>")
    with pytest.raises(dumps.BrokenDumpError, match="its root element is <rss>, expected <mediawiki>"):
        load_articles(str(path))


def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.xml.bz2"
    path.write_text(numbered_dump(1))
    with pytest.raises(dumps.BrokenDumpError, match="Invalid data stream"):
        load_articles(str(path))


# Sources

ROWS = [{"title": f"T{i}", "text": f"The text of page {i}."} for i in range(30)]


def as_json_lines(path: Path, rows: Sequence[dict[str, str]] = ROWS) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: as_json_lines(folder / "a.jsonl"),
        lambda folder: as_json_lines(folder / "a.JSON"),
        lambda folder: as_json_lines(folder / "a.jsonl.gz"),
        lambda folder: as_parquet(folder / "a.parquet"),
        lambda folder: as_parquet(folder / "set" / "train-00000-of-00001.parquet").parent,
        lambda folder: as_json_lines(folder / "set" / "part.jsonl").parent,
        lambda folder: write(folder / "a.xml", numbered_dump(30)),
        lambda folder: write(folder / "set" / "part1.xml.bz2", numbered_dump(30)).parent,
    ],
    ids=["jsonl", "json", "jsonl.gz", "parquet", "parquet folder", "jsonl folder", "xml", "bz2 folder"],
)
def test_every_format_gives_the_same_rows(make: Callable[[Path], Path], streaming: bool | None, tmp_path: Path) -> None:
    path = str(make(tmp_path))
    table = load_articles(path, streaming=streaming)
    assert table.info.dataset_name == path
    assert isinstance(table, datasets.IterableDataset if streaming else datasets.Dataset)
    assert [{"title": row["title"], "text": row["text"]} for row in table] == ROWS


def test_a_text_file_is_one_article_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "test of time.txt", "First line.\n\nSecond line.")
    write(tmp_path / "texts" / "apple.txt", "An apple.")
    write(tmp_path / "texts" / ".hidden.txt", "Not this one.")
    table = load_articles(str(tmp_path / "texts"))
    assert [row["text"] for row in table] == ["An apple.", "First line.\n\nSecond line."]
    assert [row["text"] for row in load_articles(str(tmp_path / "texts" / "apple.txt"))] == ["An apple."]


def test_a_split_can_be_a_sub_folder_or_a_part(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "train" / "a.txt", "A.")
    write(tmp_path / "texts" / "test" / "b.txt", "B.")
    assert [row["text"] for row in load_articles(str(tmp_path / "texts"), split="test")] == ["B."]
    assert len(load_articles(str(as_json_lines(tmp_path / "a.jsonl")), split="train[:10]")) == 10


def test_a_folder_of_dumps_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "dumps" / "b.xml", dump(page("B", "Text.")))
    write(tmp_path / "dumps" / "a.xml.bz2", dump(page("A", "Text.")))
    assert load_articles(str(tmp_path / "dumps"))["title"][:] == ["A", "B"]


def test_a_prepared_dump_is_used_again_until_the_file_changes(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path / "a.xml", numbered_dump(3))
    first = load_articles(str(path)).cache_files
    assert load_articles(str(path)).cache_files == first
    assert first[0]["filename"].startswith(str(own_cache))
    write(path, numbered_dump(4))
    assert len(load_articles(str(path))) == 4


def test_a_prepared_dump_is_read_again_when_the_rules_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.xml", numbered_dump(3))
    first = load_articles(str(path)).cache_files
    monkeypatch.setattr(sources.inspect, "getsource", lambda module: "other rules")
    assert load_articles(str(path)).cache_files != first


def test_a_large_dump_streams_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write(tmp_path / "a.xml", numbered_dump(3)))
    monkeypatch.setattr(sources, "MAX_CACHED_DUMP_BYTES", 10)
    assert isinstance(load_articles(path), datasets.IterableDataset)
    assert isinstance(load_articles(path, streaming=False), datasets.Dataset)


@pytest.mark.parametrize(
    ("split", "rows"), [("train[:3]", range(3)), ("train[7:]", range(7, 10)), ("train[20%:50%]", range(2, 5))]
)
def test_a_slice_of_a_dump(tmp_path: Path, split: str, rows: range) -> None:
    dump = str(write(tmp_path / "a.xml", numbered_dump(10)))
    whole = load_articles(dump)["title"]
    assert list(load_articles(dump, split=split)["title"]) == [whole[row] for row in rows]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "has one split, 'train', of which a slice can be taken; got 'test'"),
        ("train[:1]+train[2:]", "of which a slice can be taken"),
        ("train[", "'train\\[' cannot be read: Unrecognized"),
        ("train[:200%]", "cannot be read: Percent slice"),
        ("train[3:]", "is empty: the source has 3 rows"),
    ],
)
def test_a_split_that_a_dump_has_not(tmp_path: Path, split: str, message: str) -> None:
    dump = str(write(tmp_path / "a.xml", numbered_dump(3)))
    with pytest.raises(ValueError, match=message):
        load_articles(dump, split=split)


def test_a_streamed_dump_cannot_be_sliced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a streamed file cannot give; leave streaming out"):
        load_articles(str(write(tmp_path / "a.xml", numbered_dump(3))), split="train[:2]", streaming=True)


@pytest.mark.parametrize("name", ["offline", "a.jsonl", "a.xml", "texts"])
def test_a_source_without_configurations_takes_none(name: str, tmp_path: Path) -> None:
    as_json_lines(tmp_path / "a.jsonl")
    write(tmp_path / "a.xml", numbered_dump(1))
    write(tmp_path / "texts" / "a.txt", "A.")
    source = name if name == "offline" else str(tmp_path / name)
    with pytest.raises(ValueError, match=r"has no configurations; got config_name='20231101\.en'"):
        load_articles(source, "20231101.en")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder", "a/b/c", "missing.xml.bz2"])
def test_a_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"There is no file or folder '{re.escape(name)}'.*'offline'"):
        load_articles(name)


@pytest.mark.parametrize("name", ["a.csv", "a.docx", "noending", "a.parquet.gz", "a.xml.7z"])
def test_an_unknown_format_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, "x")
    with pytest.raises(ValueError, match=r"is of no known format; known are Parquet.*JSON Lines.*text.*MediaWiki"):
        load_articles(str(path))


def test_a_folder_without_articles_or_with_several_formats_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set" / "image.png", "x")
    write(tmp_path / "set" / "dataset_info.json", "{}")
    with pytest.raises(ValueError, match="holds no file of a known format"):
        load_articles(str(tmp_path / "set"))
    write(tmp_path / "set" / "a.txt", "x")
    as_json_lines(tmp_path / "set" / "b.jsonl")
    with pytest.raises(ValueError, match=r"mixes formats \(1 of json, 1 of text\)"):
        load_articles(str(tmp_path / "set"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_text_column_lists_those_that_are_there(streaming: bool, tmp_path: Path) -> None:
    path = as_json_lines(tmp_path / "a.jsonl", [{"title": "T", "body": "B"}])
    with pytest.raises(ValueError, match=r"no column 'text'; its columns are 'title', 'body'.*dataset_text_column"):
        load_articles(str(path), streaming=streaming)
    assert next(iter(load_articles(str(path), streaming=streaming, text_column="body")))["body"] == "B"


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = as_parquet(tmp_path / "set" / "train.parquet").parent
    with pytest.raises(ValueError, match="Unknown split"):
        load_articles(str(folder), split="nonsense")


@pytest.mark.parametrize("name", ["scripted/scripted.py", "scripted"])
def test_a_local_script_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "scripted" / "scripted.py", "import datasets")
    with pytest.raises(ValueError, match=r"is made by a Python script.*can no longer be loaded"):
        load_articles(str(tmp_path / name))


def test_without_gensims_wheel_the_offline_source_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "attention-rl-trainer\[offline\]"'):
        load_articles("offline")


# The Hub


@pytest.mark.parametrize("name", ["wikimedia/wikipedia", "someone/articles", "squad"])
def test_offline_a_hub_data_set_is_refused_at_once_with_the_way_out(name: str) -> None:
    with pytest.raises(hub.HubUnreachableError, match=r"unset HF_HUB_OFFLINE.*--dataset_name offline.*local file"):
        load_articles(name)


@pytest.mark.enable_socket
def test_without_a_network_a_hub_data_set_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    with pytest.raises(hub.HubUnreachableError, match=r"ConnectError.*--dataset_name offline"):
        load_articles("wikimedia/wikipedia")


@pytest.mark.parametrize("config_name", [None, "20220301.en", "20220301.simple"])
def test_the_old_wikipedia_is_replaced_with_a_warning(config_name: str | None) -> None:
    with (
        pytest.warns(UserWarning, match=r"scripts can no longer be loaded; 'wikimedia/wikipedia', '20231101.en' is"),
        pytest.raises(hub.HubUnreachableError, match="'wikimedia/wikipedia'"),
    ):
        load_articles("wikipedia", config_name)


@pytest.fixture
def prepared_hub_set(tmp_path: Path, own_cache: Path) -> None:
    """What `datasets` leaves in its cache after `someone/Tiny-Set` was loaded from the Hub."""
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(as_parquet(tmp_path / "a.parquet"))})
    builder.download_and_prepare()
    source = Path(builder.cache_dir)
    target = own_cache / "someone___tiny-set" / "default" / "0.0.0" / "0123abcd"
    target.mkdir(parents=True)
    info = json.loads((source / "dataset_info.json").read_text())
    info.update(dataset_name="tiny-set", config_name="default")
    info["splits"]["train"]["dataset_name"] = "tiny-set"
    (target / "dataset_info.json").write_text(json.dumps(info))
    (source / "parquet-train.arrow").rename(target / "tiny-set-train.arrow")


@pytest.mark.usefixtures("prepared_hub_set")
@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("config_name", [None, "default"])
def test_a_hub_data_set_in_the_cache_needs_no_hub(
    streaming: bool | None, config_name: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        table = load_articles("someone/Tiny-Set", config_name, streaming=streaming)
    assert [row["title"] for row in table] == [row["title"] for row in ROWS]
    assert "'someone/Tiny-Set' is read from the local cache" in caplog.text


@pytest.mark.usefixtures("prepared_hub_set")
def test_another_configuration_of_a_cached_data_set_is_not_cached() -> None:
    with pytest.raises(hub.HubUnreachableError):
        load_articles("someone/Tiny-Set", "other")


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the Hub does for one data set made by a script, and for no other."""

    def do_HEAD(self) -> None:
        known = re.fullmatch(r"/datasets/someone/scripted/resolve/\w+/(README\.md|scripted\.py)", self.path)
        self.send_response(200 if known or self.path == "/" else 404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"abc"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture
def small_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


@pytest.mark.enable_socket
@pytest.mark.usefixtures("small_hub")
def test_a_script_on_the_hub_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'someone/scripted' is made by a Python script"):
        load_articles("someone/scripted")


@pytest.mark.enable_socket
@pytest.mark.usefixtures("small_hub")
def test_a_data_set_the_hub_does_not_have_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no local file or folder 'someone/nothing', and: .*doesn't exist"):
        load_articles("someone/nothing")


# The stream


def stream_of(dataset: object, **options: object) -> ArticleStream:
    return ArticleStream(dataset, **{"source": "rows", "seed": 7, "shuffle_buffer_size": 8, **options})


def streamed() -> datasets.IterableDataset:
    return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)


KINDS = {
    "list": lambda: ROWS,
    "articles": lambda: [Article(row["title"], row["text"], "mine") for row in ROWS],
    "map": lambda: datasets.Dataset.from_list(ROWS),
    "streamed": streamed,
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def titles(items: Sequence[PositionedArticle]) -> list[str]:
    return [item.article.title for item in items]


@every_kind
def test_an_epoch_holds_every_article_once_and_the_next_one_in_another_order(make: Callable[[], object]) -> None:
    items = list(islice(stream_of(make()), 90))
    epochs = [titles(items[start : start + 30]) for start in (0, 30, 60)]
    assert all(sorted(epoch) == sorted(row["title"] for row in ROWS) for epoch in epochs)
    in_order = [row["title"] for row in ROWS]
    assert len({tuple(order) for order in [*epochs, in_order]}) == 4
    assert [item.position for item in items] == [StreamPosition(i // 30, i % 30) for i in range(90)]
    assert all(item.next_position == StreamPosition(i // 30, i % 30 + 1) for i, item in enumerate(items))


@every_kind
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_resumed_at_any_place_continues_identically(make: Callable[[], object], shuffle: bool) -> None:
    whole = list(stream_of(make(), num_epochs=2, shuffle=shuffle))
    for taken in (1, 13, 29, 30, 31, 59):
        saved = json.loads(json.dumps(whole[taken - 1].next_position.to_dict()))
        resumed = stream_of(make(), num_epochs=2, shuffle=shuffle, position=StreamPosition.from_dict(saved))
        assert list(resumed) == whole[taken:]


@every_kind
def test_a_stream_starts_again_where_it_started(make: Callable[[], object]) -> None:
    stream = stream_of(make(), position=StreamPosition(1, 5))
    assert list(islice(stream, 40)) == list(islice(stream, 40))


@every_kind
def test_without_shuffling_every_epoch_has_the_order_of_the_source(make: Callable[[], object]) -> None:
    items = list(stream_of(make(), shuffle=False, num_epochs=2))
    assert titles(items) == [row["title"] for row in ROWS] * 2
    assert [item.row for item in items] == list(range(30)) * 2


def test_another_seed_is_another_order() -> None:
    orders = {tuple(titles(list(stream_of(ROWS, seed=seed, num_epochs=1)))) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("kind", ["list", "map"])
def test_the_row_of_an_article_is_the_same_in_every_epoch(kind: str) -> None:
    for item in stream_of(KINDS[kind](), num_epochs=3):
        assert item.article.title == ROWS[item.row]["title"]


@every_kind
@pytest.mark.parametrize("num_processes", [2, 7])
def test_the_shares_of_processes_are_disjoint_and_complete(make: Callable[[], object], num_processes: int) -> None:
    whole = {item.position: item for item in stream_of(make(), num_epochs=2)}
    shares = [
        list(stream_of(make(), num_epochs=2, process_index=process, num_processes=num_processes))
        for process in range(num_processes)
    ]
    assert sum(map(len, shares)) == len(whole)
    assert {item.position: item for share in shares for item in share} == whole


@every_kind
def test_a_process_resumes_its_own_share(make: Callable[[], object]) -> None:
    options = {"num_epochs": 2, "process_index": 1, "num_processes": 4}
    whole = list(stream_of(make(), **options))
    assert whole[3].position.index % 4 == 1
    for taken in (1, 5, 8, 9):
        assert list(stream_of(make(), position=whole[taken - 1].next_position, **options)) == whole[taken:]


def test_all_processes_may_resume_from_one_common_position() -> None:
    whole = stream_of(ROWS, num_epochs=1)
    expected = [item.position for item in whole][12:]
    resumed = [
        item.position
        for process in range(4)
        for item in stream_of(
            ROWS, num_epochs=1, process_index=process, num_processes=4, position=StreamPosition(0, 12)
        )
    ]
    assert sorted(resumed, key=lambda position: position.index) == expected


def test_rows_that_are_no_articles_are_passed_over_and_counted() -> None:
    rows = [
        {"title": "A", "text": "a", "skip_reason": ""},
        {"title": "B", "text": "", "skip_reason": "redirect"},
        {"title": "C", "text": None, "skip_reason": ""},
        {"title": "D", "text": " \n", "skip_reason": ""},
        {"title": "E", "text": "", "skip_reason": "redirect"},
        {"title": None, "text": "f", "skip_reason": None},
    ]
    stream = stream_of(rows, shuffle=False, num_epochs=2)
    items = list(stream)
    assert titles(items) == ["A", "article 5"] * 2
    assert [item.position.index for item in items] == [0, 5, 0, 5]
    assert stream.skipped == Counter(redirect=4, not_a_string=2, empty=2)


def test_articles_without_a_title_are_numbered_and_columns_can_be_chosen() -> None:
    items = list(stream_of([{"text": "a"}, {"text": "b"}], shuffle=False, num_epochs=1))
    assert titles(items) == ["article 0", "article 1"]
    rows = [{"name": "N", "body": "b"}]
    (item,) = stream_of(rows, text_column="body", title_column="name", num_epochs=1)
    assert item.article == Article("N", "b", "rows")


def test_articles_of_the_user_keep_their_source() -> None:
    (item,) = stream_of([Article("T", "text", "mine")], num_epochs=1)
    assert item.article.source == "mine"
    stream = stream_of([Article("T", " ", "mine"), Article("U", "text", "mine")], num_epochs=1)
    assert titles(list(stream)) == ["U"]
    assert stream.skipped == {"empty": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_without_an_article_is_an_error_with_the_counts(streaming: bool) -> None:
    rows = datasets.Dataset.from_list([{"text": "", "skip_reason": reason} for reason in ("list", "redirect", "list")])
    stream = stream_of(rows.to_iterable_dataset() if streaming else rows)
    with pytest.raises(ValueError, match="Epoch 0 of 'rows' holds no article; rows passed over: 2 list, 1 redirect"):
        next(iter(stream))


@pytest.mark.parametrize("rows", [[], [{"text": "a"}]])
def test_a_process_without_a_row_is_an_error(rows: list[dict[str, str]]) -> None:
    stream = stream_of(rows, process_index=1, num_processes=2)
    with pytest.raises(ValueError, match="no article for process 1 of 2; rows passed over: it has no row for it"):
        next(iter(stream))


def test_the_rest_of_an_epoch_may_hold_no_article() -> None:
    rows = [{"text": "a"}, {"text": ""}]
    items = list(stream_of(rows, shuffle=False, num_epochs=2, position=StreamPosition(0, 1)))
    assert [item.position for item in items] == [StreamPosition(1, 0)]


def test_a_row_without_the_text_column_is_an_error() -> None:
    with pytest.raises(ValueError, match="Row 0 of 'rows' has no column 'text'; its columns are 'body'"):
        next(iter(stream_of([{"body": "b"}])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process_index": 2, "num_processes": 2}, "process_index must be in 0..num_processes - 1, got 2 of 2"),
        ({"process_index": -1}, "process_index must be in"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be 1 or more, got 0"),
        ({"num_epochs": 0}, "num_epochs must be 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_of(ROWS, **options)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 1}, r"has the keys 'epoch' and 'index', got \['epoch'\]"),
        ({"epoch": 1, "index": 2, "row": 3}, "has the keys"),
        ({"epoch": 1, "index": 2.5}, "holds integers"),
        ({"epoch": 1, "index": True}, "holds integers"),
        ({"epoch": -1, "index": 0}, "must be 0 or more, got epoch=-1"),
    ],
)
def test_a_damaged_position_is_refused(state: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamPosition.from_dict(state)


def test_iterating_is_one_pass_in_the_order_of_the_source_by_default(tmp_path: Path) -> None:
    path = str(as_json_lines(tmp_path / "a.jsonl"))
    assert list(iter_wikipedia_articles(path)) == [Article(row["title"], row["text"], path) for row in ROWS]
    shuffled = list(islice(iter_wikipedia_articles(path, seed=1, shuffle=True, num_epochs=None), 60))
    assert len({article.title for article in shuffled[:30]}) == 30
    assert shuffled[:30] != shuffled[30:]


def test_iterating_opens_the_source_at_once() -> None:
    with pytest.raises(hub.HubUnreachableError):
        iter_wikipedia_articles()


# The embedded dump


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> datasets.Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("embedded"))
        return load_articles("offline")


def test_the_embedded_dump_gives_its_real_articles(embedded: datasets.Dataset) -> None:
    stream = ArticleStream(embedded, source="offline", seed=0, num_epochs=1)
    articles = {item.article.title: item.article.text for item in stream}
    assert len(articles) == 96
    assert stream.skipped == {"redirect": 99, "disambiguation": 8, "list": 2, "not_an_article": 1}
    assert {"Anarchism", "Abraham Lincoln", "Apollo 11", "Algorithm", "Zebra"} - set(articles) == {"Zebra"}
    assert articles["Aardvark"].startswith("The aardvark (Orycteropus afer) is a medium-sized, burrowing, nocturnal")


def test_the_embedded_articles_are_free_of_markup(embedded: datasets.Dataset) -> None:
    clutter = ("{{", "}}", "[[", "]]", "<ref", "</ref", "|-", "{|", "''", "http://", "https://", "&nbsp;", "()", "__",
               "\n\n\n", "  ", "\ue000")  # fmt: skip
    found = [(row["title"], sign) for row in embedded for sign in clutter if sign in row["text"]]
    assert found == []


def test_the_embedded_articles_are_mostly_prose(embedded: datasets.Dataset) -> None:
    for row in embedded:
        if row["title"] in {"Anarchism", "Abraham Lincoln", "Apollo 11", "Asia", "Alchemy"}:
            lines = [line for line in row["text"].split("\n") if line]
            in_sentences = sum(len(line) for line in lines if re.search(r"[.!?][\"')]*$", line))
            assert in_sentences > 0.9 * len(row["text"]), row["title"]

"""Names of files: Wikimedia's parts, what stands beside them, archives, and what a folder passes over."""

from __future__ import annotations

import bz2
import gzip
import warnings
from pathlib import Path

import pytest
from made_up_sources import as_json_lines, dump, numbered_dump, page, write

from attention_rl_trainer.memories.articles.dumps import BrokenDumpError
from attention_rl_trainer.memories.articles.formats import format_of
from attention_rl_trainer.memories.articles.sources import load_articles

PART = "enwiki-20241001-pages-articles1.xml-p1p41242"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{PART}.bz2", "MediaWiki dump"),
        (PART, "MediaWiki dump"),
        (f"{PART}.gz", "MediaWiki dump"),
        ("enwiki-20241001-pages-articles-multistream27.xml-p75202332p76702331.BZ2", "MediaWiki dump"),
        ("dewiki-latest-pages-articles.xml.gz", "MediaWiki dump"),
        ("enwiki-20241001-pages-meta-current1.xml-p1p41242", "MediaWiki dump"),
        ("wiki.v2.jsonl.gz", "json"),
        (f"{PART}.7z", None),
        ("enwiki-20241001-pages-articles-multistream-index.txt", None),
        ("enwiki-20241001-pages-articles-multistream-index1.txt-p1p41242.bz2", None),
        ("enwiki-20241001-md5sums.txt", None),
        ("enwiki-20241001-sha1sums-pages.txt", None),
        (f"{PART}.bz2.part", None),
        ("a.xml-p1", None),
        (".xml", None),
    ],
)
def test_the_format_of_a_file_is_known_by_its_name(name: str, kind: str | None) -> None:
    assert format_of(Path(name)) == kind


@pytest.mark.parametrize("ending", ["", ".bz2", ".gz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_part_of_a_dump_is_a_dump(ending: str, streaming: bool, tmp_path: Path) -> None:
    compress = {"": bytes, ".bz2": bz2.compress, ".gz": lambda content: gzip.compress(content, mtime=0)}[ending]
    path = write(tmp_path / f"{PART}{ending}", compress(numbered_dump(3).encode()))
    assert [row["title"] for row in load_articles(str(path), streaming=streaming)] == ["T0", "T1", "T2"]


def test_a_folder_of_parts_is_read_with_all_of_them(tmp_path: Path) -> None:
    for number in (1, 2):
        content = bz2.compress(dump(page(f"T{number}", "Text.")).encode())
        write(tmp_path / "set" / f"enwiki-20241001-pages-articles{number}.xml-p{number}p{number}.bz2", content)
    assert load_articles(str(tmp_path / "set"))["title"][:] == ["T1", "T2"]


def test_a_cut_gzip_dump_is_broken(tmp_path: Path) -> None:
    content = gzip.compress(numbered_dump(1500).encode(), mtime=0)
    with pytest.raises(BrokenDumpError, match="breaks before its first page: Not a gzipped file"):
        load_articles(str(write(tmp_path / "a.xml.gz", b"plain")))
    path = write(tmp_path / "b.xml.gz", content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"breaks after page \d+, 'T\d+': Compressed file ended"):
        assert len(load_articles(str(path))) > 250


def test_an_archive_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = write(tmp_path / f"{PART}.7z", b"7z")
    with pytest.raises(ValueError, match=r"p41242\.7z' is not of a known format; known are .*unpack them first"):
        load_articles(str(path))


def test_what_a_folder_passes_over_is_named_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    write(folder / "a.xml", numbered_dump(2))
    write(folder / "README.md", "about")
    write(folder / ".hidden.7z", b"x")
    with warnings.catch_warnings(record=True, action="always") as caught:
        load_articles(str(folder))
    assert not caught
    for name in (f"{PART}.7z", "enwiki-20241001-md5sums.txt", "more/b.xml.bz2.part", "c.docx", "d.csv", "e.zip"):
        write(folder / name, b"x")
    with pytest.warns(UserWarning, match=r"6 files of the folder '.*dumps' are passed over") as warned:
        assert len(load_articles(str(folder))) == 2
    (message,) = [str(warning.message) for warning in warned]
    assert "c.docx, d.csv, e.zip" in message
    assert "and 1 others" in message
    assert warned[0].filename == __file__


def test_a_folder_of_rows_names_what_it_passes_over_too(tmp_path: Path) -> None:
    as_json_lines(tmp_path / "set" / "train.jsonl")
    write(tmp_path / "set" / "more.csv", "text\nx")
    with pytest.warns(UserWarning, match=r"1 files of the folder .*: more\.csv\. Known are Parquet"):
        assert len(load_articles(str(tmp_path / "set"))) == 30


def test_a_folder_without_a_known_format_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "set" / f"{PART}.7z", b"x")
    with pytest.raises(ValueError, match=r"holds no file of a known format, there are enwiki-.*\.7z; known are"):
        load_articles(str(tmp_path / "set"))

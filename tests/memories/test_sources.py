"""The name of a source to a table: formats, folders, splits and slices, streaming, refusals."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import datasets
import pytest
from made_up_sources import ROWS, as_json_lines, as_parquet, dump, numbered_dump, page, write

from attention_rl_trainer.memories.articles import (
    arguments,
    brackets,
    dumps,
    files,
    languages,
    leftovers,
    literal,
    markup,
    measures,
    sites,
    sources,
    tags,
    template_names,
    templates,
)
from attention_rl_trainer.memories.articles.sources import load_articles


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


RULES = [
    arguments, brackets, dumps, files, languages, leftovers, literal, markup, measures, sites, tags, template_names,
    templates,
]  # fmt: skip


@pytest.mark.parametrize("changed", RULES, ids=lambda module: module.__name__)
def test_a_prepared_dump_is_read_again_when_the_rules_change(
    changed: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.xml", numbered_dump(3))
    first = load_articles(str(path)).cache_files
    source_of = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda item: "other rules" if item is changed else source_of(item))
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
def test_a_split_that_a_dump_does_not_have(tmp_path: Path, split: str, message: str) -> None:
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
    with pytest.raises(ValueError, match=r"is not of a known format; known are Parquet.*JSON Lines.*text.*MediaWiki"):
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

"""An existing path is that path, whatever signs are in its name, and nothing but a name is a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_sources import as_json_lines, numbered_dump, numbered_rows, write

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.stream import iter_wikipedia_articles

ROWS, OTHERS = numbered_rows(3), [{"title": "sibling", "text": "Another text."}]
NAMES = [
    *("wiki[1]", "a::b", "folder*", "json"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("x[!a]", "[", "::", "{a,b}", "~a", "file:x", "zip::x", "text", "a\nb", "q?")
    ),
]


def titles(table: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    return [row["title"] for row in table]


def as_parquet(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # `datasets` itself could not write to a name such as `a::b`.
    with path.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    return path


def siblings(folder: Path) -> None:
    """Files that a pattern, a shorter name or another working folder would find."""
    for name in ("wiki1.jsonl", "folder-b.jsonl", "xb.jsonl", "a.jsonl", "b.jsonl", "x.jsonl"):
        as_json_lines(folder / name, OTHERS)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_file_is_read_under_its_own_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings(tmp_path)
    path = as_json_lines(tmp_path / f"{name}.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    for given, streaming in ((str(path), None), (path.name, None), (path.name, True)):
        assert titles(load_articles(given, streaming=streaming)) == [row["title"] for row in ROWS]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_folder_is_read_alone_and_split_by_the_names_of_its_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings(tmp_path)
    as_json_lines(tmp_path / "folder-b" / "train.jsonl", OTHERS)
    as_json_lines(tmp_path / name / "train.jsonl", ROWS)
    as_json_lines(tmp_path / name / "test.jsonl", OTHERS)
    monkeypatch.chdir(tmp_path)
    for given, streaming in ((str(tmp_path / name), None), (name, None), (name, True)):
        assert titles(load_articles(given, streaming=streaming)) == [row["title"] for row in ROWS]
    assert titles(load_articles(name, split="test")) == ["sibling"]
    with pytest.raises(ValueError, match="Unknown split 'nonsense'"):
        load_articles(name, split="nonsense")
    # A working folder of that name, too.
    monkeypatch.chdir(tmp_path / name)
    for given in ("train.jsonl", "."):
        assert titles(load_articles(given)) == [row["title"] for row in ROWS]


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: as_json_lines(folder / "a::[b]*.jsonl.gz", ROWS),
        lambda folder: as_parquet(folder / "a::[b]*.parquet"),
        lambda folder: as_parquet(folder / "set" / "a::b.parquet").parent,
        lambda folder: write(folder / "a::[b]*.xml", numbered_dump(3)),
        lambda folder: write(folder / "a::[b]*.xml.bz2", numbered_dump(3)),
        lambda folder: write(folder / "d*" / "a[1].xml", numbered_dump(3)).parent,
    ],
    ids=["jsonl.gz", "parquet", "file in a folder", "xml", "bz2", "folder of dumps"],
)
def test_every_format_is_read_under_such_a_name(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    for streaming in (None, True):
        assert titles(load_articles(path, streaming=streaming)) == [row["title"] for row in ROWS]
    assert titles(load_articles(path, split="train[1:]")) == [row["title"] for row in ROWS[1:]]
    assert [article.title for article in iter_wikipedia_articles(path)] == [row["title"] for row in ROWS]


@pytest.mark.parametrize("name", ["t*", "t[1]", "t::u"])
def test_texts_are_read_under_such_a_name(name: str, tmp_path: Path) -> None:
    write(tmp_path / name / "a[1].txt", "A.")
    write(tmp_path / name / "b.txt", "B.")
    write(tmp_path / "two" / "c.txt", "C.")
    assert [row["text"] for row in load_articles(tmp_path / name)] == ["A.", "B."]
    assert [row["text"] for row in load_articles(tmp_path / name / "a[1].txt")] == ["A."]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = as_json_lines(tmp_path / "wiki[1].jsonl", ROWS)
    assert len(load_articles(path)) == 3
    as_json_lines(path, [*ROWS, *OTHERS])
    assert titles(load_articles(path))[3:] == ["sibling"]


def test_configurations_of_a_folder_that_looks_like_a_pattern_are_refused(tmp_path: Path) -> None:
    folder = as_json_lines(tmp_path / "set[1]" / "train.jsonl", ROWS).parent
    with pytest.raises(ValueError, match=r"set\[1\]' is to be read by a configuration.*rename it"):
        load_articles(folder, "english")
    write(folder / "README.md", "A description.")
    assert len(load_articles(folder)) == 3
    write(folder / "README.md", "---\nconfigs:\n- config_name: english\n  data_files: train.jsonl\n---\n")
    with pytest.raises(ValueError, match=r"set\[1\]' is to be read by a configuration.*rename it"):
        load_articles(folder)


@pytest.mark.parametrize("name", ["", " ", "\n", None, 3, b"a.jsonl", ["a.jsonl"]], ids=repr)
def test_what_is_no_name_is_refused_and_never_the_current_folder(
    name: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "notes.txt", "My diary.")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"A source of articles is named by 'offline', a file or folder.*got "):
        load_articles(name)
    # The current folder has a name.
    assert [row["text"] for row in load_articles(".")] == ["My diary."]


@pytest.mark.parametrize("name", ["no*.jsonl", "*", "folder*/", "~nobody/a.jsonl", "a\x00b.jsonl", "x" * 300 + ".txt"])
def test_a_pattern_that_is_not_a_path_finds_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_json_lines(tmp_path / "nothing.jsonl", ROWS)
    as_json_lines(tmp_path / "folder-b" / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        load_articles(name)


def test_the_home_folder_is_meant_by_its_sign_unless_a_file_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    as_json_lines(tmp_path / "home" / "a.jsonl", ROWS)
    assert titles(load_articles("~/a.jsonl")) == [row["title"] for row in ROWS]
    as_json_lines(tmp_path / "~" / "a.jsonl", OTHERS)
    assert titles(load_articles("~/a.jsonl")) == ["sibling"]


@pytest.mark.parametrize("split", ["", "..", "/etc", "[:3]", " train"])
def test_a_split_is_a_name_and_not_a_path(split: str, tmp_path: Path) -> None:
    write(tmp_path / "texts" / "a.txt", "A.")
    write(tmp_path / "secret.txt", "Not this one.")
    with pytest.raises(ValueError, match="A split is a name such as 'train'"):
        load_articles(tmp_path / "texts", split=split)


def test_a_slice_of_a_split_holds_no_text_of_another_one(tmp_path: Path) -> None:
    write(tmp_path / "texts" / "train" / "b.txt", "B.")
    write(tmp_path / "texts" / "train" / "c.txt", "C.")
    write(tmp_path / "texts" / "test" / "a.txt", "A.")
    assert [row["text"] for row in load_articles(tmp_path / "texts", split="train[:1]")] == ["B."]


@pytest.mark.parametrize("config_name", ["*", "defau*", "[a-z]*"])
def test_a_configuration_is_a_name_and_not_a_pattern(config_name: str, own_cache: Path) -> None:
    (own_cache / "someone___tiny-set" / "default" / "0.0.0" / "0123abcd").mkdir(parents=True)
    with pytest.raises(ConnectionError, match=r"'someone/tiny-set' is neither a local path nor in the local cache"):
        load_articles("someone/tiny-set", config_name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.xml", "offline", "someone/articles"])
@pytest.mark.parametrize("streaming", [None, True])
def test_a_cache_that_cannot_be_written_is_named_with_the_way_out_before_anything_is_read(
    name: str, streaming: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "file", "A file, where the cache should be.")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    as_json_lines(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "a.xml", numbered_dump(3))
    monkeypatch.chdir(tmp_path)
    message = r"cache folder '.*file/datasets' cannot be written: .*Not a directory.*HF_HOME.*HF_DATASETS_CACHE"
    with pytest.raises(ValueError, match=message):
        load_articles(name, streaming=streaming)

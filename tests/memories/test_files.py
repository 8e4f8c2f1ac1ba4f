"""Files as they come: cut, damaged, of the wrong encoding; what can be read is used, and what cannot is counted."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_sources import numbered_rows, write

from attention_rl_trainer.memories.articles import files
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.stream import ArticleStream, iter_wikipedia_articles

ROWS = numbered_rows(60)
LINES = [json.dumps(row) for row in ROWS]

both_ways = pytest.mark.parametrize("streaming", [False, True], ids=["prepared", "streamed"])


def with_line(number: int, line: bytes | str) -> bytes:
    """The lines of all rows with another one in the place of one of them."""
    lines: list[bytes | str] = [*LINES]
    lines[number] = line
    return b"".join((content if isinstance(content, bytes) else content.encode()) + b"\n" for content in lines)


def parquet_bytes(folder: Path, rows_of_group: int = 20, **options: object) -> bytes:
    """All rows as a Parquet file, in groups."""
    path = folder / "intact"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=rows_of_group, **options)
    return path.read_bytes()


def with_damaged_group(folder: Path, group: int) -> bytes:
    """A Parquet file whose texts of one group of 20 rows are overwritten."""
    content = bytearray(parquet_bytes(folder, compression="zstd"))
    column = pq.ParquetFile(folder / "intact").metadata.row_group(group).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xee" * column.total_compressed_size
    return bytes(content)


def opened(path: Path, streaming: bool, message: str) -> ArticleStream:
    """Open a damaged source in two runs, each of which names the break, and give the stream of the second."""
    for _ in range(2):
        with contextlib.nullcontext() if streaming else pytest.warns(UserWarning, match=message):
            table = load_articles(str(path), streaming=streaming)
    return ArticleStream(table, source=str(path), seed=0, shuffle_buffer_size=7, num_epochs=2)


CUT_GZIP = gzip.compress("\n".join(LINES).encode(), mtime=0)
BROKEN_LINES = {
    "cut short": LINES[40][:-9],
    "not an object": '["T40", "text"]',
    "a number": "5",
    "zeros": b"\x00" * 80,
    "deep": "[" * 100_000,
    "a comment": "// nothing",
}


@both_ways
@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_a_broken_line_is_named_and_counted_and_the_others_are_used(
    line: bytes | str, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", with_line(40, line))
    place = r"line 41 of '.*a\.jsonl' (cannot be read|is not a JSON object)"
    stream = opened(path, streaming, f"Articles are missing: {place}")
    titles = [item.article.title for item in stream]
    assert sorted(titles[:59]) == sorted(titles[59:]) == sorted(row["title"] for row in ROWS if row["title"] != "T40")
    assert stream.skipped == {"broken_row": 2}
    assert re.search(place, caplog.text)


@both_ways
def test_bytes_that_are_not_utf8_are_one_broken_row(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", with_line(40, b'{"title": "T40", "text": "caf\xe9"}'))
    table = load_articles(str(path), streaming=streaming)
    stream = ArticleStream(table, source=str(path), seed=0, num_epochs=2)
    assert len(list(stream)) == 2 * 59
    assert stream.skipped == {"broken_row": 2}
    assert re.search(r"(Row 40|line 41) of '.*a\.jsonl' cannot be read.*can't decode byte 0xe9", caplog.text)


@both_ways
def test_strings_of_parquet_that_are_not_utf8_are_broken_rows(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = pa.array([b"first", b"caf\xe9", b"third"]).view(pa.string())
    pq.write_table(pa.table({"text": texts, "title": ["T0", "T1", "T2"]}), tmp_path / "a.parquet")
    table = load_articles(str(tmp_path / "a.parquet"), streaming=streaming)
    stream = ArticleStream(table, source="a.parquet", seed=0, num_epochs=1)
    assert {item.article.title for item in stream} == {"T0", "T2"}
    assert stream.skipped == {"broken_row": 1}
    assert re.search(r"[Rr]ow 1 of '.*a\.parquet' cannot be read.*0xe9", caplog.text)


@both_ways
def test_a_cut_gzip_file_is_read_up_to_its_break(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = "\n".join(f'{{"text": "page {number} {number**9:x}"}}' for number in range(3000))
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(source.encode(), mtime=0)[:-4000])
    stream = opened(path, streaming, r"Articles are missing: the file '.*a\.jsonl\.gz' breaks after line \d+: .*ended")
    num_of_epoch = Counter(item.position.epoch for item in stream)
    num_read = int(re.search(r"breaks after line (\d+)", caplog.text)[1])
    assert 1000 < num_read < 3000
    assert num_of_epoch == {0: num_read, 1: num_read}
    assert stream.skipped == {"broken_file": 2}


@both_ways
def test_a_damaged_group_of_parquet_is_counted_by_its_rows(
    streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.parquet", with_damaged_group(tmp_path, 1))
    place = r"rows 20 to 39 of '.*a\.parquet' cannot be read"
    stream = opened(path, streaming, f"Articles are missing: {place}")
    expected = {f"T{number}" for number in (*range(20), *range(40, 60))}
    titles = [item.article.title for item in stream]
    assert set(titles[:40]) == set(titles[40:]) == expected
    assert stream.skipped == {"broken_row": 40}
    assert re.search(place, caplog.text)


@both_ways
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.parquet", None, "breaks at its end, where its index should be: Parquet magic bytes not found"),
        ("other.parquet", b"nothing of the kind", "breaks at its end"),
        ("empty.parquet", b"", "breaks at its end"),
        ("other.jsonl", "# no JSON\nat all\n", "line 1 of .* cannot be read"),
        ("cut.json", json.dumps(ROWS)[:-5], "breaks in its JSON array"),
        ("plain.jsonl.gz", "\n".join(LINES).encode(), "breaks at its beginning: Not a gzipped file"),
        ("cut.jsonl.gz", CUT_GZIP[:30], "breaks at its beginning: Compressed file ended"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "can't decode byte 0xe9 in position 3.*convert it to UTF-8"),
    ],
)
def test_a_file_of_which_nothing_can_be_read_is_an_error_that_names_it(
    name: str, content: bytes | str | None, message: str, streaming: bool, tmp_path: Path
) -> None:
    path = write(tmp_path / name, parquet_bytes(tmp_path)[:-100] if content is None else content)
    with pytest.raises(ValueError, match=f"{re.escape(name)}' cannot be read: .*{message}"):
        load_articles(str(path), streaming=streaming)


@both_ways
@pytest.mark.parametrize(
    ("ending", "make_broken"),
    [
        ("parquet", lambda folder: parquet_bytes(folder)[:-100]),
        ("jsonl", lambda folder: b"\xff\xff"),
        ("txt", lambda folder: b"caf\xe9"),
    ],
)
def test_a_broken_file_among_others_is_named_and_counted(
    ending: str,
    make_broken: Callable[[Path], bytes],
    streaming: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    intact = {"parquet": parquet_bytes(tmp_path), "jsonl": with_line(0, LINES[0]), "txt": b"The text of page 0."}
    folder = tmp_path / "set"
    for name in ("a", "c"):
        write(folder / f"{name}.{ending}", intact[ending])
    write(folder / f"b.{ending}", make_broken(tmp_path))
    stream = opened(folder, streaming, rf"Articles are missing: .*b\.{ending}' (breaks|cannot be read)")
    assert len(list(stream)) == 2 * 2 * (1 if ending == "txt" else 60)
    assert stream.skipped.total() == 2
    assert re.search(rf"b\.{ending}' (breaks|cannot be read)", caplog.text)


@both_ways
def test_values_that_are_not_text_are_counted_among_those_that_are(streaming: bool, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"title": "good", "text": "A text."},
        {"title": "none", "text": None},
        {"title": "number", "text": 5},
        {"title": "missing"},
        {"title": "empty", "text": ""},
        {"title": "white", "text": " \t\u00a0\n"},
        {"title": "object", "text": {"a": 1}},
        {"title": 7, "text": "Its title is a number."},
    ]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    stream = ArticleStream(
        load_articles(str(path), streaming=streaming), source="a", seed=0, shuffle=False, num_epochs=1
    )
    assert [item.article.title for item in stream] == ["good", "article 7"]
    assert stream.skipped == {"not_a_string": 4, "empty": 2}


@both_ways
def test_a_binary_column_holds_no_text(streaming: bool, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"bytes", b"\xff"])}), tmp_path / "a.parquet")
    stream = ArticleStream(load_articles(str(tmp_path / "a.parquet"), streaming=streaming), source="a", seed=0)
    with pytest.raises(ValueError, match="Epoch 0 of 'a' holds no article; rows passed over: 2 not_a_string"):
        next(iter(stream))


def test_the_texts_of_a_damaged_file_may_hold_lone_surrogates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", with_line(3, '{"title": "T3", "text": "half \\ud83d a pair"}'))
    table = load_articles(str(path))
    assert table[3]["text"] == "half ? a pair"
    assert len(table) == 60


def test_a_slice_of_a_damaged_file_counts_the_broken_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", with_line(2, "broken"))
    with pytest.warns(UserWarning, match="line 3 of"):
        table = load_articles(str(path), split="train[:5]")
    assert table["title"][:2] == ["T0", "T1"]
    assert table["skip_reason"][:] == [None, None, "broken_row", None, None]


def test_a_wrong_column_of_a_damaged_file_lists_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", with_line(0, "broken"))
    with pytest.raises(ValueError, match="no column 'body'; its columns are 'title', 'text'"):
        load_articles(str(path), text_column="body")


def test_many_breaks_are_named_in_part_and_counted_in_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", "".join(f"{line}\nbroken\n" for line in LINES))
    with pytest.warns(UserWarning, match="Articles are missing") as warned:
        table = load_articles(str(path))
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 11
    assert messages[-1] == "Articles are missing: 60 rows in all cannot be read."
    assert f"In all, 60 rows of {str(path)!r} cannot be read." in caplog.text
    assert len(table) == 120


def test_an_array_is_read_as_its_elements(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", f"\n {json.dumps([*ROWS[:2], 5, ROWS[2]])}")
    rows = list(files.file_rows([str(path)], "json"))
    assert rows[:2] == ROWS[:2]
    assert rows[3] == ROWS[2]
    assert files.is_break(rows[2])
    assert "element 2 of" in str(rows[2]["title"])


def test_a_slice_cannot_be_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", with_line(0, LINES[0]))
    with pytest.raises(ValueError, match=r"'train\[:3\]' is a slice, which a streamed file cannot give"):
        load_articles(str(path), split="train[:3]", streaming=True)
    folder = write(tmp_path / "set" / "train.jsonl", with_line(0, LINES[0])).parent
    with pytest.raises(ValueError, match="Unknown split 'test'; there are 'train'"):
        load_articles(str(folder), split="test", streaming=True)


def test_iterating_names_the_break(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", with_line(40, "broken"))
    with pytest.warns(UserWarning, match="line 41 of"):
        assert len(list(iter_wikipedia_articles(str(path)))) == 59

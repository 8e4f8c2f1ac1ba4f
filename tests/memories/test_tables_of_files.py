"""Grouped rows from files and data sets: formats, splits, and faults by file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import pytest
from made_up_sources import write

from attention_rl_trainer.hub import HubUnreachableError
from attention_rl_trainer.memories.stream import Entries
from attention_rl_trainer.memories.tables import EntriesTable, load_grouped

ROWS = [
    {"question": "Big?", "answer": "no", "topic": "ant"},
    {"question": "Big?", "answer": "yes, very", "topic": "elephant"},
    {"question": "Eyes?", "answer": "2", "topic": "elephant"},
    {"question": "Eyes?", "answer": "2", "topic": "ant"},
]
LINES = [json.dumps(row) for row in ROWS]


def load(path: Path, split: str = "train") -> EntriesTable:
    return load_grouped(str(path), "question", "answer", "topic", split=split)


def expected(path: Path) -> tuple[Entries, ...]:
    keys = (" Big?", " Eyes?")
    return (Entries("ant", str(path), keys, (" no", " 2")), Entries("elephant", str(path), keys, (" yes, very", " 2")))


def lines_of(rows: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def csv_of(rows: Sequence[Mapping[str, str]], delimiter: str = ",", line_break: str = "\n") -> str:
    """Rows as CSV, with an empty line before the third."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=line_break)
    writer.writeheader()
    writer.writerows(rows[:2])
    file.write(line_break)
    writer.writerows(rows[2:])
    return file.getvalue()


CSV = csv_of(ROWS)


def put(path: Path, rows: Sequence[Mapping[str, str]] = ROWS) -> Path:
    """Write rows in the format that the name says."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list([*rows]).to_parquet(path)
        return path
    contents: dict[str, str | bytes] = {
        ".jsonl": lines_of(rows),
        ".gz": lines_of(rows),
        ".json": json.dumps([*rows]),
        ".csv": csv_of(rows),
        ".CSV": b"\xef\xbb\xbf" + csv_of(rows, line_break="\r\n").encode(),
        ".tsv": csv_of(rows, "\t"),
    }
    return write(path, contents[path.suffix])


NAMES = ["faq.jsonl", "faq.json", "faq.jsonl.gz", "faq.parquet", "faq.csv", "FAQ.CSV", "faq.tsv"]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_memories(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / name)
    assert load(path).rows == expected(path)
    assert load(path).name == str(path)


def test_a_folder_with_splits_and_a_slice_of_memories(tmp_path: Path) -> None:
    write(tmp_path / "faq" / "train" / "a.jsonl", "\n".join(LINES[1:3]).encode())
    write(tmp_path / "faq" / "test" / "b.jsonl", "\n".join(LINES).encode())
    folder = tmp_path / "faq"
    assert [entries.title for entries in load(folder)] == ["elephant"]
    assert load(folder, "test").rows == expected(folder)
    assert load(folder, "test[1:]").rows == expected(folder)[1:]


def test_a_single_file_is_the_split_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("faq.jsonl", "faq.csv"):
        path = put(tmp_path / name)
        assert load(path, "test[:50%]").rows == expected(path)[:1]


def line_of(answer: str, topic: str = '"ant"', question: str = '"Old?"') -> str:
    return f'{{"question": {question}, "answer": {answer}, "topic": {topic}}}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param(
            line_of('"yes"', question='"Big?"'),
            "line 6, group 'ant', field 'question': 'Big?' is in line 1 already, with another value",
            id="two_values",
        ),
        pytest.param(line_of('"no"', '"bee"'), "line 6, group 'bee': 1 pair of a key", id="one_pair"),
        pytest.param(line_of("[1]"), "line 6, group 'ant', field 'answer': expected a text or a number", id="list"),
        pytest.param(LINES[0][:-9], "line 6 of '", id="cut"),
        pytest.param("[1, 2]", "is not a JSON object, but of type list; fix or delete it", id="not_an_object"),
    ],
)
def test_a_fault_in_json_lines_is_named_by_its_line(line: str, message: str, tmp_path: Path) -> None:
    # The empty line shows that lines are counted, not rows.
    path = write(tmp_path / "faq.jsonl", "\n".join([*LINES[:2], "", *LINES[2:], line]).encode())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_line_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "faq.jsonl", "\n".join(LINES).encode() + b'\n{"question": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"line 5 of '.*faq\.jsonl' cannot be read.*can't decode byte 0xe9"):
        load(path)


@pytest.mark.parametrize("name", ["faq.json", "faq.jsonl.gz", "faq.parquet"])
def test_other_files_name_the_row(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / name, [*ROWS[:3], {**ROWS[3], "question": "Big?"}])
    with pytest.raises(ValueError, match=r"row 3, group 'ant', field 'question': 'Big\?' is in row 0 already"):
        load(path)


@pytest.mark.parametrize("column", ["question", "answer", "topic"])
@pytest.mark.parametrize("name", ["faq.jsonl", "faq.parquet", "faq.csv"])
def test_a_missing_column_lists_those_that_are_there(name: str, column: str, tmp_path: Path) -> None:
    put(tmp_path / name)
    columns = {"question": "question", "answer": "answer", "topic": "topic", column: "Frage"}
    argument = {"question": "key_column", "answer": "value_column", "topic": "group_column"}[column]
    message = rf"has no column 'Frage'; its columns are 'question', 'answer', 'topic'.*Choose one of them as {argument}"
    with pytest.raises(ValueError, match=message) as caught:
        load_grouped(str(tmp_path / name), columns["question"], columns["answer"], columns["topic"])
    assert "dataset_text_column" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(CSV.encode() + b"Old?,caf\xe9,ant\n", "line 7: the byte 0xe9 is not UTF-8; save it", id="utf8"),
        pytest.param(CSV.encode() + b"Old?,no, never,ant\n", "line 7: 4 fields, the header has 3; put", id="comma"),
        pytest.param(CSV.encode() + b'Old?,"no\n', "line 7: cannot be read: unexpected end of data; corr", id="quote"),
        pytest.param(CSV.encode() + b"Big?,yes,ant\n", "line 7, group 'ant', field 'question': 'Big?' is in line 2",
                     id="two_values"),
        pytest.param(b"topic,answer,topic\n", "line 1: the header names 'topic' twice; rename or delete", id="header"),
        pytest.param(b"\n\n", "is empty; its first line names the columns", id="empty"),
        pytest.param(b"question,answer,topic\n", "has no memory: of 0 rows none has a 'topic'", id="no_rows"),
    ],
)  # fmt: skip
def test_faults_of_csv_are_named_by_their_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "faq.csv", content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_field_of_csv_may_hold_a_line_break(tmp_path: Path) -> None:
    path = write(tmp_path / "faq.csv", (CSV + '"Old\nor new?",old,ant\nBig?,yes,ant\n').encode())
    with pytest.raises(ValueError, match=r"line 9, group 'ant'"):
        load(path)


def test_a_sum_of_splits_and_a_configuration_of_csv_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "faq.csv")
    with pytest.raises(ValueError, match=r"'train\+test' of '.*faq.csv' is a sum of splits; give one, or a slice"):
        load(tmp_path / "faq.csv", "train+test")
    with pytest.raises(ValueError, match=r"has no configurations; got config_name='en', leave it out"):
        load_grouped(str(tmp_path / "faq.csv"), "question", "answer", "topic", "en")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder '.*faq\.jsonl'"):
        load(tmp_path / "faq.jsonl")


def test_without_the_hub_a_data_set_of_it_is_refused() -> None:
    with pytest.raises(HubUnreachableError, match=r"'someone/faq' is neither a local path nor in the local cache"):
        load_grouped("someone/faq", "question", "answer", "topic")


def test_a_data_set_of_the_hub_is_loaded_by_its_split_and_sliced_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(*arguments: object) -> datasets.Dataset:
        asked.append(arguments)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("attention_rl_trainer.memories.articles.sources.load_from_hub", load_dataset)
    table = load_grouped("someone/faq", "question", "answer", "topic", "en", split="test[1:]")
    assert asked == [("someone/faq", "en", "test", None)]
    assert table.rows == expected(Path("someone/faq"))[1:]

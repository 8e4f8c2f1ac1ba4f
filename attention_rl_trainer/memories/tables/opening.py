"""From the name of a file or data set to its rows, each with its place, and on to grouped memories."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import datasets

from attention_rl_trainer.memories.articles.files import is_break
from attention_rl_trainer.memories.articles.formats import format_of
from attention_rl_trainer.memories.articles.paths import existing_path
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.tables.entries_table import EntriesTable, take_split
from attention_rl_trainer.memories.tables.grouping import group_rows, named_columns, row_number

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_HINT_FOR_ARTICLES = " Choose the one that holds the text with the option dataset_text_column."


def load_grouped(
    name: str,
    key_column: str | None,
    value_column: str | None,
    group_column: str | None,
    config_name: str | None = None,
    split: str = "train",
) -> EntriesTable:
    """Open a file, a folder or a data set of the Hub, and make a memory of each group of its rows; see `group_rows`.

    All rows are read at once.

    Args:
        name: a CSV file (``.csv``; ``.tsv`` with tabs) with a header, or what `load_articles` opens.
        split: a split, or a slice of its memories such as ``"train[:150]"``. A single file is the split that is asked
            for.

    Raises:
        ValueError: as `group_rows`; a row cannot be read (names the file and the line); the split is a sum, or empty.
        FileNotFoundError: and what else `load_articles` raises.
    """
    columns = named_columns(key_column, value_column, group_column, name)
    part = split.partition("[")[0]
    if "+" in split:
        raise ValueError(
            f"{split!r} of {name!r} is a sum of splits; give one, or a slice of its memories such as 'train[:150]'."
        )
    path = existing_path(name)
    if path is not None and is_csv(path):
        if config_name is not None:
            raise ValueError(f"{name!r} has no configurations; got config_name={config_name!r}, leave it out.")
        lines, rows = _read_csv(path)
        table = group_rows(rows, *columns, name=name, place=lambda row: f"line {lines[row]}")
    else:
        table = _group_opened(name, path, columns, config_name, part)
    return take_split({part: table}, split)


def is_csv(path: Path) -> bool:
    """Whether a file is CSV by its name."""
    return path.suffix.lower() in _DELIMITERS and path.is_file()


def _group_opened(
    name: str, path: Path | None, columns: tuple[str, str, str], config_name: str | None, split: str
) -> EntriesTable:
    place: Callable[[int], str] = row_number
    if path is not None and path.is_file() and format_of(path) == "json":
        place = _place_in_json(path)
    # Local files that are read while iterating keep all their columns, and name what cannot be read by its line.
    streaming = True if path is not None else None
    try:
        rows = load_articles(name, config_name, split, streaming, text_column=columns[0])
    except ValueError as error:
        message = str(error)
        if not message.endswith(_HINT_FOR_ARTICLES):
            raise
        raise ValueError(f"{message.removesuffix(_HINT_FOR_ARTICLES)} Choose one of them as key_column.") from error
    opened = rows if isinstance(rows, datasets.Dataset) else _unbroken(rows, name)
    return group_rows(opened, *columns, name=name, place=place)


def _unbroken(rows: Iterable[Mapping[str, object]], name: str) -> Iterator[Mapping[str, object]]:
    for row in rows:
        if is_break({**row}):
            raise ValueError(f"{name!r}: {row['title']}")
        yield row


def _place_in_json(path: Path) -> Callable[[int], str]:
    """Name rows by the lines of a file of JSON Lines, of which every line that is not empty is a row.

    Of a compressed file, and of one JSON array, rows are named by their numbers.
    """

    def place(row: int) -> str:
        with path.open("rb") as file:
            filled = [number for number, line in enumerate(file, 1) if line.strip()]
        return f"line {filled[row]}"

    is_array = _first_character(path) == b"["
    return row_number if is_array or path.suffix.lower() == ".gz" else place


def _first_character(path: Path) -> bytes:
    with path.open("rb") as file:
        return next((line.lstrip()[:1] for line in file if line.strip()), b"")


def _read_csv(path: Path) -> tuple[list[int], list[dict[str, str]]]:
    """Read a CSV file as the lines in which its rows end, and the rows.

    Raises:
        ValueError: it is not UTF-8, has no header, one that names a column twice, or a row of another length.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ValueError(
            f"{str(path)!r}, line {line}: the byte 0x{byte:02x} is not UTF-8; save it as UTF-8."
        ) from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[path.suffix.lower()], strict=True)
    lines: list[int] = []
    rows: list[dict[str, str]] = []
    header: list[str] = []
    try:
        for fields in reader:
            where = f"{str(path)!r}, line {reader.line_num}"
            if not fields:
                continue
            if not header:
                header = _header(fields, where)
            elif len(fields) != len(header):
                raise ValueError(
                    f"{where}: {len(fields)} fields, the header has {len(header)}; put a field that holds the "
                    "delimiter into quotation marks."
                )
            else:
                lines.append(reader.line_num)
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r}, line {reader.line_num}: cannot be read: {error}; correct it.") from error
    if not header:
        raise ValueError(f"{str(path)!r} is empty; its first line names the columns.")
    return lines, rows


def _header(fields: list[str], where: str) -> list[str]:
    header = [name.strip() for name in fields]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(f"{where}: the header names {twice[0]!r} twice; rename or delete one.")
    return header

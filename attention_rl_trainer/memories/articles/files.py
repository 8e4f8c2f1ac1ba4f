"""From Parquet, JSON Lines and text files to rows, also past what is damaged in them.

`datasets` reads intact files faster, but a damaged one not at all, and of a stream it loses what it has read before the
damage. Here every row that can be read is a row, and what cannot is one too, with a reason, so that it is counted.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

BROKEN_ROW: Final = "broken_row"
"""Reason of a row that cannot be read, while those after it can; its title says where it is and what is wrong."""

BROKEN_FILE: Final = "broken_file"
"""Reason of the row that stands for the rest of a file, or for all of it; its title says where the break is."""

FileRow: TypeAlias = dict[str, object]

_NUM_ROWS_OF_COLUMNS = 1000
"""Rows whose columns are the columns of a JSON Lines file; a later row may add some, and lacks none."""

_NUM_NAMED_BREAKS = 3

_logger = logging.getLogger(__name__)


def is_break(row: FileRow) -> bool:
    """Whether a row of `file_rows` stands for something that cannot be read."""
    return row.get("skip_reason") in (BROKEN_ROW, BROKEN_FILE)


def file_rows(paths: Sequence[str], kind: str) -> Iterator[FileRow]:
    """Read files as rows, one after the other; the first breaks of a file are logged, and their number.

    Args:
        paths: files to read, in this order.
        kind: their format, "json" (lines, or one array; also compressed, ``.gz``), "parquet" or "text".

    Yields:
        The rows with all their columns. What cannot be read is a row of ``title``, which says what is wrong and where,
        and ``skip_reason``: `BROKEN_ROW` for each line, row of Parquet or element of an array, `BROKEN_FILE` for the
        rest of a file.
    """
    for path in paths:
        breaks: dict[str, int] = {}
        for row in _READERS[kind](Path(path)):
            if is_break(row):
                message = str(row["title"])
                if message not in breaks and len(breaks) < _NUM_NAMED_BREAKS:
                    _logger.warning("%s", message)
                breaks[message] = breaks.get(message, 0) + 1
            yield row
        if len(breaks) > _NUM_NAMED_BREAKS:
            _logger.warning("In all, %d rows of %r cannot be read.", sum(breaks.values()), path)


def article_rows(paths: Sequence[str], kind: str, text_column: str) -> Iterator[FileRow]:
    """Read files as `file_rows` does, but ``text_column``, ``title`` and ``skip_reason`` alone.

    None stands for what is not a string.
    """
    for row in file_rows(paths, kind):
        yield {name: _encodable(row.get(name)) for name in dict.fromkeys(("title", text_column, "skip_reason"))}


def _encodable(value: object) -> str | None:
    """Keep a string, without the lone surrogates that Arrow cannot hold."""
    return value.encode("utf-8", errors="replace").decode("utf-8") if isinstance(value, str) else None


def _break(reason: str, message: str) -> FileRow:
    return {"title": message, "skip_reason": reason}


def _reason(error: Exception) -> str:
    return str(error).rstrip(".")


def _broken_file(path: Path, where: str, error: Exception) -> FileRow:
    return _break(
        BROKEN_FILE, f"the file {str(path)!r} breaks {where}: {_reason(error)}; get it again, or compare its checksum."
    )


def _text_rows(path: Path) -> Iterator[FileRow]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        yield _break(BROKEN_FILE, f"the file {str(path)!r} cannot be read: {_reason(error)}; convert it to UTF-8.")
    except OSError as error:
        yield _broken_file(path, "at its beginning", error)
    else:
        yield {"text": text}


def _json_rows(path: Path) -> Iterator[FileRow]:
    rows = _json_objects(path)
    head = list(islice(rows, _NUM_ROWS_OF_COLUMNS))
    columns = [name for row in head if not is_break(row) for name in row]
    for row in chain(head, rows):
        yield row if is_break(row) else {**dict.fromkeys(columns), **row}


def _json_objects(path: Path) -> Iterator[FileRow]:
    number = 0
    try:
        with _open_binary(path) as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if start == b"[":
                yield from _json_array(file.read(), path)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json_object(line, f"line {number} of {str(path)!r}")
    except (EOFError, OSError, zlib.error) as error:
        yield _broken_file(path, f"after line {number}" if number else "at its beginning", error)


def _open_binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _json_array(content: bytes, path: Path) -> Iterator[FileRow]:
    try:
        elements = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        yield _broken_file(path, "in its JSON array", error)
        return
    for number, element in enumerate(elements):
        yield _object_row(element, f"element {number} of {str(path)!r}")


def _json_object(line: bytes, where: str) -> FileRow:
    try:
        return _object_row(json.loads(line.decode("utf-8-sig")), where)
    except (ValueError, RecursionError) as error:
        return _break(BROKEN_ROW, f"{where} cannot be read: {_reason(error)}; fix or delete it.")


def _object_row(value: object, where: str) -> FileRow:
    if not isinstance(value, dict):
        return _break(
            BROKEN_ROW, f"{where} is not a JSON object, but of type {type(value).__name__}; fix or delete it."
        )
    return value


def _parquet_rows(path: Path) -> Iterator[FileRow]:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        # The index of a Parquet file is at its end: of one that is cut, nothing can be read.
        yield _broken_file(path, "at its end, where its index should be", error)
        return
    with file:
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=_NUM_ROWS_OF_COLUMNS, row_groups=[group]):
                    yield from _batch_rows(batch, first, path)
                    first += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                message = (
                    f"rows {first} to {end - 1} of {str(path)!r} cannot be read: {_reason(error)}; get the file again."
                )
                yield from (_break(BROKEN_ROW, message) for _ in range(first, end))
            first = end


def _batch_rows(batch: pa.RecordBatch, first: int, path: Path) -> Iterator[FileRow]:
    for number in range(batch.num_rows):
        try:
            (row,) = batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            row = _break(
                BROKEN_ROW,
                f"row {first + number} of {str(path)!r} cannot be read: {_reason(error)}; fix or delete it.",
            )
        yield row


_READERS: dict[str, Callable[[Path], Iterator[FileRow]]] = {
    "json": _json_rows,
    "parquet": _parquet_rows,
    "text": _text_rows,
}

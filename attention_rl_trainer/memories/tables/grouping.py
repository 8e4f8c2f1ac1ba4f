"""From rows with a key, a value and what they are about to one memory for each group of rows.

A fault is refused by the name of the source, the row, the group and the field. What is only missing or repeated is left
out, and counted in one line of the log.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import datasets

from attention_rl_trainer.memories.stream import Entries
from attention_rl_trainer.memories.tables.entries_table import EntriesTable

_MIN_PAIRS: Final = 2
"""One is the example, one is read."""

_logger = logging.getLogger(__name__)


def row_number(row: int) -> str:
    """Name a row, counted from 0."""
    return f"row {row}"


@dataclass(frozen=True)
class _Value:
    text: str
    row: int


@dataclass
class _Groups:
    """Groups in the order in which they appear, and what is left out on the way."""

    name: str
    columns: tuple[str, str, str]
    """Of the key, the value and the group."""
    place: Callable[[int], str]
    groups: dict[str, dict[str, _Value]] = field(default_factory=dict)
    first_rows: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    first_left_out: dict[str, int] = field(default_factory=dict)
    num_rows: int = 0

    def add(self, content: object) -> None:
        """Put the next row into its group."""
        row, self.num_rows = self.num_rows, self.num_rows + 1
        self._expect_columns(content, row)
        assert isinstance(content, Mapping)
        key_column, value_column, group_column = self.columns
        group = self._text(content, group_column, row, "")
        if not group:
            self._leave_out(f"without {group_column!r}", row)
            return
        self.first_rows.setdefault(group, row)
        values = self.groups.setdefault(group, {})
        key, value = (self._text(content, column, row, group) for column in (key_column, value_column))
        if not key or not value:
            self._leave_out(f"without {value_column if key else key_column!r}", row)
        elif key not in values:
            values[key] = _Value(value, row)
        elif values[key].text == value:
            self._leave_out("repeated", row)
        else:
            raise ValueError(
                f"{self._where(row, group, key_column)}: {key!r} is in {self.place(values[key].row)} already, with "
                "another value; delete one of the two, or make their keys differ."
            )

    def table(self) -> EntriesTable:
        """Join the groups to a table, and log what was left out."""
        self._report()
        if not self.groups:
            raise ValueError(
                f"{self.name!r} has no memory: of {self.num_rows} rows none has a {self.columns[2]!r}; give rows with "
                f"the columns {', '.join(map(repr, self.columns))}."
            )
        small = [group for group, values in self.groups.items() if len(values) < _MIN_PAIRS]
        if small:
            count = len(self.groups[small[0]])
            others = f" {len(small) - 1} other groups are as small." if len(small) > 1 else ""
            raise ValueError(
                f"{self._where(self.first_rows[small[0]], small[0], '')}: {count} {'pair' if count == 1 else 'pairs'} "
                f"of a key and a value, expected at least {_MIN_PAIRS}; add some, delete the group, or choose another "
                f"group_column.{others}"
            )
        rows = (
            Entries(group, self.name, tuple(f" {key}" for key in values), tuple(f" {v.text}" for v in values.values()))
            for group, values in self.groups.items()
        )
        return EntriesTable(self.name, tuple(rows))

    def _expect_columns(self, content: object, row: int) -> None:
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{self.name!r}, {self.place(row)}: expected a mapping such as "
                f"{{{', '.join(f'{column!r}: ...' for column in self.columns)}}}, got {_kind(content)}; give the rows "
                "of one table, of several splits one."
            )
        expect_columns(list(content), self.columns, f"{self.name!r}, {self.place(row)},")

    def _text(self, content: Mapping[str, object], column: str, row: int, group: str) -> str:
        """Read a field as a text without white space around it; "" where it is missing."""
        value = content[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool):
            # A table with gaps makes 1990 a float.
            return f"{value:.15g}" if isinstance(value, float) else str(value)
        if not isinstance(value, str):
            raise ValueError(
                f"{self._where(row, group, column)}: expected a text or a number, got {_kind(value)}; write it out as "
                "the text that is to be read."
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(
                f"{self._where(row, group, column)}: {half} is half a character; write the whole one."
            ) from error
        return value.strip()

    def _where(self, row: int, group: str, column: str) -> str:
        parts = [repr(self.name), self.place(row)]
        if group:
            parts.append(f"group {group!r}")
        return ", ".join([*parts, f"field {column!r}"] if column else parts)

    def _leave_out(self, reason: str, row: int) -> None:
        self.left_out[reason] += 1
        self.first_left_out.setdefault(reason, row)

    def _report(self) -> None:
        if self.left_out:
            counts = ", ".join(
                f"{count} {reason} (first: {self.place(self.first_left_out[reason])})"
                for reason, count in sorted(self.left_out.items())
            )
            _logger.warning(
                "%r: %d of %d rows are left out: %s.", self.name, self.left_out.total(), self.num_rows, counts
            )


def group_rows(
    rows: Iterable[object],
    key_column: str,
    value_column: str,
    group_column: str | None,
    *,
    name: str,
    place: Callable[[int], str] = row_number,
) -> EntriesTable:
    """Make a memory of each group of rows: those that are alike in ``group_column``.

    Groups stand in the order in which they first appear, and their pairs in the order of the rows. White space around a
    field is not part of it; a key and a value begin with one space each, as in running text. A number is a text too
    (1990.0 is "1990"). A row without a key, a value or a group (null, empty or white space), and one that repeats an
    earlier pair of its group, is left out, and counted by reason in one warning of the log.

    Args:
        rows: a `datasets.Dataset`, or mappings; read once.
        group_column: its text is the title of the memory. ``None`` is refused.
        name: of the source, for the entries and the messages.
        place: names a row, by its number from 0 on, in the messages.

    Raises:
        ValueError: a column is missing; a field is neither a text nor a number, or is not UTF-8; a key has two values
            in a group; a group has fewer than two pairs; there is no group.
    """
    columns = named_columns(key_column, value_column, group_column, name)
    if isinstance(rows, datasets.Dataset):
        expect_columns(rows.column_names, columns, repr(name))
        rows = rows.with_format(None).select_columns(list(columns))
    groups = _Groups(name, columns, place)
    try:
        for content in rows:
            groups.add(content)
    except UnicodeDecodeError as error:
        # Arrow takes any bytes for a string; only reading the row shows that they are not UTF-8.
        raise ValueError(f"{name!r}, {place(groups.num_rows)}: {error}; save it as UTF-8.") from error
    return groups.table()


def named_columns(
    key_column: str | None, value_column: str | None, group_column: str | None, name: str
) -> tuple[str, str, str]:
    """Return the columns of the key, the value and the group, if all are given and differ.

    Raises:
        ValueError: one is missing, or two are the same.
    """
    given = {"key_column": key_column, "value_column": value_column, "group_column": group_column}
    for argument, column in given.items():
        if column is None:
            others = " and ".join(f"{one} {value!r}" for one, value in given.items() if value is not None)
            raise ValueError(f"{name!r} is given with {others}, but without {argument}: {_PURPOSES[argument]}")
    columns = tuple(column for column in given.values() if column is not None)
    key, value, group = columns
    if len(set(columns)) < len(columns):
        raise ValueError(
            f"key_column, value_column and group_column of {name!r} must differ, got {key!r}, {value!r} and {group!r}."
        )
    return key, value, group


_PURPOSES: Final = {
    "key_column": "name the column of the keys, such as questions.",
    "value_column": "name the column of the values, such as answers.",
    "group_column": "name the column that says which rows are a memory, such as a topic; add one where there is none.",
}


def expect_columns(there: list[str], columns: tuple[str, str, str], where: str) -> None:
    """Refuse rows that lack a column.

    Raises:
        ValueError: begins with ``where``; names the column, those that are there, and the argument.
    """
    for argument, column in zip(_PURPOSES, columns, strict=True):
        if column not in there:
            raise ValueError(
                f"{where} has no column {column!r}; its columns are {', '.join(map(repr, there)) or 'none'}. Choose "
                f"one of them as {argument}."
            )


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return f"the truth value {value}"
    return f"a {type(value).__qualname__}"

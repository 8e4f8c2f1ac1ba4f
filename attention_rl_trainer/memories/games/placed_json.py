"""JSON whose values know where they stand, so that a fault in what they say is reported with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class Placed(NamedTuple):
    """A JSON value, and the position in the text at which it begins."""

    position: int
    value: object


@dataclass(frozen=True)
class PlacedJson:
    """The text of a file that is known to be JSON; values are read again, with their places, where they are asked for.

    ``where`` names a value in the errors about it.
    """

    path: str
    text: str

    @classmethod
    def read(cls, path: str) -> PlacedJson:
        """Read a file, with or without a byte order mark.

        Raises:
            ValueError: it is not UTF-8 or not JSON; gives the line, and the column.
            OSError: it cannot be opened.
        """
        content = Path(path).read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            wrong = error.object[error.start]
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ValueError(
                f"{path!r}, line {line}: the byte 0x{wrong:02x} is not UTF-8; save it as UTF-8."
            ) from error
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise ValueError(f"{path!r}, {where}: this is not JSON: {error.msg}; correct it there.") from error
        except (ValueError, RecursionError) as error:
            # A number of thousands of digits, or a thousand brackets.
            raise ValueError(f"{path!r}: cannot be read as JSON: {error}; correct it.") from error
        return cls(path, text)

    def fault(self, position: int, where: str, message: str) -> ValueError:
        """Make the error for what stands at a position; the message says what is wrong and what to do."""
        line = self.text.count("\n", 0, position) + 1
        return ValueError(f"{self.path!r}, line {line}: {f'{where}: ' if where else ''}{message}")

    def root(self) -> Placed:
        """The value that the whole file is."""
        position = self._after_space(0)
        return Placed(position, _DECODER.raw_decode(self.text, position)[0])

    def text_of(self, placed: Placed, where: str) -> str:
        """Take a text, without the white space around it.

        Raises:
            ValueError: it is not a text, is empty, or holds half a character.
        """
        if not isinstance(placed.value, str):
            raise self.fault(placed.position, where, f"expected a text, got {kind(placed.value)}.")
        text = placed.value.strip()
        if not text:
            raise self.fault(placed.position, where, "the text is empty; fill it in.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise self.fault(placed.position, where, f"{half} is half a character; write the whole one.") from error
        return text

    def fields(
        self, placed: Placed, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> dict[str, Placed]:
        """Take the fields of a JSON object.

        Raises:
            ValueError: it is not one, a required field is missing, or one is unknown or given twice.
        """
        known = ", ".join(repr(name) for name in (*required, *optional))
        if not isinstance(placed.value, dict):
            raise self.fault(
                placed.position, where, f"expected a JSON object with the fields {known}, got {kind(placed.value)}."
            )
        fields: dict[str, Placed] = {}
        for position, name, field in self.members(placed):
            if name not in (*required, *optional):
                raise self.fault(position, where, f"the field {name!r} is not one of {known}; rename or delete it.")
            if name in fields:
                raise self.fault(position, where, f"the field {name!r} is given twice; delete one.")
            fields[name] = field
        for name in required:
            if name not in fields:
                raise self.fault(placed.position, where, f"the field {name!r} is missing; add it.")
        return fields

    def elements(self, placed: Placed) -> Iterator[Placed]:
        """The elements of a list."""
        position = self._after_space(placed.position + 1)
        while self.text[position] != "]":
            value, end = _DECODER.raw_decode(self.text, position)
            yield Placed(position, value)
            position = self._after_comma(end)

    def members(self, placed: Placed) -> Iterator[tuple[int, str, Placed]]:
        """The members of a JSON object, repeated ones too: the position of the name, the name, and the value."""
        position = self._after_space(placed.position + 1)
        while self.text[position] != "}":
            name, end = _DECODER.raw_decode(self.text, position)
            colon = self._after_space(end)
            value_position = self._after_space(colon + 1)
            value, end = _DECODER.raw_decode(self.text, value_position)
            yield position, name, Placed(value_position, value)
            position = self._after_comma(end)

    def _after_comma(self, position: int) -> int:
        position = self._after_space(position)
        return self._after_space(position + 1) if self.text[position] == "," else position

    def _after_space(self, position: int) -> int:
        match = _SPACE.match(self.text, position)
        assert match is not None
        return match.end()


def kind(value: object) -> str:
    """Name a JSON value in a message."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "a JSON object"

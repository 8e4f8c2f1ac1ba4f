"""A table whose rows are the entries of a memory each, its splits and its held-out rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import datasets

from attention_rl_trainer.memories.stream import Entries
from attention_rl_trainer.memories.tables.draws import draw


@dataclass(frozen=True, repr=False)
class EntriesTable(Sequence[Entries]):
    """Memories in a fixed order.

    Raises:
        ValueError: two rows have one title.
    """

    name: str
    """Name or path of the source."""
    rows: tuple[Entries, ...]

    def __post_init__(self) -> None:
        title, count = next(iter(Counter(row.title for row in self.rows).most_common(1)), ("", 0))
        if count > 1:
            raise ValueError(f"{count} rows of {self.name!r} have the title {title!r}; rename or join them.")

    def __len__(self) -> int:
        """Return the number of memories."""
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> Entries: ...

    @overload
    def __getitem__(self, row: slice) -> EntriesTable: ...

    def __getitem__(self, row: int | slice) -> Entries | EntriesTable:
        """Return a memory by its number, from 0 on, or a table of some of them."""
        return EntriesTable(self.name, self.rows[row]) if isinstance(row, slice) else self.rows[row]

    def __repr__(self) -> str:
        """Name the source and count, since the texts of a table can be megabytes."""
        return f"{type(self).__name__}({self.name!r}, {len(self)} rows)"

    @property
    def num_pairs(self) -> int:
        """Keys with their values, in all memories."""
        return sum(len(row.keys) for row in self.rows)

    def skip(self, count: int) -> EntriesTable:
        """Leave out the first rows, as a data set of `datasets` does."""
        return self[count:]

    def split(self, split: str) -> EntriesTable:
        """Take all rows, ``"train"``, or a slice of them such as ``"train[:150]"`` or ``"train[10%:]"``.

        Raises:
            ValueError: as in `take_split`.
        """
        return take_split({"train": self}, split)

    def split_by_share(self, held_out_share: float, seed: int) -> tuple[EntriesTable, EntriesTable]:
        """Part the rows into those to train on and those held out, both in the table's order.

        Which are held out depends on the seed and the titles, and not on the order of the rows.

        Args:
            held_out_share: in (0, 1); this share of the rows, to the nearest one, is held out.
            seed: another one holds out others.

        Raises:
            ValueError: the share is out of its range, or leaves one of the parts empty.
        """
        num_held_out = math.floor(held_out_share * len(self) + 0.5) if 0 < held_out_share < 1 else 0
        if not 0 < num_held_out < len(self):
            raise ValueError(
                f"held_out_share must be in (0, 1) and leave at least one of the {len(self)} rows of {self.name!r} in "
                f"each part, got {held_out_share!r}."
            )
        titles = {row.title for row in self.rows}
        held_out = set(sorted(titles, key=lambda title: (draw(seed, title), title))[:num_held_out])
        return self._part(titles - held_out), self._part(held_out)

    def _part(self, titles: Collection[str]) -> EntriesTable:
        return EntriesTable(self.name, tuple(row for row in self.rows if row.title in titles))


def take_split(parts: Mapping[str, EntriesTable], split: str) -> EntriesTable:
    """Take what a split names of tables: a part, a slice of one, or a sum of these, as `datasets` writes them.

    Args:
        parts: tables of one source by the name of their split.
        split: such as ``"test"``, ``"train[:100]"``, ``"train[-10%:]"`` or ``"train+test"``.

    Raises:
        ValueError: it cannot be read, there is no such part, or nothing is in it.
    """
    name = next(iter(parts.values())).name
    try:
        chosen = datasets.ReadInstruction.from_spec(split).to_absolute({part: len(parts[part]) for part in parts})
    except (AssertionError, TypeError, ValueError) as error:
        known = " and ".join(repr(part) for part in parts)
        raise ValueError(
            f"The split {split!r} of {name!r} cannot be read: {error} There is {known}, and slices such as "
            f"{next(iter(parts)) + '[:100]'!r}."
        ) from error
    rows = [row for one in chosen for row in parts[one.splitname].rows[one.from_ : one.to]]
    if not rows:
        counts = ", ".join(f"{part!r} has {len(table)}" for part, table in parts.items())
        raise ValueError(f"The split {split!r} of {name!r} is empty: {counts} rows.")
    return EntriesTable(name, tuple(rows))

"""From a source of articles to an endless stream of them, each with its place in the order (design §3).

No article comes twice before the source is exhausted; the next epoch has another order. Every article carries the
position after it, so that a run that stops resumes with the next one.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Final, Protocol, TypeAlias, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa

from attention_rl_trainer.memories.articles.files import BROKEN_ROW
from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.articles.wikipedia import ArticleTable
from attention_rl_trainer.types import StreamPosition

SKIP_REASON_COLUMN = "skip_reason"
"""Column in which a source says why a row is not an article; "" where it is one."""

READING_ERRORS = (pa.ArrowException, UnicodeDecodeError, EOFError)
"""What a streamed source raises where its files are damaged."""

Row: TypeAlias = Mapping[str, object]

_BEGINNING: Final = StreamPosition()

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Article:
    """The text of an article."""

    title: str
    """Its title, or "article {row}" where the source has none."""
    text: str
    """Plain text, never empty where a stream yields it."""
    source: str
    """Name or path of the source."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Keys and values that belong together, such as a game's questions about one object, or the fields of a country."""

    title: str
    """What they are about."""
    source: str
    """Name or path of the source."""
    keys: tuple[str, ...]
    """None is empty."""
    values: tuple[str, ...]
    """As many; none is empty."""


@dataclass(frozen=True, slots=True)
class PositionedArticle:
    """An article, or entries, and its place in the stream."""

    article: Article | Entries
    position: StreamPosition
    """The place before it: its epoch, and its index in the order of that epoch."""
    next_position: StreamPosition
    """The place after it, from which a stream resumes."""
    row: int
    """Identity of the article: its row in the source; in a streamed source, whose rows have no numbers, its index in
    the order of the epoch."""


@runtime_checkable
class ArticleSource(Protocol):
    """Articles or entries of a user's own: whatever has a length and gives rows by number, such as a list.

    A row is an `Article`, an `Entries`, or a mapping with a column of text and, where there are titles, a ``title``.
    Rows are read in any order and several times; the same number must give the same row.
    """

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, row: int, /) -> Row | Article | Entries:
        """Return a row by its number, from 0."""


Articles: TypeAlias = ArticleTable | ArticleSource


class ArticleStream:
    """An endless, shuffled, resumable stream of articles.

    A source with a length is read in a permutation of its rows, and entering it anywhere costs nothing. A streamed
    source is shuffled through a buffer, and entered by reading it again up to the position. Both orders depend on
    ``(seed, epoch)`` alone. Iterating anew starts again at ``position``.

    Args:
        source: name under which the articles are known.
        title_column: column of the title, used where a row has it.
        shuffle: read in another order in every epoch, the first one included; else in the order of the source.
        shuffle_buffer_size: rows of a streamed source from which the next one is drawn.
        num_epochs: stop after the epoch of this number (counted from the very first); None never stops.

    Attributes:
        skipped: how many rows were passed over since the stream was made, by reason: the reason the
            source gives, "not_a_string" (also None, a number or bytes), "empty" (also white space alone), or
            "broken_row" for a row of a table that is not valid UTF-8. The first of the latter is logged.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        dataset: Articles,
        *,
        source: str,
        seed: int,
        text_column: str = "text",
        title_column: str = "title",
        shuffle: bool = True,
        shuffle_buffer_size: int = 1000,
        position: StreamPosition = _BEGINNING,
        num_epochs: int | None = None,
    ) -> None:
        for name, value in (("shuffle_buffer_size", shuffle_buffer_size), ("num_epochs", num_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}.")
        self.position = position
        self.skipped: Counter[str] = Counter()
        self._dataset = dataset
        self._text_column = text_column
        self._title_column = title_column
        self._source = source
        self._seed = seed
        self._shuffle = shuffle
        self._shuffle_buffer_size = shuffle_buffer_size
        self.num_epochs = num_epochs

    def __iter__(self) -> Iterator[PositionedArticle]:
        """Yield the articles from ``position`` on.

        Raises:
            ValueError: a whole epoch gives no article, or a row is not one or lacks the column of the
                text, or a streamed source that is not read by `load_articles` from local files is damaged.
        """
        start = self.position.index
        for epoch in itertools.count(self.position.epoch):
            if self.num_epochs is not None and epoch >= self.num_epochs:
                return
            skipped_before = self.skipped.copy()
            is_empty = True
            for item in self._epoch(epoch, start):
                is_empty = False
                yield item
            if is_empty and start == 0:
                raise self._no_article(epoch, self.skipped - skipped_before)
            start = 0

    def _epoch(self, epoch: int, start: int) -> Iterator[PositionedArticle]:
        for index, row, content in self._ordered_rows(epoch, start):
            article = self._read(content, row)
            if article is not None:
                yield PositionedArticle(article, StreamPosition(epoch, index), StreamPosition(epoch, index + 1), row)

    def _ordered_rows(self, epoch: int, start: int) -> Iterator[tuple[int, int, Row | Article | Entries]]:
        """Yield (index in the order, row, content) from an index on."""
        if isinstance(self._dataset, datasets.IterableDataset):
            contents: Iterable[Row] = self._streamed_rows(self._dataset, epoch)
            try:
                for index, content in itertools.islice(enumerate(contents), start, None):
                    yield index, index, content
            except READING_ERRORS as error:
                raise ValueError(
                    f"Epoch {epoch} of {self._source!r} breaks within {self._shuffle_buffer_size} rows of row {index}: "
                    f"{error}. Get its files again, or give them as local files, of which what is intact is used."
                ) from error
        else:
            order = self._order(epoch)
            for index in range(start, len(order)):
                row = int(order[index])
                yield index, row, self._row(row)

    def _row(self, row: int) -> Row | Article | Entries:
        try:
            return self._dataset[row]
        except UnicodeDecodeError as error:
            # Arrow takes any bytes for a string; only reading the row shows that they are not UTF-8.
            if not self.skipped[BROKEN_ROW]:
                _logger.warning("Row %d of %r cannot be read, and is passed over: %s", row, self._source, error)
            return {SKIP_REASON_COLUMN: BROKEN_ROW}

    def _order(self, epoch: int) -> Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]:
        num_rows = len(self._dataset)
        return np.random.default_rng((self._seed, epoch)).permutation(num_rows) if self._shuffle else range(num_rows)

    def _streamed_rows(self, rows: datasets.IterableDataset, epoch: int) -> datasets.IterableDataset:
        if self._shuffle:
            rows = rows.shuffle(seed=self._seed, buffer_size=self._shuffle_buffer_size)
            rows.set_epoch(epoch)
        return rows

    def _read(self, content: Row | Article | Entries, row: int) -> Article | Entries | None:
        """Read a row as an article or as entries, or count it as skipped."""
        expect_row(content, f"Row {row} of {self._source!r}", self._text_column)
        article: Article | Entries
        if isinstance(content, Entries):
            article, reason = content, ""
        elif isinstance(content, Article):
            article, reason = content, "" if content.text.strip() else "empty"
        else:
            article, reason = self._read_columns(content, row)
        if reason:
            self.skipped[reason] += 1
            return None
        return replace(article, title=_writable(article.title), source=_writable(article.source))

    def _read_columns(self, content: Row, row: int) -> tuple[Article, str]:
        if reason := is_not_an_article(content):
            return Article("", "", self._source), reason
        text = content[self._text_column]
        if not isinstance(text, str):
            return Article("", "", self._source), "not_a_string"
        title = content.get(self._title_column)
        article = Article(title if isinstance(title, str) and title else f"article {row}", text, self._source)
        return article, "" if text.strip() else "empty"

    def _no_article(self, epoch: int, skipped: Counter[str]) -> ValueError:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        return ValueError(
            f"Epoch {epoch} of {self._source!r} holds no article; rows passed over: "
            f"{counts or 'none, there is no row for it'}. Give a source with at least one article."
        )


def is_not_an_article(row: Row) -> str:
    """Return the reason for which a source says that a row is not an article, or ""."""
    reason = row.get(SKIP_REASON_COLUMN)
    return reason if isinstance(reason, str) else ""


def expect_row(row: object, name: str, text_column: str) -> None:
    """Refuse what is neither an `Article` nor a mapping with the column of the text, nor marked as not an article.

    Raises:
        ValueError: begins with ``name``; says what was found and the way out.
    """
    if isinstance(row, Entries) and len(row.keys) != len(row.values):
        raise ValueError(f"{name}, {row.title!r}, has {len(row.keys)} keys and {len(row.values)} values; give pairs.")
    if isinstance(row, Article | Entries):
        return
    if not isinstance(row, Mapping):
        way_out = f"give rows such as {{{text_column!r}: ...}}"
        if isinstance(row, str):
            way_out += f", for a list of texts [{{{text_column!r}: text}} for text in texts]"
        elif type(row).__module__.partition(".")[0] in ("pandas", "polars", "pyarrow"):
            way_out += ", of a data set .with_format(None)"
        raise ValueError(f"{name} is of type {type(row).__qualname__}, neither an Article nor a mapping; {way_out}.")
    if not is_not_an_article(row) and text_column not in row:
        raise ValueError(
            f"{name} has no column {text_column!r}; its columns are {', '.join(map(repr, row)) or 'none'}. Choose the "
            "one that holds the text with the option dataset_text_column."
        )


def _writable(name: str) -> str:
    """Replace what no file could hold: half of a surrogate pair, which JSON can spell."""
    return name.encode("utf-8", "replace").decode("utf-8")


def iter_wikipedia_articles(
    name_or_path: str | PathLike[str] = "wikimedia/wikipedia",
    config_name: str | None = None,
    *,
    split: str = "train",
    streaming: bool | None = None,
    text_column: str = "text",
    seed: int = 0,
    shuffle: bool = False,
    num_epochs: int | None = 1,
) -> Iterator[Article]:
    """Iterate over the articles of a source, opened as `load_articles` does, without the pages that are not articles.

    Args:
        seed: seed of the order, used with ``shuffle``.
        shuffle: read in another order in every epoch.
        num_epochs: passes over the source; None never stops.

    Returns:
        The articles. The source is opened at once, and read while iterating.

    Raises:
        ValueError: the source cannot be read, or holds no article; and what else `load_articles` raises.
    """
    table = load_articles(name_or_path, config_name, split, streaming, text_column)
    stream = ArticleStream(
        table, source=str(name_or_path), seed=seed, text_column=text_column, shuffle=shuffle, num_epochs=num_epochs
    )
    return (item.article for item in stream if isinstance(item.article, Article))

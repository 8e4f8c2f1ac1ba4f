"""What a user gives as articles: taken, or refused by name before anything is loaded or read for long."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import datasets

from attention_rl_trainer.memories.stream import SKIP_REASON_COLUMN, expect_row

_EXPECTED = (
    "articles are a (streamed) data set of the library `datasets`, or what has a length and gives rows by number, such "
    "as a list of {{{column!r}: ...}}"
)
_TABLES = {
    ("pandas", "DataFrame"): "datasets.Dataset.from_pandas(frame)",
    ("polars", "DataFrame"): "datasets.Dataset.from_polars(frame)",
    ("pyarrow", "Table"): "datasets.Dataset(table)",
}


def expect_articles(articles: Any, argument: str, text_column: str) -> None:
    """Refuse what a run could not read as articles; of a stream nothing is read, of other sources the first row.

    Args:
        articles: what was given.
        argument: the name of the argument, which begins the message.
        text_column: column that holds the text.

    Raises:
        ValueError: says what was found, what is expected and the way out.
    """
    way_out = _way_out(articles, argument)
    if way_out is not None:
        kind = f"{type(articles).__module__}.{type(articles).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"{argument} is of type {kind}; {_EXPECTED.format(column=text_column)}. {way_out}")
    if isinstance(articles, datasets.Dataset | datasets.IterableDataset) and articles.column_names is not None:
        expect_row(dict.fromkeys(articles.column_names), argument, text_column)
    if isinstance(articles, datasets.IterableDataset):
        return
    if len(articles) == 0:
        raise ValueError(f"{argument} has no row; {_EXPECTED.format(column=text_column)}.")
    for number, row in enumerate(articles if isinstance(articles, list | tuple) else [_first_row(articles, argument)]):
        expect_row(row, f"Row {number} of {argument}", text_column)


def expect_data(train_dataset: object, eval_dataset: object, text_column: str) -> None:
    """Refuse, as `expect_articles` does, what a trainer was given; the evaluation set may be several sets by name."""
    if train_dataset is not None:
        expect_articles(train_dataset, "train_dataset", text_column)
    if isinstance(eval_dataset, dict):
        if not eval_dataset:
            raise ValueError("eval_dataset is an empty dict; give articles, or sets of articles by name.")
        for name, part in eval_dataset.items():
            expect_articles(part, f"eval_dataset[{str(name)!r}]", text_column)
    elif eval_dataset is not None:
        expect_articles(eval_dataset, "eval_dataset", text_column)


def _first_row(articles: Any, argument: str) -> object:
    try:
        return articles[0]
    except UnicodeDecodeError as error:
        # The stream counts such a row as skipped.
        return {SKIP_REASON_COLUMN: str(error)}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Row 0 of {argument}, a {type(articles).__qualname__} of length {len(articles)}, cannot be read by its "
            f"number: {type(error).__name__}: {error}. Give rows by the numbers from 0 on, such as a list."
        ) from error


def _way_out(articles: object, argument: str) -> str | None:
    """Say what to give instead of what has the wrong type; None if the type is fine."""
    if isinstance(articles, datasets.DatasetDict | datasets.IterableDatasetDict):
        splits = [repr(str(split)) for split in articles]
        return f"It has the splits {', '.join(splits) or 'none'}: give one of them, as {argument}=splits['train']."
    if isinstance(articles, Mapping):
        return "A dict of columns becomes a data set by datasets.Dataset.from_dict(columns)."
    if isinstance(articles, str | PathLike):
        return f"Load what it names: {argument}=load_articles({reprlib.repr(fspath(articles))})."
    if isinstance(articles, Iterator):
        return "It can be read only once: give list(articles), or datasets.IterableDataset.from_generator(function)."
    made_by = _TABLES.get((type(articles).__module__.partition(".")[0], type(articles).__name__))
    if made_by is not None:
        return f"A data set is made of it by {made_by}."
    if isinstance(articles, type):
        return "It is a class: give an object of it."
    lacking = [name for name in ("__len__", "__getitem__") if not hasattr(articles, name)]
    if lacking and not isinstance(articles, datasets.IterableDataset):
        return f"It lacks {' and '.join(lacking)}."
    return None

"""What is given as articles is taken, or refused by name in the trainer's constructor, before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tiny import tiny_config
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset

from attention_rl_trainer.memories.given import expect_articles, expect_data
from attention_rl_trainer.memories.stream import Article, ArticleStream
from attention_rl_trainer.trainer import AttentionGuidedRLTrainer

ROWS = [{"title": "A", "text": "a"}, {"title": "B", "text": "b"}]
TEXTS = ["a", "b"]


def table() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


def rows() -> Iterator[dict[str, str]]:
    yield from ROWS


def both(part: Any) -> dict[str, Any]:
    return {"train": part, "test": part}


class Lengthless(TorchIterableDataset[Any]):
    def __iter__(self) -> Iterator[dict[str, str]]:
        return rows()


class ByTitle:
    """Gives rows by their titles."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, title: str) -> dict[str, str]:
        return {row["title"]: row for row in ROWS}[title]


class ByNumber:
    """What a user may write, even where it counts as false."""

    def __bool__(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, row: int) -> dict[str, str]:
        return ROWS[row]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "DatasetDict": (lambda: datasets.DatasetDict(both(table())), r"DatasetDict; .*splits 'train', 'test': give one"),
    "IterableDatasetDict": (
        lambda: datasets.IterableDatasetDict(both(table().to_iterable_dataset())),
        r"IterableDatasetDict; .*splits 'train', 'test': give one of them, as \w+=splits\['train'\]",
    ),
    "an empty DatasetDict": (datasets.DatasetDict, "has the splits none"),
    "dict of sets": (lambda: both(table()), r"of type dict; .*Dataset\.from_dict"),
    "dict of columns": (lambda: {"title": ["A", "B"], "text": TEXTS}, r"of type dict; .*Dataset\.from_dict\(columns\)"),
    "DataFrame": (lambda: pd.DataFrame(ROWS), r"of type pandas\.\S*DataFrame; .*Dataset\.from_pandas\(frame\)"),
    "Series": (lambda: pd.Series(TEXTS), r"Row 0 of \w+ is of type str, .*\[\{'text': text\} for text in texts\]"),
    "pyarrow table": (lambda: pa.Table.from_pylist(ROWS), r"of type pyarrow\.lib\.Table; .*datasets\.Dataset\(table\)"),
    "generator": (rows, "of type generator; .*read only once: give list"),
    "generator function": (lambda: rows, "of type function; .*It lacks __len__ and __getitem__"),
    "map": (lambda: map(dict, ROWS), "of type map; .*read only once"),
    "texts": (lambda: TEXTS, r"Row 0 of \w+ is of type str, neither an Article nor a mapping; .*text in texts\]"),
    "a text among rows": (lambda: [*ROWS, "c"], r"Row 2 of \w+ is of type str"),
    "array of texts": (lambda: np.array(TEXTS), r"Row 0 of \w+ is of type str_?, neither"),
    "rows as tuples": (lambda: [("A", "a")], r"Row 0 of \w+ is of type tuple, neither .*give rows such as \{'text'"),
    "tokens": (lambda: [[1, 2, 3]], r"Row 0 of \w+ is of type list, neither"),
    "name": (lambda: "offline", r"of type str; .*=load_articles\('offline'\)"),
    "path": (lambda: Path("a.jsonl"), r"of type pathlib\.PosixPath; .*=load_articles\('a\.jsonl'\)"),
    "bytes": (lambda: b"text", r"Row 0 of \w+ is of type int"),
    "set": (lambda: {"a", "b"}, "of type set; .*It lacks __getitem__"),
    "number": (lambda: 3, "of type int; .*It lacks __len__ and __getitem__"),
    "class": (lambda: ByNumber, "of type type; .*It is a class: give an object"),
    "torch stream": (Lengthless, "Lengthless; .*It lacks __len__"),
    "torch loader": (lambda: DataLoader(ROWS), "DataLoader; .*It lacks __getitem__"),
    "source by title": (ByTitle, r"Row 0 of \w+, a ByTitle of length 2, cannot be read by its number: KeyError: 0\. "),
    "no row": (list, r"\w+ has no row; articles are"),
    "empty data set": (lambda: table().select([]), "has no row"),
    "pandas format": (lambda: table().with_format("pandas"), r"is of type DataFrame, .*\.with_format\(None\)"),
    "arrow format": (lambda: table().with_format("arrow"), r"is of type Table, .*\.with_format\(None\)"),
    "other column": (lambda: table().rename_column("text", "body"), "no column 'text'; its columns are 'title', 'bo"),
    "other column of a stream": (
        lambda: table().rename_column("text", "body").to_iterable_dataset(),
        r"has no column 'text'; its columns are 'title', 'body'\. Choose .*dataset_text_column",
    ),
    "other column of a list": (lambda: [*ROWS, {"body": "c"}], r"Row 2 of \w+ has no column 'text'; .* are 'body'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_articles_is_refused_by_the_constructor_before_the_model_is_looked_for(
    name: str, tmp_path: Path
) -> None:
    make, message = REFUSED[name]
    # A model of this name does not exist.
    with pytest.raises(ValueError, match=message) as error:
        AttentionGuidedRLTrainer(str(tmp_path / "nowhere"), tiny_config(tmp_path), train_dataset=make())
    assert "train_dataset" in str(error.value)
    if name in ("DatasetDict", "IterableDatasetDict", "dict of sets"):
        return
    with pytest.raises(ValueError, match="eval_dataset"):
        AttentionGuidedRLTrainer(str(tmp_path / "nowhere"), tiny_config(tmp_path), eval_dataset=make())
    with pytest.raises(ValueError, match=r"eval_dataset\['held out'\]"):
        expect_data(None, {"held out": make()}, "text")


def test_sets_by_name_are_for_evaluation_and_none_may_be_missing() -> None:
    for parts in (both(table()), both(ROWS), datasets.DatasetDict(both(table()))):
        expect_data(None, parts, "text")
    streams = datasets.IterableDatasetDict(both(table().to_iterable_dataset()))
    expect_data(ROWS, streams, "text")
    with pytest.raises(ValueError, match="eval_dataset is an empty dict"):
        expect_data(None, {}, "text")
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\] is of type NoneType"):
        expect_data(None, {"a": None}, "text")


TAKEN: dict[str, Callable[[], object]] = {
    "rows": lambda: ROWS,
    "tuple of rows": lambda: tuple(ROWS),
    "articles": lambda: [Article("A", "a", "mine")],
    "articles and rows": lambda: [Article("A", "a", "mine"), *ROWS],
    "a row that is not an article": lambda: [{"title": "A", "skip_reason": "redirect"}, *ROWS],
    "data set": table,
    "numpy format": lambda: table().with_format("numpy"),
    "torch format": lambda: table().with_format("torch"),
    "stream": lambda: table().to_iterable_dataset(),
    "stream without columns": lambda: datasets.IterableDataset.from_generator(rows),
    "source": ByNumber,
    "array of rows": lambda: np.array(ROWS, dtype=object),
    "a row that is not a text": lambda: [{"text": None}],
    "made of a frame": lambda: datasets.Dataset.from_pandas(pd.DataFrame(ROWS)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_articles_are_taken(name: str) -> None:
    expect_articles(TAKEN[name](), "train_dataset", "text")


def test_of_a_stream_nothing_is_read() -> None:
    def unreadable() -> Iterator[dict[str, str]]:
        raise AssertionError("the stream was read")
        yield {}

    expect_articles(datasets.IterableDataset.from_generator(unreadable), "train_dataset", "text")


def test_a_row_that_is_not_valid_utf8_is_left_to_the_stream_which_counts_it() -> None:
    texts = pa.array([b"\xff", b"b"], pa.binary()).view(pa.string())
    broken = datasets.Dataset(pa.table({"text": texts}))
    expect_articles(broken, "train_dataset", "text")
    stream = ArticleStream(broken, source="broken", seed=0, shuffle=False, num_epochs=1)
    assert [item.article.text for item in stream] == ["b"]
    assert stream.skipped == {"broken_row": 1}


class TurnsWrong(ByNumber):
    def __getitem__(self, row: int) -> Any:
        return ROWS[0] if row == 0 else "a text"


def test_a_row_that_is_found_to_be_wrong_in_the_middle_is_named() -> None:
    stream = ArticleStream(TurnsWrong(), source="mine", seed=0, shuffle=False, num_epochs=1)
    with pytest.raises(ValueError, match=r"Row 1 of 'mine' is of type str, neither an Article nor a mapping"):
        list(stream)
    formatted = table().to_iterable_dataset().with_format("arrow")
    with pytest.raises(ValueError, match=r"Row 0 of 'mine' is of type Table, .*with_format\(None\)"):
        list(ArticleStream(formatted, source="mine", seed=0, shuffle=False, num_epochs=1))

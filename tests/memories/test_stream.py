"""The stream over a source: order, resuming, shares, and what is passed over and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from made_up_sources import ROWS, as_json_lines

from attention_rl_trainer import hub
from attention_rl_trainer.memories.stream import (
    Article,
    ArticleStream,
    PositionedArticle,
    iter_wikipedia_articles,
)
from attention_rl_trainer.types import StreamPosition


def stream_of(dataset: object, **options: object) -> ArticleStream:
    return ArticleStream(dataset, **{"source": "rows", "seed": 7, "shuffle_buffer_size": 8, **options})


def streamed() -> datasets.IterableDataset:
    return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)


class OwnSource:
    """What a user may write: a length, and rows by number."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, row: int) -> dict[str, str]:
        return ROWS[row]


KINDS = {
    "list": lambda: ROWS,
    "articles": lambda: [Article(row["title"], row["text"], "mine") for row in ROWS],
    "source": OwnSource,
    "map": lambda: datasets.Dataset.from_list(ROWS),
    "streamed": streamed,
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def titles(items: Sequence[PositionedArticle]) -> list[str]:
    return [item.article.title for item in items]


@every_kind
def test_an_epoch_holds_every_article_once_and_the_next_one_in_another_order(make: Callable[[], object]) -> None:
    items = list(islice(stream_of(make()), 90))
    epochs = [titles(items[start : start + 30]) for start in (0, 30, 60)]
    assert all(sorted(epoch) == sorted(row["title"] for row in ROWS) for epoch in epochs)
    in_order = [row["title"] for row in ROWS]
    assert len({tuple(order) for order in [*epochs, in_order]}) == 4
    assert [item.position for item in items] == [StreamPosition(i // 30, i % 30) for i in range(90)]
    assert all(item.next_position == StreamPosition(i // 30, i % 30 + 1) for i, item in enumerate(items))


@every_kind
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_resumed_at_any_place_continues_identically(make: Callable[[], object], shuffle: bool) -> None:
    whole = list(stream_of(make(), num_epochs=2, shuffle=shuffle))
    for taken in (1, 13, 29, 30, 31, 59):
        saved = json.loads(json.dumps(whole[taken - 1].next_position.to_dict()))
        resumed = stream_of(make(), num_epochs=2, shuffle=shuffle, position=StreamPosition.from_dict(saved))
        assert list(resumed) == whole[taken:]


@every_kind
def test_a_stream_starts_again_where_it_started(make: Callable[[], object]) -> None:
    stream = stream_of(make(), position=StreamPosition(1, 5))
    assert list(islice(stream, 40)) == list(islice(stream, 40))


@every_kind
def test_without_shuffling_every_epoch_has_the_order_of_the_source(make: Callable[[], object]) -> None:
    items = list(stream_of(make(), shuffle=False, num_epochs=2))
    assert titles(items) == [row["title"] for row in ROWS] * 2
    assert [item.row for item in items] == list(range(30)) * 2


def test_another_seed_is_another_order() -> None:
    orders = {tuple(titles(list(stream_of(ROWS, seed=seed, num_epochs=1)))) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("kind", ["list", "map", "source"])
def test_the_row_of_an_article_is_the_same_in_every_epoch(kind: str) -> None:
    for item in stream_of(KINDS[kind](), num_epochs=3):
        assert item.article.title == ROWS[item.row]["title"]


def test_rows_that_are_not_articles_are_passed_over_and_counted() -> None:
    rows = [
        {"title": "A", "text": "a", "skip_reason": ""},
        {"title": "B", "text": "", "skip_reason": "redirect"},
        {"title": "C", "text": None, "skip_reason": ""},
        {"title": "D", "text": " \n", "skip_reason": ""},
        {"title": "E", "text": "", "skip_reason": "redirect"},
        {"title": None, "text": "f", "skip_reason": None},
    ]
    stream = stream_of(rows, shuffle=False, num_epochs=2)
    items = list(stream)
    assert titles(items) == ["A", "article 5"] * 2
    assert [item.position.index for item in items] == [0, 5, 0, 5]
    assert stream.skipped == Counter(redirect=4, not_a_string=2, empty=2)


def test_articles_without_a_title_are_numbered_and_columns_can_be_chosen() -> None:
    items = list(stream_of([{"text": "a"}, {"text": "b"}], shuffle=False, num_epochs=1))
    assert titles(items) == ["article 0", "article 1"]
    rows = [{"name": "N", "body": "b"}]
    (item,) = stream_of(rows, text_column="body", title_column="name", num_epochs=1)
    assert item.article == Article("N", "b", "rows")


def test_articles_of_the_user_keep_their_source() -> None:
    (item,) = stream_of([Article("T", "text", "mine")], num_epochs=1)
    assert item.article.source == "mine"
    stream = stream_of([Article("T", " ", "mine"), Article("U", "text", "mine")], num_epochs=1)
    assert titles(list(stream)) == ["U"]
    assert stream.skipped == {"empty": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_without_an_article_is_an_error_with_the_counts(streaming: bool) -> None:
    rows = datasets.Dataset.from_list([{"text": "", "skip_reason": reason} for reason in ("list", "redirect", "list")])
    stream = stream_of(rows.to_iterable_dataset() if streaming else rows)
    with pytest.raises(ValueError, match="Epoch 0 of 'rows' holds no article; rows passed over: 2 list, 1 redirect"):
        next(iter(stream))


def test_a_source_without_a_row_is_an_error() -> None:
    stream = stream_of([])
    message = "no article; rows passed over: none, there is no row for it. Give a source with at"
    with pytest.raises(ValueError, match=message):
        next(iter(stream))


def test_the_rest_of_an_epoch_may_hold_no_article() -> None:
    rows = [{"text": "a"}, {"text": ""}]
    items = list(stream_of(rows, shuffle=False, num_epochs=2, position=StreamPosition(0, 1)))
    assert [item.position for item in items] == [StreamPosition(1, 0)]


def test_a_row_without_the_text_column_is_an_error() -> None:
    with pytest.raises(ValueError, match="Row 0 of 'rows' has no column 'text'; its columns are 'body'"):
        next(iter(stream_of([{"body": "b"}])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size must be at least 1, got 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream_of(ROWS, **options)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 1}, r"must have the keys 'epoch' and 'index', got \['epoch'\]"),
        ({"epoch": 1, "index": 2, "row": 3}, "must have the keys"),
        ({"epoch": 1, "index": 2.5}, "must be integers"),
        ({"epoch": 1, "index": True}, "must be integers"),
        ({"epoch": -1, "index": 0}, "epoch and index must be at least 0, got -1 and 0"),
    ],
)
def test_a_damaged_position_is_refused(state: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamPosition.from_dict(state)


def test_a_damaged_stream_of_another_reader_is_an_error_with_the_place() -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ROWS[:20]
        raise pa.ArrowInvalid("the page header is damaged")

    stream = ArticleStream(datasets.IterableDataset.from_generator(rows), source="theirs", seed=0, shuffle=False)
    with pytest.raises(
        ValueError, match=r"'theirs' breaks within 1000 rows of row (19|20): the page header is damaged\. Get"
    ):
        list(stream)


def test_iterating_is_one_pass_in_the_order_of_the_source_by_default(tmp_path: Path) -> None:
    path = str(as_json_lines(tmp_path / "a.jsonl"))
    assert list(iter_wikipedia_articles(path)) == [Article(row["title"], row["text"], path) for row in ROWS]
    shuffled = list(islice(iter_wikipedia_articles(path, seed=1, shuffle=True, num_epochs=None), 60))
    assert len({article.title for article in shuffled[:30]}) == 30
    assert shuffled[:30] != shuffled[30:]


def test_iterating_opens_the_source_at_once() -> None:
    with pytest.raises(hub.HubUnreachableError):
        iter_wikipedia_articles()

"""Entries through the loader of a run: what takes part, what is cut, refused, shuffled, shared and resumed."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.loading import MemoryLoader, ReadingOptions
from attention_rl_trainer.memories.pairs import MemoryBatch, MemoryRow, Window
from attention_rl_trainer.memories.stream import ArticleStream, Entries
from attention_rl_trainer.memories.tables import EntriesTable
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.records.identity import article_facts
from attention_rl_trainer.types import StreamPosition, is_token

# Four pairs in a memory and one for the example, of eight that take part.
SIZES: dict[str, Any] = {"num_kv_pairs": 8, "subset_fraction": 0.5, "tokens_per_key": 6, "tokens_per_value": 3}
MEMORY = 4


def things(count: int, num_pairs: int = 8) -> list[Entries]:
    """Objects whose keys and values say which they are: " k3" has the value " v3.7" of object 7."""
    return [entries(f"thing {number}", [f" v{pair}.{number}" for pair in range(num_pairs)]) for number in range(count)]


def entries(title: str, values: Iterable[str], keys: Iterable[str] | None = None) -> Entries:
    values = tuple(values)
    return Entries(title, "tests", tuple(f" k{n}" for n in range(len(values))) if keys is None else tuple(keys), values)


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> PlainTextEncoder:
    return PlainTextEncoder(tokenizer)


class Reader:
    """A loader of made-up options, and what it reads."""

    def __init__(self, encoder: PlainTextEncoder, seed: int = 3, **changes: Any) -> None:
        self.encoder, self.seed = encoder, seed
        self.options = ReadingOptions(**SIZES | changes)
        self.loader = MemoryLoader(self.options, encoder, seed)

    def stream(self, source: Any, position: StreamPosition | None = None) -> ArticleStream:
        return self.loader.training_stream(source, position or StreamPosition())

    def rows(self, source: Any, count: int, position: StreamPosition | None = None) -> list[MemoryRow]:
        return list(itertools.islice(self.loader.rows(self.stream(source, position)), count))

    def batches(
        self, source: Any, count: int, size: int = 4, position: StreamPosition | None = None
    ) -> list[MemoryBatch]:
        loader = self.loader.batches(self.stream(source, position), size)
        return [inputs["memories"] for inputs in itertools.islice(loader, count)]

    def example_of(self, row: MemoryRow) -> int:
        """The number in the example's key."""
        key = row.example[: self.options.tokens_per_key]
        return int(self.encoder.decode(key).removeprefix(" k"))


def taking_part(rows: Iterable[MemoryRow]) -> set[int]:
    return {number for row in rows for number in row.pair_numbers.tolist()}


def described(row: MemoryRow) -> tuple[Any, ...]:
    return row.article, row.pair_numbers.tolist(), row.chunks.tolist(), row.example.tolist()


def padding_of(tokens: torch.Tensor) -> torch.Tensor:
    return ~is_token(tokens)


class TestDraws:
    def test_a_memory_is_that_of_its_keys_and_values(self, encoder: PlainTextEncoder) -> None:
        (batch,) = Reader(encoder).batches(things(4), 1)
        for row, article in enumerate(batch.articles):
            number = article.title.removeprefix("thing ")
            assert (article.source, article.article_index) == ("tests", int(number))
            for column, pair in enumerate(batch.pair_numbers[row].tolist()):
                assert encoder.decode(batch.key_tokens[row, column]) == f" k{pair}"
                # Cut to three tokens.
                ids = encoder.encode(f" v{pair}.{number}")
                assert encoder.decode(batch.value_tokens[row, column]) == encoder.decode(ids[:3])

    def test_keys_are_padded_on_the_left_and_values_on_the_right_to_the_longest_of_the_batch(
        self, encoder: PlainTextEncoder
    ) -> None:
        keys, values = (" river", " kz", " river and lake", " z", " k"), (" sea", " v", " salt", " zz", " s")
        source = [entries(f"thing {number}", values, keys) for number in range(4)]
        (batch,) = Reader(encoder, tokens_per_key=20, tokens_per_value=20).batches(source, 1)
        longest_key = max(len(encoder.encode(key)) for key in keys)
        longest_value = max(len(encoder.encode(value)) for value in values)
        assert batch.is_padded
        assert batch.key_tokens.shape == (4, MEMORY, longest_key)
        assert batch.value_tokens.shape == (4, MEMORY, longest_value)
        for key in batch.key_tokens.flatten(0, 1):
            assert padding_of(key).long().diff().le(0).all()
        for value in batch.value_tokens.flatten(0, 1):
            assert padding_of(value).long().diff().ge(0).all()

    def test_entries_of_one_length_are_not_padded(self, encoder: PlainTextEncoder) -> None:
        source = [entries(f"thing {number}", [" v"] * 5, [" k"] * 5) for number in range(4)]
        (batch,) = Reader(encoder).batches(source, 1)
        assert not batch.is_padded
        assert batch.key_tokens.shape[2] == len(encoder.encode(" k"))

    @pytest.mark.parametrize(("window", "expected"), [("start", 8), ("random", 12)])
    def test_the_first_or_any_so_many_take_part(self, window: Window, expected: int, encoder: PlainTextEncoder) -> None:
        reader = Reader(encoder, window=window)
        rows = reader.rows(things(4, num_pairs=12), 100)
        assert taking_part(rows) == set(range(expected))
        assert {reader.example_of(row) for row in rows} == set(range(expected))

    def test_of_fewer_all_take_part(self, encoder: PlainTextEncoder) -> None:
        reader = Reader(encoder)
        rows = reader.rows(things(4, num_pairs=MEMORY + 1), 20)
        for row in rows:
            assert {*row.pair_numbers.tolist(), reader.example_of(row)} == set(range(MEMORY + 1))

    def test_the_example_is_a_random_one_that_is_not_in_the_memory(self, encoder: PlainTextEncoder) -> None:
        reader = Reader(encoder)
        rows = reader.rows(things(40), 400)
        counts = Counter(reader.example_of(row) for row in rows)
        # 50 expected of each, with a standard deviation of 6.6.
        assert all(20 < counts[pair] < 80 for pair in range(8))
        assert all(reader.example_of(row) not in row.pair_numbers.tolist() for row in rows)
        assert all(len(set(row.pair_numbers.tolist())) == MEMORY for row in rows)


class TestTooFew:
    def test_they_are_counted_and_passed_over(self, encoder: PlainTextEncoder) -> None:
        source = [
            *things(2),
            entries("few", [" v"] * MEMORY),
            entries("enough", [" v"] * (MEMORY + 1)),
            entries("", []),
        ]
        rows = Reader(encoder, shuffle=False).rows(source, 6)
        assert [row.article.title for row in rows] == ["thing 0", "thing 1", "enough"] * 2
        assert rows[-1].skipped == {"too_few_entries": 3}

    def test_if_all_are_the_numbers_are_said(self, encoder: PlainTextEncoder) -> None:
        source = [entries("one", [" v"] * 2), entries("other", [" v"] * MEMORY)]
        message = (
            "no memory has enough entries: 2 had too few (skipped: 2 too_few_entries); it takes 4 and one for the "
            "example, the most found are 4. Lower num_kv_pairs or subset_fraction, or give more rows of each group"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            Reader(encoder).rows(source, 1)

    def test_a_later_epoch_of_which_a_part_is_left_resumes(self, encoder: PlainTextEncoder) -> None:
        source = [*things(1), entries("few", [" v"])]
        (row,) = Reader(encoder, shuffle=False).rows(source, 1, StreamPosition(0, 1))
        assert (row.article.epoch, row.article.title) == (1, "thing 0")


class TestRefused:
    def test_more_keys_than_values(self, encoder: PlainTextEncoder) -> None:
        source = [*things(2), entries("odd", [" v"] * 8, [" k"] * 9)]
        with pytest.raises(ValueError, match=r"Row 2 of train_dataset, 'odd', has 9 keys and 8 values; give pairs\."):
            Reader(encoder).stream(source)

    def test_more_keys_than_values_in_the_middle_of_a_table(self, encoder: PlainTextEncoder) -> None:
        """Of what is not a list, the first row alone is looked at before a run."""
        table = EntriesTable("a table", (*things(2), entries("odd", [" v"] * 8, [" k"] * 9)))
        stream = Reader(encoder, shuffle=False).stream(table)
        with pytest.raises(ValueError, match=r"Row 2 of 'a table', 'odd', has 9 keys and 8 values"):
            list(itertools.islice(stream, 3))

    @pytest.mark.parametrize(("name", "place"), [("key", 2), ("value", 4)])
    def test_an_empty_field(self, name: str, place: int, encoder: PlainTextEncoder) -> None:
        texts = {kind: [f" {kind}{n}" for n in range(MEMORY + 1)] for kind in ("key", "value")}
        texts[name][place] = ""
        source = [entries("the thing", texts["value"], texts["key"])]
        message = rf"{name} {place} of 'the thing' in 'tests' is empty; leave it out"
        with pytest.raises(ValueError, match=message):
            Reader(encoder).rows(source, 1)

    def test_no_row(self, encoder: PlainTextEncoder) -> None:
        with pytest.raises(ValueError, match="train_dataset has no row"):
            Reader(encoder).stream(EntriesTable("a table", ()))


def test_what_is_cut_is_said_once_for_keys_and_once_for_values(
    encoder: PlainTextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    long = " river lake mountain bridge valley sheep stone letters"
    source = [entries(f"thing {n}", [long + " sea"] * 5, [long] * 5) for n in range(3)]
    with caplog.at_level(logging.WARNING):
        rows = Reader(encoder, shuffle=False).rows(source, 6)
    key, value = len(encoder.encode(long)), len(encoder.encode(long + " sea"))
    assert [record.getMessage() for record in caplog.records] == [
        f"A key of 'thing 0', and maybe others, is cut from {key} to 6 tokens; tokens_per_key sets their number.",
        f"A value of 'thing 0', and maybe others, is cut from {value} to 3 tokens; tokens_per_value sets their number.",
    ]
    expected = [*encoder.encode(long)[:6], *encoder.encode(long)[:3]]
    assert all(chunk == expected for row in rows for chunk in row.chunks.tolist())


class TestOrder:
    def test_epochs_are_shuffled_anew_beyond_the_number_of_objects(self, encoder: PlainTextEncoder) -> None:
        rows = Reader(encoder).rows(things(10), 35)
        epochs = [[row.article.title for row in rows if row.article.epoch == epoch] for epoch in range(4)]
        assert [len(titles) for titles in epochs] == [10, 10, 10, 5]
        assert [sorted(titles) for titles in epochs[:3]] == [sorted(entry.title for entry in things(10))] * 3
        assert len({tuple(titles) for titles in epochs[:3]}) == 3
        # Another memory of the same object in each epoch.
        memories = [tuple(row.pair_numbers.tolist()) for row in rows if row.article.title == "thing 0"]
        assert len(set(memories)) == len(memories)

    @pytest.mark.parametrize("window", ["start", "random"])
    def test_any_position_gives_the_same_numbers(self, window: Window, encoder: PlainTextEncoder) -> None:
        source = [*things(6, num_pairs=11), entries("few", [" v"])]
        reader = Reader(encoder, window=window)
        whole = reader.rows(source, 20)
        for number in (0, 2, 5, 6, 13):
            position = whole[number].article.next_position
            later = reader.rows(source, 19 - number, position)
            assert list(map(described, later)) == list(map(described, whole[number + 1 :]))

    def test_batches_of_any_size_hold_the_same_memories(self, encoder: PlainTextEncoder) -> None:
        """Whatever the batch is padded to."""
        reader = Reader(encoder)

        def texts(size: int) -> list[str]:
            batches = reader.batches(things(8), 12 // size, size)
            return [encoder.decode(key) for batch in batches for row in batch.key_tokens for key in row]

        assert texts(4) == texts(6) == texts(1)

    def test_overfitting_reads_the_first_usable_ones_with_one_memory_each(self, encoder: PlainTextEncoder) -> None:
        source = [entries("few", [" v"]), *things(5)]
        rows = Reader(encoder, overfit_articles=2).rows(source, 12)
        assert {row.article.title for row in rows} == {"thing 0", "thing 1"}
        assert len({(row.article.title, tuple(row.pair_numbers.tolist())) for row in rows}) == 2
        with pytest.raises(ValueError, match="overfit_articles is 6, but only 5"):
            Reader(encoder, overfit_articles=6).stream(source)


class TestIdentity:
    def sample(self, source: Any) -> object:
        return article_facts(source, "text", 0)["articles.sample"]

    def test_it_is_of_keys_and_values(self) -> None:
        same, other_key, other_value, fewer = (things(3) for _ in range(4))
        other_key[2] = entries("thing 2", other_key[2].values, [*other_key[2].keys[:-1], " another"])
        other_value[1] = entries("thing 1", [*other_value[1].values[:-1], " another"])
        fewer[0] = entries("thing 0", fewer[0].values[:-1])
        found = [self.sample(source) for source in (things(3), same, other_key, other_value, fewer, things(4))]
        assert found[0] == found[1]
        assert len(set(found[1:])) == 5

    def test_keys_do_not_run_into_values(self) -> None:
        one, other = entries("a", (" x", " y"), (" k", " l")), entries("a", (" k", " l"), (" x", " y"))
        assert self.sample([one]) != self.sample([other])

    def test_a_table_is_its_rows(self) -> None:
        assert self.sample(EntriesTable("a table", tuple(things(3)))) == self.sample(things(3))

"""Articles to batches: those used and those counted, and the loader of a run: order, shares, one memory, a worker."""

from __future__ import annotations

import itertools
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import article_texts
from tokenizer_families import gpt2
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.loading import (
    MemoryDataset,
    MemoryLoader,
    ReadingOptions,
    first_usable_articles,
    iter_article_pairs,
    iter_key_value_pairs,
)
from attention_rl_trainer.memories.pairs import MemoryBatch, PairOptions, Window
from attention_rl_trainer.memories.stream import Article, ArticleSource, ArticleStream
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.types import StreamPosition

OPTIONS = PairOptions(num_kv_pairs=6, subset_fraction=0.5, tokens_per_key=3, tokens_per_value=2)


def stream_of(texts: list[str], **options: object) -> ArticleStream:
    articles = [Article(f"article {i}", text, "made up") for i, text in enumerate(texts)]
    return ArticleStream(articles, source="made up", seed=0, **options)


def test_subset_depends_on_seed_epoch_and_article_alone(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)

    def draws(seed: int, position: StreamPosition, count: int) -> dict[tuple[int, int], list[int]]:
        stream = MemoryDataset(stream_of(texts[:6], position=position), encoder, OPTIONS, seed)
        rows = itertools.islice(stream, count)
        return {(r.article.epoch, r.article.article_index): r.pair_numbers.tolist() for r in rows}

    from_the_start, from_the_middle = draws(0, StreamPosition(), 12), draws(0, StreamPosition(0, 4), 8)
    assert len(from_the_start) == 12
    assert from_the_middle == {key: from_the_start[key] for key in from_the_middle}
    assert draws(1, StreamPosition(), 12) != from_the_start
    first_epoch = [numbers for (epoch, _), numbers in sorted(from_the_start.items()) if epoch == 0]
    second_epoch = [numbers for (epoch, _), numbers in sorted(from_the_start.items()) if epoch == 1]
    assert first_epoch != second_epoch


def test_short_articles_are_counted_and_passed_over(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    skipped: Counter[str] = Counter()
    stream = stream_of([texts[0], "too short", "", texts[1]], shuffle=False, num_epochs=1)
    rows = list(iter_article_pairs(stream, encoder, OPTIONS, 0, skipped))
    assert [row.article.title for row in rows] == ["article 0", "article 3"]
    assert skipped["too_short"] == 1
    assert stream.skipped["empty"] == 1
    assert rows[-1].skipped["too_short"] == 1


def test_length_limit_is_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    text = "".join(chr(ord("a") + i % 26) + " " for i in range(200))
    ids = encoder.encode(text)
    exact = encoder.decode(ids[:30])
    one_short = encoder.decode(ids[:29])
    assert (len(encoder.encode(exact)), len(encoder.encode(one_short))) == (30, 29)
    skipped: Counter[str] = Counter()
    rows = list(
        iter_article_pairs(stream_of([exact, one_short], shuffle=False, num_epochs=1), encoder, OPTIONS, 0, skipped)
    )
    assert len(rows) == 1
    assert skipped == {"too_short": 1}


@pytest.mark.parametrize("window", ["start", "random"])
@pytest.mark.parametrize(("num_pairs", "key", "value"), [(2, 1, 1), (6, 3, 2), (4, 7, 5)])
def test_the_limit_of_all_lengths_is_exact(
    window: str, num_pairs: int, key: int, value: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder, limit = PlainTextEncoder(tokenizer), (key + value) * num_pairs
    texts = ["q" * length for length in (limit - 1, limit, limit + 1)]  # no merge of the tokenizer has a q twice
    assert [len(encoder.encode(text)) for text in texts] == [limit - 1, limit, limit + 1]
    options = PairOptions(num_pairs, 0.5, key, value, window)
    skipped: Counter[str] = Counter()
    rows = list(iter_article_pairs(stream_of(texts, shuffle=False, num_epochs=1), encoder, options, 0, skipped))
    assert [row.article.article_index for row in rows] == [1, 2]
    assert skipped == {"too_short": 1}


CONTROL_TOKENS = ["<|endoftext|>", "<tool_call>"]
PIECES = [
    *CONTROL_TOKENS, "word", " ", "\n", "\r", "\t", "\x00", "\u00a0", "\u2028", "\ufeff", "\ufffd", "\uffff", "\u200d",
    "\u202e", "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627", "e\u0301\u0327", "\u0335" * 9,
    "\u6f22\u5b57", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0010ffff", "\ud83d", "\udc80", "[[", "{{", "<!--",
]  # fmt: skip
broken_utf8 = st.binary(max_size=60).map(lambda content: content.decode("utf-8", errors="surrogateescape"))
hostile_texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=60),
    broken_utf8,
    st.lists(st.sampled_from(PIECES), max_size=25).map("".join),
    st.text(st.sampled_from(" \t\n\r\x0b\x0c\x1c\x85\u00a0\u2003\u2028\u3000"), max_size=40),
)
no_texts = st.one_of(st.none(), st.integers(), st.floats(), st.binary(max_size=9), st.lists(st.text(max_size=3)))


@pytest.fixture(scope="module")
def shared_encoder(tokenizer: PreTrainedTokenizerFast) -> PlainTextEncoder:
    """An encoder for many examples: making one reads the whole tokenizer."""
    return PlainTextEncoder(tokenizer)


@settings(max_examples=1000, deadline=None)
@given(texts=st.lists(st.one_of(hostile_texts, no_texts), max_size=6), seed=st.integers(0, 9))
def test_every_hostile_article_is_used_or_counted_under_its_reason(
    texts: list[object], seed: int, shared_encoder: PlainTextEncoder
) -> None:
    encoder = shared_encoder
    # One that can be used, since an epoch without any is an error.
    rows = [{"text": text} for text in [*texts, "the river " * 20]]
    expected: Counter[str] = Counter()
    for row in rows:
        text = row["text"]
        if not isinstance(text, str):
            expected["not_a_string"] += 1
        elif not text.strip():
            expected["empty"] += 1
        else:
            expected["used" if len(encoder.encode(text)) >= OPTIONS.min_article_tokens else "too_short"] += 1
    stream = ArticleStream(rows, source="hostile", seed=seed, num_epochs=1)
    pairs = list(MemoryDataset(stream, encoder, OPTIONS, seed))
    assert {"used": len(pairs), **stream.skipped} == expected
    assert len(pairs) + stream.skipped.total() == len(rows)
    for item in pairs:
        text = rows[item.article.article_index]["text"]
        ids = encoder.encode(text)
        assert encoder.decode(ids) == text.encode("utf-8", "replace").decode("utf-8")
        assert item.example.tolist() == ids[: OPTIONS.tokens_per_pair]
        assert not encoder.control_ids.intersection(ids)


# Longer than the 5 MB of any article: to merge one word of so many characters takes the tokenizer several seconds.
@pytest.mark.parametrize(
    "unit",
    ["the river ", *(pytest.param(unit, marks=pytest.mark.slow) for unit in ("x", " ", "e\u0301", "\u6f22", "x;"))],
)
def test_a_line_of_five_megabytes_is_one_article(unit: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = unit * (5_000_000 // len(unit.encode()))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    encoder = PlainTextEncoder(tokenizer)
    stream = ArticleStream(load_articles(str(tmp_path / "long.jsonl")), source="long", seed=0, num_epochs=1)
    if text.isspace():
        with pytest.raises(ValueError, match="rows passed over: 1 empty"):
            list(stream)
        return
    (pairs,) = MemoryDataset(stream, encoder, OPTIONS, 0)
    assert encoder.decode(pairs.example) == encoder.decode(encoder.encode(text[:40])[:5])
    assert not stream.skipped


class CountingTokenizer:
    """Counts the characters that it encodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.num_characters = 0

    def encode(self, text: str, **options: bool) -> Any:
        self.num_characters += len(text)
        return self._tokenizer.encode(text, **options)


@pytest.mark.parametrize(("window", "visit"), [("start", 10_000), ("random", 40_000)])
def test_of_a_long_article_what_is_needed_is_encoded_once(
    window: Window, visit: int, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = PlainTextEncoder(tokenizer)
    assert encoder.pieces.cut is not None
    encoder.pieces.tokenizer = counting = CountingTokenizer(encoder.pieces.tokenizer)
    text = "\n".join(texts) * 8
    assert len(text) > 400_000
    options = PairOptions(6, 0.5, 3, 2, window)
    stream = stream_of([text], num_epochs=3)
    ids = encoder.encode(text)
    for item in MemoryDataset(stream, encoder, options, 0):
        if window == "start" or item.article.epoch > 0:
            assert counting.num_characters < visit
        else:
            assert counting.num_characters < 1.1 * len(text)
        counting.num_characters = 0
        assert item.example.tolist() == ids[:5]
        for chunk, number in zip(item.chunks.tolist(), item.pair_numbers.tolist(), strict=True):
            assert chunk == ids[5 * number : 5 * number + 5]
    if window == "random":
        assert max(item.pair_numbers.max() for item in MemoryDataset(stream, encoder, options, 0)) > 1000


@pytest.mark.slow
def test_an_article_of_twenty_megabytes_takes_no_time_and_no_memory() -> None:
    """By the tokenizer of a real model, whose time for all of it is a quarter of a minute, and its memory 3 GB."""
    text = "\n".join(article_texts(900, num_words=4000))
    assert len(text) > 20_000_000
    encoder = PlainTextEncoder(gpt2())
    kibibytes_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for window, most in (("start", 0.5), ("random", 1.0)):
        rows = iter(MemoryDataset(stream_of([text], num_epochs=2), encoder, PairOptions(8, 0.5, 6, 6, window), 0))
        next(rows)
        started = time.process_time()
        next(rows)
        assert time.process_time() - started < most
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kibibytes_before < 200 * 2**10


def test_no_article_long_enough_is_an_error_with_the_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    rows = MemoryDataset(stream_of(["short", "shorter still"]), encoder, OPTIONS, 0)
    with pytest.raises(ValueError, match=r"2 were too short.*\(3 \+ 2\) · 6 = 30 tokens") as error:
        next(iter(rows))
    assert "num_kv_pairs" in str(error.value)


def test_a_resumed_epoch_without_usable_rest_continues(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    stream = stream_of([texts[0], "short"], shuffle=False, position=StreamPosition(0, 1))
    row = next(iter(MemoryDataset(stream, PlainTextEncoder(tokenizer), OPTIONS, 0)))
    assert (row.article.epoch, row.article.title) == (1, "article 0")


def test_iter_key_value_pairs_batches(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    stream = stream_of(texts[:5], shuffle=False, num_epochs=1)
    batches = list(
        iter_key_value_pairs(
            stream, PlainTextEncoder(tokenizer), OPTIONS, 2, lambda keys: keys[:, None, :1].float(), seed=0
        )
    )
    assert len(batches) == 2
    assert batches[0].key_tokens.shape == (2, 3, 3)


def test_the_first_usable_articles(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    texts = ["short", "word " * 40, "tiny", "other " * 40, "third " * 40]
    options = PairOptions(num_kv_pairs=4, subset_fraction=0.5, tokens_per_key=3, tokens_per_value=3)
    first = first_usable_articles(stream_of(texts, shuffle=False, num_epochs=1), encoder, options, 2)
    assert [article.title for article in first] == ["article 1", "article 3"]
    with pytest.raises(ValueError, match="overfit_articles is 4, but only 3 articles have the 24 tokens"):
        first_usable_articles(stream_of(texts, shuffle=False, num_epochs=1), encoder, options, 4)


def test_one_memory_in_every_epoch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    drawn = {}
    for same_memory in (False, True):
        stream = stream_of(texts[:1], num_epochs=8)
        pairs = iter_article_pairs(stream, PlainTextEncoder(tokenizer), OPTIONS, 0, Counter(), same_memory=same_memory)
        drawn[same_memory] = {tuple(item.pair_numbers.tolist()) for item in pairs}
    assert len(drawn[True]) == 1
    assert len(drawn[False]) > 3


# The loader of a run


def reading(**changes: Any) -> ReadingOptions:
    options = {"num_kv_pairs": 6, "subset_fraction": 0.5, "tokens_per_key": 3, "tokens_per_value": 2}
    return ReadingOptions(**options | changes)


class OwnSource:
    """What a user may write: a length, and rows by number. A title names the group of the process that reads."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> dict[str, str]:
        return {"title": str(os.getpgrp()), "text": self.texts[row]}


def rows_of(texts: Iterable[str]) -> list[dict[str, str]]:
    return [{"title": f"article {number}", "text": text} for number, text in enumerate(texts)]


def titles_of(items: Iterable[Any]) -> list[str]:
    return [item.article.title for item in items]


def pair_numbers(batches: Iterable[dict[str, MemoryBatch]]) -> list[list[list[int]]]:
    return [batch["memories"].pair_numbers.tolist() for batch in batches]


def test_a_loader_gives_memories_in_batches(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    encoder, rows = PlainTextEncoder(tokenizer), rows_of(texts[:8])
    loader = MemoryLoader(reading(), encoder, seed=3)
    batches = list(itertools.islice(loader.batches(loader.training_stream(rows, StreamPosition()), 4), 4))
    assert all(batch.keys() == {"memories"} for batch in batches)
    memories = [batch["memories"] for batch in batches]
    assert all(isinstance(memory, MemoryBatch) for memory in memories)
    assert {tuple(memory.key_tokens.shape) for memory in memories} == {(4, 3, 3)}
    assert {tuple(memory.value_tokens.shape) for memory in memories} == {(4, 3, 2)}
    assert [memory.position_after for memory in memories] == [
        StreamPosition(epoch, index) for epoch in (0, 1) for index in (4, 8)
    ]
    for memory in memories:
        for row, article in enumerate(memory.articles):
            ids = encoder.encode(rows[article.article_index]["text"])
            assert memory.example_keys[row].tolist() == ids[:3]
            assert [*memory.key_tokens[row, 0].tolist(), *memory.value_tokens[row, 0].tolist()] == [
                ids[5 * memory.pair_numbers[row, 0] + place] for place in range(5)
            ]


def test_training_resumes_from_a_position(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    loader, rows = MemoryLoader(reading(), PlainTextEncoder(tokenizer), seed=3), rows_of(texts[:8])

    def batches(position: StreamPosition, count: int) -> list[list[list[int]]]:
        stream = loader.training_stream(rows, position)
        return pair_numbers(itertools.islice(loader.batches(stream, 4), count))

    whole = batches(StreamPosition(), 5)
    assert batches(StreamPosition(0, 4), 4) == whole[1:]
    assert batches(StreamPosition(1, 0), 3) == whole[2:]


def test_training_is_shuffled_anew_in_every_epoch_or_in_order(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder, rows = PlainTextEncoder(tokenizer), rows_of(texts[:8])
    in_order = [row["title"] for row in rows]

    def first_epochs(seed: int, **options: Any) -> tuple[list[str], list[str]]:
        stream = MemoryLoader(reading(**options), encoder, seed).training_stream(rows, StreamPosition())
        titles = titles_of(itertools.islice(stream, 16))
        return titles[:8], titles[8:]

    first, second = first_epochs(3)
    assert sorted(first) == sorted(second) == in_order
    assert len({tuple(order) for order in (first, second, in_order, first_epochs(4)[0])}) == 4
    assert first_epochs(3) == (first, second)
    assert first_epochs(3, shuffle=False) == (in_order, in_order)


@pytest.mark.parametrize("options", [{}, {"overfit_articles": 2}])
def test_evaluation_reads_every_article_in_its_order_so_many_times(
    options: dict[str, int], texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = rows_of(texts[:5])
    loader = MemoryLoader(reading(**options), PlainTextEncoder(tokenizer), seed=3)
    assert titles_of(loader.evaluation_stream(rows, num_epochs=2)) == [row["title"] for row in rows] * 2
    first, second = (batch["memories"] for batch in loader.batches(loader.evaluation_stream(rows, num_epochs=2), 5))
    assert not torch.equal(first.pair_numbers, second.pair_numbers)


def test_overfitting_reads_the_first_usable_articles_with_one_memory_each(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = rows_of(["too short", texts[0], "also short", *texts[1:6]])
    loader = MemoryLoader(reading(overfit_articles=2), PlainTextEncoder(tokenizer), seed=3)
    stream = loader.training_stream(rows, StreamPosition())
    memories = [batch["memories"] for batch in itertools.islice(loader.batches(stream, 2), 6)]
    titles = [sorted(article.title for article in memory.articles) for memory in memories]
    assert titles == [["article 1", "article 3"]] * 6
    assert [memory.articles[0].epoch for memory in memories] == [0, 1, 2, 3, 4, 5]
    drawn = {
        (article.title, tuple(numbers.tolist()))
        for memory in memories
        for article, numbers in zip(memory.articles, memory.pair_numbers, strict=True)
    }
    assert len(drawn) == 2
    # The articles keep the name of where they come from.
    assert {article.source for memory in memories for article in memory.articles} == {"list"}


def test_overfitting_more_articles_than_there_are_is_refused(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    loader = MemoryLoader(reading(overfit_articles=3), PlainTextEncoder(tokenizer), seed=3)
    with pytest.raises(ValueError, match=r"overfit_articles is 3, but only 2 articles have the 30 tokens.*lower it"):
        loader.training_stream(rows_of([*texts[:2], "short"]), StreamPosition())


def test_a_worker_gives_the_same_batches_from_a_process_group_of_its_own(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    source, encoder = OwnSource(texts[:8]), PlainTextEncoder(tokenizer)
    drawn, groups = {}, {}
    for num_workers in (0, 1):
        loader = MemoryLoader(reading(), encoder, seed=3, num_workers=num_workers)
        stream = loader.training_stream(source, StreamPosition())
        batches = list(itertools.islice(loader.batches(stream, 4), 3))
        drawn[num_workers] = pair_numbers(batches)
        groups[num_workers] = {article.title for batch in batches for article in batch["memories"].articles}
    assert drawn[1] == drawn[0]
    assert groups[0] == {str(os.getpgrp())}
    # A signal to the trainer's group does not reach it.
    assert len(groups[1]) == 1
    assert groups[1] != groups[0]


def test_a_source_of_the_users_own_is_read_by_number_and_named_after_its_class(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    source = OwnSource(texts[:4])
    assert isinstance(source, ArticleSource)
    loader = MemoryLoader(reading(), PlainTextEncoder(tokenizer), seed=3)
    items = list(itertools.islice(loader.training_stream(source, StreamPosition()), 8))
    assert {item.article.source for item in items} == {"OwnSource"}
    assert [sorted(item.row for item in items[:4]), sorted(item.row for item in items[4:])] == [[0, 1, 2, 3]] * 2
    assert all(item.article.text == texts[item.row] for item in items)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_keeps_its_name_and_the_column_can_be_chosen(
    streaming: bool, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    table: Any = datasets.Dataset.from_list([{"body": text} for text in texts[:3]])
    table = table.to_iterable_dataset() if streaming else table
    table.info.dataset_name = "the name"
    loader = MemoryLoader(reading(dataset_text_column="body"), PlainTextEncoder(tokenizer), seed=3)
    items = list(loader.evaluation_stream(table, num_epochs=1))
    assert [(item.article.source, item.article.text) for item in items] == [("the name", text) for text in texts[:3]]


def test_reading_options_have_their_ranges() -> None:
    options = ReadingOptions()
    assert (options.dataset_text_column, options.shuffle, options.shuffle_buffer_size) == ("text", True, 1000)
    assert options.overfit_articles == 0
    with pytest.raises(ValueError, match="shuffle_buffer_size must be at least 1, got 0"):
        ReadingOptions(shuffle_buffer_size=0)
    with pytest.raises(ValueError, match="overfit_articles must be at least 0, got -1"):
        ReadingOptions(overfit_articles=-1)

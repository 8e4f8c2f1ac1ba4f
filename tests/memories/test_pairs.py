"""Pairs by index arithmetic, subsets by seed, skipped articles by count."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.loading import (
    MemoryDataset,
    first_usable_articles,
    iter_article_pairs,
    iter_key_value_pairs,
)
from attention_rl_trainer.memories.pairs import (
    PairShape,
    add_embeddings,
    chunk_tokens,
    collate_memories,
    draw_pairs,
    sample_chunks,
    split_key_values,
)
from attention_rl_trainer.memories.stream import Article, ArticleStream
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.types import StreamPosition

SHAPE = PairShape(num_kv_pairs=6, subset_fraction=0.5, tokens_per_key=3, tokens_per_value=2)


def stream_of(texts: list[str], **options: object) -> ArticleStream:
    articles = [Article(f"article {i}", text, "made up") for i, text in enumerate(texts)]
    return ArticleStream(articles, source="made up", seed=0, **options)


@pytest.mark.parametrize(
    ("num_pairs", "fraction", "size"),
    [(32, 0.25, 8), (10, 0.25, 3), (6, 0.5, 3), (2, 0.01, 1), (8, 1.0, 7), (30, 0.25, 8), (4, 0.99, 3)],
)
def test_memory_size_by_hand(num_pairs: int, fraction: float, size: int) -> None:
    assert PairShape(num_kv_pairs=num_pairs, subset_fraction=fraction).memory_size == size


def test_chunks_are_views_at_multiples() -> None:
    ids = torch.arange(23)
    chunks = chunk_tokens(ids, 5)
    assert chunks.tolist() == [[5 * i + j for j in range(5)] for i in range(4)]
    assert chunks.data_ptr() == ids.data_ptr()
    keys, values = split_key_values(chunks, 3)
    assert keys[1].tolist() == [5, 6, 7]
    assert values[1].tolist() == [8, 9]


def test_unsplittable_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens_per_key must lie in 1\.\.4 for these chunks, got 5"):
        split_key_values(torch.zeros(2, 5, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="cannot draw 4 chunks from 3"):
        sample_chunks(torch.zeros(9, 5), 4, np.arange(3), np.random.default_rng(0))


def test_example_is_pair_zero_and_memory_is_a_subset_of_the_rest() -> None:
    ids = list(range(100, 100 + 40))
    for seed in range(50):
        example, chunks, numbers = draw_pairs(ids, SHAPE, np.random.default_rng(seed))
        assert example.tolist() == ids[:5]
        assert len(set(numbers.tolist())) == 3
        assert set(numbers.tolist()) <= {1, 2, 3, 4, 5}
        for chunk, number in zip(chunks.tolist(), numbers.tolist(), strict=True):
            assert chunk == ids[5 * number : 5 * number + 5]


def test_random_window_takes_a_run_of_the_article() -> None:
    shape = PairShape(num_kv_pairs=4, subset_fraction=1.0, tokens_per_key=3, tokens_per_value=2, window="random")
    ids = list(range(52))  # ten whole pairs
    starts = set()
    for seed in range(200):
        example, _, numbers = draw_pairs(ids, shape, np.random.default_rng(seed))
        assert example.tolist() == [0, 1, 2, 3, 4]
        run = sorted(numbers.tolist())
        assert run == list(range(run[0], run[0] + 3))
        starts.add(run[0])
    assert starts == {1, 2, 3, 4, 5, 6, 7}


def test_every_pair_is_drawn_equally_often() -> None:
    counts = Counter(
        number
        for seed in range(3000)
        for number in draw_pairs(list(range(30)), SHAPE, np.random.default_rng(seed))[2].tolist()
    )
    assert set(counts) == {1, 2, 3, 4, 5}
    assert all(abs(count / 3000 - 0.6) < 0.035 for count in counts.values())  # four standard errors


def test_subset_depends_on_seed_epoch_and_article_alone(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)

    def draws(seed: int, position: StreamPosition, count: int) -> dict[tuple[int, int], list[int]]:
        stream = MemoryDataset(stream_of(texts[:6], position=position), encoder, SHAPE, seed)
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
    rows = list(iter_article_pairs(stream, encoder, SHAPE, 0, skipped))
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
        iter_article_pairs(stream_of([exact, one_short], shuffle=False, num_epochs=1), encoder, SHAPE, 0, skipped)
    )
    assert len(rows) == 1
    assert skipped == {"too_short": 1}


@pytest.mark.parametrize("window", ["start", "random"])
@pytest.mark.parametrize(("num_pairs", "key", "value"), [(2, 1, 1), (6, 3, 2), (4, 7, 5)])
def test_the_limit_of_every_shape_is_exact(
    window: str, num_pairs: int, key: int, value: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder, limit = PlainTextEncoder(tokenizer), (key + value) * num_pairs
    texts = ["q" * length for length in (limit - 1, limit, limit + 1)]  # no merge of the tokenizer has a q twice
    assert [len(encoder.encode(text)) for text in texts] == [limit - 1, limit, limit + 1]
    shape = PairShape(num_pairs, 0.5, key, value, window)
    skipped: Counter[str] = Counter()
    rows = list(iter_article_pairs(stream_of(texts, shuffle=False, num_epochs=1), encoder, shape, 0, skipped))
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


@settings(max_examples=1000, deadline=None)
@given(texts=st.lists(st.one_of(hostile_texts, no_texts), max_size=6), seed=st.integers(0, 9))
def test_every_hostile_article_is_used_or_counted_under_its_reason(
    texts: list[object], seed: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    encoder = PlainTextEncoder(tokenizer)
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
            expected["used" if len(encoder.encode(text)) >= SHAPE.min_article_tokens else "too_short"] += 1
    stream = ArticleStream(rows, source="hostile", seed=seed, num_epochs=1)
    pairs = list(MemoryDataset(stream, encoder, SHAPE, seed))
    assert {"used": len(pairs), **stream.skipped} == expected
    assert len(pairs) + stream.skipped.total() == len(rows)
    for item in pairs:
        text = rows[item.article.article_index]["text"]
        ids = encoder.encode(text)
        assert encoder.decode(ids) == text.encode("utf-8", "replace").decode("utf-8")
        assert item.example.tolist() == ids[: SHAPE.tokens_per_pair]
        assert not encoder.control_ids.intersection(ids)


# Longer than the 5 MB of any article: to merge one word of so many characters takes the tokenizer several seconds.
@pytest.mark.parametrize(
    "unit",
    ["the river ", *(pytest.param(unit, marks=pytest.mark.slow) for unit in ("x", " ", "e\u0301", "\u6f22", "x;"))],
)
def test_a_line_of_five_megabytes_is_one_article(
    unit: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    text = unit * (5_000_000 // len(unit.encode()))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    encoder = PlainTextEncoder(tokenizer)
    stream = ArticleStream(load_articles(str(tmp_path / "long.jsonl")), source="long", seed=0, num_epochs=1)
    if text.isspace():
        with pytest.raises(ValueError, match="rows passed over: 1 empty"):
            list(stream)
        return
    (pairs,) = MemoryDataset(stream, encoder, SHAPE, 0)
    assert encoder.decode(pairs.example) == encoder.decode(encoder.encode(text[:40])[:5])
    assert not stream.skipped


def test_no_article_long_enough_is_an_error_with_the_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    rows = MemoryDataset(stream_of(["short", "shorter still"]), encoder, SHAPE, 0)
    with pytest.raises(ValueError, match=r"2 were too short.*\(3 \+ 2\) · 6 = 30 tokens") as error:
        next(iter(rows))
    assert "num_kv_pairs" in str(error.value)


def test_a_resumed_epoch_without_usable_rest_goes_on(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    stream = stream_of([texts[0], "short"], shuffle=False, position=StreamPosition(0, 1))
    row = next(iter(MemoryDataset(stream, PlainTextEncoder(tokenizer), SHAPE, 0)))
    assert (row.article.epoch, row.article.title) == (1, "article 0")


def test_collated_batch_and_embeddings(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    stream = stream_of(texts[:4], shuffle=False, num_epochs=1)
    rows = list(iter_article_pairs(stream, PlainTextEncoder(tokenizer), SHAPE, 0, Counter()))
    batch = collate_memories(rows, SHAPE.tokens_per_key)
    assert batch.key_tokens.shape == (4, 3, 3)
    assert batch.value_tokens.shape == (4, 3, 2)
    assert batch.position_after == StreamPosition(0, 4)
    part = batch.select_rows([2, 0])
    assert torch.equal(part.key_tokens, batch.key_tokens[[2, 0]])
    assert [article.title for article in part.articles] == ["article 2", "article 0"]
    # The embedding function sees every key once, as rows, and its answers go back to their places.
    pairs = add_embeddings(batch, lambda keys: keys.float().mean(dim=1)[:, None, None].expand(-1, 2, 4))
    assert pairs.key_vectors.shape == (4, 3, 2, 4)
    torch.testing.assert_close(pairs.key_vectors[:, :, 0, 0], batch.key_tokens.float().mean(dim=2))


def test_iter_key_value_pairs_batches(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    stream = stream_of(texts[:5], shuffle=False, num_epochs=1)
    batches = list(
        iter_key_value_pairs(
            stream, PlainTextEncoder(tokenizer), SHAPE, 2, lambda keys: keys[:, None, :1].float(), seed=0
        )
    )
    assert len(batches) == 2
    assert batches[0].key_tokens.shape == (2, 3, 3)


def test_the_first_usable_articles(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    texts = ["short", "word " * 40, "tiny", "other " * 40, "third " * 40]
    shape = PairShape(num_kv_pairs=4, subset_fraction=0.5, tokens_per_key=3, tokens_per_value=3)
    first = first_usable_articles(stream_of(texts, shuffle=False, num_epochs=1), encoder, shape, 2)
    assert [article.title for article in first] == ["article 1", "article 3"]
    with pytest.raises(ValueError, match="overfit_articles is 4, but only 3 articles have the 24 tokens"):
        first_usable_articles(stream_of(texts, shuffle=False, num_epochs=1), encoder, shape, 4)


def test_one_memory_in_every_epoch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    drawn = {}
    for same_memory in (False, True):
        stream = stream_of(texts[:1], num_epochs=8)
        pairs = iter_article_pairs(stream, PlainTextEncoder(tokenizer), SHAPE, 0, Counter(), same_memory=same_memory)
        drawn[same_memory] = {tuple(item.pair_numbers.tolist()) for item in pairs}
    assert len(drawn[True]) == 1
    assert len(drawn[False]) > 3

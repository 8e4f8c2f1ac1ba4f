"""Pairs by index arithmetic, and subsets by seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from attention_rl_trainer.memories.pairs import (
    MemoryRow,
    PairOptions,
    Window,
    add_embeddings,
    chunk_tokens,
    collate_memories,
    draw_pairs,
    sample_chunks,
    split_key_values,
)
from attention_rl_trainer.types import ArticleReference, StreamPosition

OPTIONS = PairOptions(num_kv_pairs=6, subset_fraction=0.5, tokens_per_key=3, tokens_per_value=2)


@pytest.mark.parametrize(
    ("num_pairs", "fraction", "size"),
    [(32, 0.25, 8), (10, 0.25, 3), (6, 0.5, 3), (2, 0.01, 1), (8, 1.0, 7), (30, 0.25, 8), (4, 0.99, 3)],
)
def test_memory_size_by_hand(num_pairs: int, fraction: float, size: int) -> None:
    assert PairOptions(num_kv_pairs=num_pairs, subset_fraction=fraction).memory_size == size


def test_chunks_are_views_at_multiples() -> None:
    ids = torch.arange(23)
    chunks = chunk_tokens(ids, 5)
    assert chunks.tolist() == [[5 * i + j for j in range(5)] for i in range(4)]
    assert chunks.data_ptr() == ids.data_ptr()
    keys, values = split_key_values(chunks, 3)
    assert keys[1].tolist() == [5, 6, 7]
    assert values[1].tolist() == [8, 9]


def test_unsplittable_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens_per_key must be in 1\.\.4 for these chunks, got 5"):
        split_key_values(torch.zeros(2, 5, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="cannot draw 4 chunks from 3"):
        sample_chunks(torch.zeros(9, 5), 4, np.arange(3), np.random.default_rng(0))


def test_example_is_pair_zero_and_memory_is_a_subset_of_the_rest() -> None:
    ids = list(range(100, 100 + 40))
    for seed in range(50):
        example, chunks, numbers = draw_pairs(ids, OPTIONS, np.random.default_rng(seed))
        assert example.tolist() == ids[:5]
        assert len(set(numbers.tolist())) == 3
        assert set(numbers.tolist()) <= {1, 2, 3, 4, 5}
        for chunk, number in zip(chunks.tolist(), numbers.tolist(), strict=True):
            assert chunk == ids[5 * number : 5 * number + 5]


def test_random_window_takes_a_run_of_the_article() -> None:
    options = PairOptions(num_kv_pairs=4, subset_fraction=1.0, tokens_per_key=3, tokens_per_value=2, window="random")
    ids = list(range(52))  # ten whole pairs
    starts = set()
    for seed in range(200):
        example, _, numbers = draw_pairs(ids, options, np.random.default_rng(seed))
        assert example.tolist() == [0, 1, 2, 3, 4]
        run = sorted(numbers.tolist())
        assert run == list(range(run[0], run[0] + 3))
        starts.add(run[0])
    assert starts == {1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize(
    ("window", "numbers"), [("start", [[4, 3, 2], [3, 4, 1]]), ("random", [[17, 19, 16], [15, 18, 17]])]
)
def test_the_draws_of_a_seed_are_these(window: Window, numbers: list[list[int]]) -> None:
    """A run that resumes draws what the run before it would have drawn, of whatever version."""
    options = PairOptions(6, 0.5, 3, 2, window)
    drawn = [draw_pairs(list(range(103)), options, np.random.default_rng([seed, 2, 7])) for seed in range(2)]
    assert [row.tolist() for _, _, row in drawn] == numbers
    assert all(torch.equal(chunks[:, 0], 5 * row) for _, chunks, row in drawn)


def test_every_pair_is_drawn_equally_often() -> None:
    counts = Counter(
        number
        for seed in range(3000)
        for number in draw_pairs(list(range(30)), OPTIONS, np.random.default_rng(seed))[2].tolist()
    )
    assert set(counts) == {1, 2, 3, 4, 5}
    assert all(abs(count / 3000 - 0.6) < 0.035 for count in counts.values())  # four standard errors


def test_collated_batch_and_embeddings() -> None:
    rows = [
        MemoryRow(
            *draw_pairs(range(100 * number, 100 * number + 40), OPTIONS, np.random.default_rng(number)),
            ArticleReference(f"article {number}", "made up", 0, number, StreamPosition(0, number + 1)),
            {"too_short": number},
        )
        for number in range(4)
    ]
    batch = collate_memories(rows, OPTIONS.tokens_per_key)
    assert len(batch) == 4
    assert batch.example_keys.tolist() == [row.example[:3].tolist() for row in rows]
    assert batch.example_values.tolist() == [row.example[3:].tolist() for row in rows]
    assert batch.key_tokens.shape == (4, 3, 3)
    assert batch.value_tokens.shape == (4, 3, 2)
    assert batch.position_after == StreamPosition(0, 4)
    assert batch.skipped == {"too_short": 3}
    part = batch.select_rows([2, 0])
    assert torch.equal(part.key_tokens, batch.key_tokens[[2, 0]])
    assert [article.title for article in part.articles] == ["article 2", "article 0"]
    # The embedding function sees every key once, as rows, and its answers go back to their places.
    pairs = add_embeddings(batch, lambda keys: keys.float().mean(dim=1)[:, None, None].expand(-1, 2, 4))
    assert pairs.key_vectors.shape == (4, 3, 2, 4)
    torch.testing.assert_close(pairs.key_vectors[:, :, 0, 0], batch.key_tokens.float().mean(dim=2))
    assert torch.equal(batch.head(2).value_tokens, batch.value_tokens[:2])
    assert batch.head(2).position_after == StreamPosition(0, 2)
    assert batch.head(9) is batch
    assert len(batch.head(-1)) == 0

"""The planted language: its tokens, its articles, and what the base model is taught."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_rl_trainer.memories.tokenization import PlainTextEncoder, allowed_token_ids
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.selftest.language import (
    EXAMPLE_TOPIC,
    LAYOUT,
    MISMATCH,
    NUM_SYMBOLS,
    NUM_TOPICS,
    PREDICTABLE,
    RELATED,
    VOCABULARY_SIZE,
    build_tokenizer,
    draw_sequences,
    prompt_of,
    step_of,
    topic_names,
    topic_values,
    write_articles,
)


def test_every_word_is_one_token_and_none_is_a_control_token() -> None:
    encoder = PlainTextEncoder(build_tokenizer())
    assert Separators.encode(encoder) == Separators((1,), (2,))
    assert encoder.control_ids == frozenset()
    assert len(allowed_token_ids(encoder.tokenizer, VOCABULARY_SIZE)) == VOCABULARY_SIZE
    assert encoder.encode("topic0 nonsense part8 symbol63") == [
        3,
        0,
        VOCABULARY_SIZE - NUM_SYMBOLS - 1,
        VOCABULARY_SIZE - 1,
    ]


def test_articles_hold_each_topic_once_after_the_example() -> None:
    encoder, names = PlainTextEncoder(build_tokenizer()), topic_names()
    rows = write_articles(50, seed=3)
    assert rows == write_articles(50, seed=3)
    assert [row["text"] for row in rows] != [row["text"] for row in write_articles(50, seed=4)]
    assert [row["title"] for row in rows] == [f"article {number}" for number in range(50)]
    orders = set()
    for row in rows:
        pairs = torch.tensor(encoder.encode(row["text"])).view(NUM_TOPICS + 1, 3)
        topics = [int((names == pair[:2]).all(dim=1).nonzero()) for pair in pairs]
        assert topics[0] == EXAMPLE_TOPIC
        assert sorted(topics[1:]) == list(range(NUM_TOPICS))
        values = {topic: pair[2:].tolist() for topic, pair in zip(topics, pairs, strict=True)}
        assert values[RELATED[0]] == values[RELATED[1]] == values[RELATED[2]]
        orders.add(tuple(topics))
    assert len(orders) > 45


def test_values() -> None:
    values = topic_values(16000, np.random.default_rng(0))[:, :, 0] - (VOCABULARY_SIZE - NUM_SYMBOLS)
    assert 0 <= values.min() < values.max() < NUM_SYMBOLS
    own = [set(values[:, topic].tolist()) for topic in PREDICTABLE]
    assert [len(symbols) for symbols in own] == [16, 16]
    assert not own[0] & own[1]
    # Whatever is random is uniform over all symbols, and new in every article.
    for topic in (RELATED[0], 7, EXAMPLE_TOPIC):
        counts = torch.bincount(values[:, topic], minlength=NUM_SYMBOLS)
        assert 180 < counts.min() < counts.max() < 330
    assert (values[:, 7] == values[:, RELATED[0]]).float().mean().item() == pytest.approx(1 / NUM_SYMBOLS, abs=0.005)


def test_sequences_ask_for_every_topic_once_and_are_answered_mostly_right() -> None:
    sequences, asked = draw_sequences(2000, np.random.default_rng(0))
    assert asked.sort(dim=1).values.eq(torch.arange(NUM_TOPICS)).all()
    steps = sequences[:, 6:].view(2000, NUM_TOPICS, 5)
    assert torch.equal(steps[:, :, :2], topic_names()[asked])
    assert (steps[:, :, 2] == 2).all()
    assert (steps[:, :, 4] == 1).all()
    # A topic with symbols of its own shows how often the answer is another topic's; of those, the other predictable
    # topic never has them and the six random ones have them in a quarter of the cases.
    symbol = steps[:, :, 3][asked == PREDICTABLE[0]] - (VOCABULARY_SIZE - NUM_SYMBOLS)
    wrong = (symbol % 4 != 0).float().mean().item()
    assert wrong == pytest.approx(MISMATCH * (1 - 6 / 7 / 4), abs=0.02)


def test_pieces_of_a_trajectory_are_laid_out_as_everywhere() -> None:
    values = topic_values(2, np.random.default_rng(0))
    step = step_of(topic_names()[:2], values[:, 0])
    assert prompt_of(values).shape == (2, LAYOUT.prompt_tokens)
    assert step.shape == (2, LAYOUT.step_tokens)
    value_place = LAYOUT.value_starts[0] - LAYOUT.query_starts[0]
    assert torch.equal(step[:, value_place], values[:, 0, 0])
    separators = Separators.encode(PlainTextEncoder(build_tokenizer()))
    assert separators == LAYOUT.separators

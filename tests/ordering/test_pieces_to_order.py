"""What users give, in pieces: passages, keys with values, and a text; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.pairs import PairOptions
from attention_rl_trainer.memories.tokenization import PlainTextEncoder
from attention_rl_trainer.ordering.pieces import Pieces, batch_of, cut_pieces, pair_lengths
from attention_rl_trainer.types import PADDING

K, V = 4, 3
LONG = "the river flows from a mountain lake to the northern sea"


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> PlainTextEncoder:
    return PlainTextEncoder(tokenizer)


def cut(encoder: PlainTextEncoder, given: Any, context: Any = None, **options: Any) -> Pieces:
    return cut_pieces(given, context, encoder, K, V, **options)


def test_a_passage_begins_with_its_key_and_all_that_follows_is_its_value(encoder: PlainTextEncoder) -> None:
    pieces = cut(encoder, [f"  {LONG}\n", "sea"])
    ids = encoder.encode(f" {LONG}")
    assert (pieces.keys[0], pieces.values[0]) == (ids[:K], ids[K:])
    assert len(ids) > K + V
    assert pieces.keys[1] == pieces.values[1] == encoder.encode(" sea")
    assert pieces.texts == [LONG, "sea"]
    assert (pieces.context_key, pieces.context_value, pieces.first) == ([], [], 0)


def test_values_are_cut_where_that_is_asked_for(encoder: PlainTextEncoder) -> None:
    whole, short = cut(encoder, [LONG], LONG), cut(encoder, [LONG], LONG, max_value_tokens=2)
    assert short.keys == whole.keys
    assert short.values == [whole.values[0][:2]]
    assert short.context_value == whole.context_value[:2]


@pytest.mark.parametrize(
    "pairs",
    [[("a river", LONG)], [["a river", LONG]], [{"key": "a river", "value": LONG, "more": 1}]],
    ids=["tuple", "list", "object"],
)
def test_keys_are_cut_as_in_training_and_values_are_not(pairs: Any, encoder: PlainTextEncoder) -> None:
    pieces = cut(encoder, pairs)
    assert pieces.keys == [encoder.encode(" a river")[:K]]
    assert pieces.values == [encoder.encode(f" {LONG}")]
    assert pieces.texts == [f"a river {LONG}"]


def test_a_text_is_cut_as_an_article_and_its_first_piece_is_the_context(encoder: PlainTextEncoder) -> None:
    pieces, ids = cut(encoder, LONG), encoder.encode(LONG)
    assert pieces.first == 1
    assert (*pieces.context_key, *pieces.context_value) == tuple(ids[: K + V])
    assert pieces.context == pieces.texts[0]
    assert "".join(encoder.decode(ids[start : start + K + V]) for start in range(0, len(ids), K + V)) == LONG
    assert len(pieces.texts) == len(pieces) + 1 == -(-len(ids) // (K + V))
    assert [pieces.keys[0], pieces.values[0]] == [ids[K + V : 2 * K + V], ids[2 * K + V : 2 * (K + V)]]


def test_with_a_context_all_of_a_text_is_ordered(encoder: PlainTextEncoder) -> None:
    alone, after = cut(encoder, LONG), cut(encoder, LONG, "where?")
    assert after.texts == alone.texts
    assert (len(after), after.first, after.context) == (len(alone) + 1, 0, "where?")


def test_a_context_is_a_text_or_a_key_with_a_value(encoder: PlainTextEncoder) -> None:
    question = cut(encoder, ["sea"], LONG)
    ids = encoder.encode(f" {LONG}")
    assert (question.context_key, question.context_value) == (ids[:K], ids[K:])
    assert cut(encoder, ["sea"], "sea").context_value == []
    pair = cut(encoder, ["sea"], ("sea", ""))
    assert (pair.context_key, pair.context_value, pair.context) == (encoder.encode(" sea"), [], "sea")


@pytest.mark.parametrize(
    ("given", "context", "message"),
    [
        ([], None, "nothing to order; give one text, or a list of passages"),
        (7, None, "what is to be ordered is of type int; give"),
        (["sea", "  "], None, "passage 1 is empty; leave it out"),
        (["sea", ("a", "b")], None, "piece 1 is of type tuple, but the first is of type str"),
        ([("a", "b"), "sea"], None, "piece 1 is of type str, but the first is of type tuple"),
        ([("a", "b", "c")], None, "piece 0 is of type tuple without a text for key and value"),
        ([{"key": "a"}], None, "piece 0 is of type dict without a text for key and value"),
        ([("a", "")], None, "the value of piece 0 is empty"),
        (["sea"], "  ", "context is empty"),
        ("sea", None, "piece of 4 \\+ 3 tokens, and the first is read before all others"),
    ],
    ids=["none", "number", "empty", "mixed", "mixed too", "three", "no value", "empty value", "context", "short"],
)
def test_what_cannot_be_ordered_is_named(given: Any, context: Any, message: str, encoder: PlainTextEncoder) -> None:
    with pytest.raises(ValueError, match=message):
        cut(encoder, given, context)


def test_memories_are_stacked_with_padding_where_they_are_shorter(encoder: PlainTextEncoder) -> None:
    memories = [cut(encoder, [LONG, "sea"]), cut(encoder, ["lake", f"{LONG} {LONG}"], LONG)]
    lengths = pair_lengths(memories)
    longest = len(encoder.encode(f" {LONG} {LONG}")) - K
    assert lengths == {"tokens_per_key": K, "tokens_per_value": longest}
    batch = batch_of(memories, [3, 5], PairOptions(**lengths))
    assert batch.is_padded
    assert [article.title for article in batch.articles] == ["memory 3", "memory 5"]
    assert batch.pair_numbers.tolist() == [[0, 1], [0, 1]]
    assert batch.key_tokens[0, 0].tolist() == memories[0].keys[0]
    assert batch.value_tokens[1, 1].tolist() == memories[1].values[1]
    assert set(batch.example_keys[0].tolist()) == {PADDING}
    assert torch.equal(batch.example_keys[1], torch.tensor(memories[1].context_key))

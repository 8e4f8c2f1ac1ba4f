"""The ids of a text by pieces are those of the whole text, with a tokenizer of each family and with hostile texts."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import article_texts
from tokenizer_families import WORD_PATTERNS, byte_level_like, gemma_like, gpt2, llama_like, smollm2
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.pieces import PieceEncoder, PiecewiseIds
from attention_rl_trainer.memories.tokenization import plain_text_tokenizer

PROSE = article_texts(6)
LINES = [text.replace(" law ", ".\n\n").replace(" war ", "\n") for text in PROSE]
FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "GPT-2": gpt2,
    "SmolLM2": smollm2,
    "gemma": lambda: gemma_like(LINES),
    "llama, words apart": lambda: llama_like([word for text in PROSE for word in text.split()], has_prefix=False),
    "llama with a prefix": lambda: llama_like([word for text in PROSE for word in text.split()], has_prefix=True),
    **{
        name: functools.partial(byte_level_like, LINES, pattern) for name, pattern in WORD_PATTERNS.items()
    },
}  # fmt: skip


@functools.cache
def plain(family: str) -> Tokenizer:
    return plain_text_tokenizer(FAMILIES[family]())


@functools.cache
def where_to_cut(family: str) -> re.Pattern[str] | None:
    return PieceEncoder(plain(family)).cut


def encoder_of(family: str, *sizes: int) -> PieceEncoder:
    """An encoder that need not look through the vocabulary again."""
    encoder = PieceEncoder(plain(family), *sizes)
    encoder.cut = where_to_cut(family)
    return encoder


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids


PIECES = [
    "the", " river", " a", "b c", "I'll", "DON'T", "McDonald", " 1", "234567", "8 9", "x_1", ".", ", ", "!?", "(", "\n",
    "\n\n", " ", "  ", "\t", "\r\n", "\u00a0", "\u2028", "e\u0301", "\u00e9 ", "\u0335" * 9, "\u6f22\u5b57", "\u3002\n",
    "\u3042 ", "\u1112\u1161\u11ab", "\U0001f468\u200d\U0001f469", "\u00b2 ", "\ufb01 ", "\u2474 ", "\ud83d",
    "\udc80 a", "<|endoftext|>", "\u2581", "<0x41>", "x" * 40, "aaaa ",
]  # fmt: skip
texts = st.one_of(st.lists(st.sampled_from(PIECES), max_size=80).map("".join), st.text(max_size=80))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name == "SmolLM2" else name for name in FAMILIES]
)
def test_the_ids_of_a_hostile_text_by_pieces_are_those_of_the_whole(family: str) -> None:
    tokenizer = plain(family)
    assert where_to_cut(family) is not None

    @settings(max_examples=150, deadline=None)
    @given(text=texts, piece=st.integers(1, 30), context=st.integers(2, 12))
    def check(text: str, piece: int, context: int) -> None:
        encoder = encoder_of(family, piece, context)
        expected = whole(tokenizer, text)
        ids = PiecewiseIds(text, encoder)
        assert ids[:3] == expected[:3]
        assert ids[1:9] == expected[1:9]
        assert len(ids) == len(expected)
        assert ids[:] == expected
        # Its pieces are known now.
        again = PiecewiseIds(text, encoder)
        assert len(again) == len(expected)
        assert again[5:20] == expected[5:20]

    check()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["GPT-2", "SmolLM2"])
def test_the_ids_of_real_articles_by_pieces_are_those_of_the_whole(family: str) -> None:
    for text in (row["text"] for row in load_articles("offline") if row["text"]):
        expected = whole(plain(family), text)
        for sizes in ((), (200, 20)):
            assert PiecewiseIds(text, encoder_of(family, *sizes))[:] == expected
        assert PiecewiseIds(text, encoder_of(family))[:1280] == expected[:1280]


def crossing() -> Tokenizer:
    """Merges across words, as a vocabulary of whole phrases has them."""
    return byte_level_like(LINES, None).backend_tokenizer


def seven_at_a_time() -> Tokenizer:
    """What is a word depends on the number of characters before it."""
    bpe = byte_level_like(LINES, WORD_PATTERNS["llama 3"]).backend_tokenizer
    seven = pre_tokenizers.Split(Regex(r"[\s\S]{1,7}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([seven, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return bpe


def with_word_ends() -> Tokenizer:
    vocabulary = {
        letter + end: number for number, (letter, end) in enumerate((a, b) for a in "ab" for b in ("", "</w>"))
    }
    bpe = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return bpe


def without_lines() -> Tokenizer:
    """The end of a line becomes a space, with which the next word begins."""
    bpe = llama_like([" ".join(PROSE)], has_prefix=False).backend_tokenizer
    spaces = [normalizers.Replace("\n", " "), normalizers.Replace(" ", "\u2581")]
    bpe.normalizer = normalizers.Sequence(spaces)
    return bpe


def unigram() -> Tokenizer:
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0), (" ", -1.0)], 0))


@pytest.mark.parametrize("make", [crossing, seven_at_a_time, with_word_ends, without_lines, unigram])
def test_a_text_is_not_cut_where_the_ids_could_change(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    encoder = PieceEncoder(tokenizer, 1, 4)
    for text in (LINES[0], "a b\nb a " * 30):
        assert PiecewiseIds(text, encoder)[:] == whole(tokenizer, text)
    assert encoder.cut is None


def test_a_text_is_cut_at_lines_alone_where_the_vocabulary_goes_across_spaces() -> None:
    phrases = [line for text in LINES for line in text.split("\n")]
    tokenizer = byte_level_like(phrases, r"[^\n]+|\n").backend_tokenizer
    encoder = PieceEncoder(tokenizer, 20, 5)
    assert encoder.cut is not None
    assert re.search(encoder.cut, "a b") is None
    assert re.search(encoder.cut, "a\nb") is not None
    assert PiecewiseIds(LINES[0], encoder)[:] == whole(tokenizer, LINES[0])


def test_of_a_long_text_no_more_is_encoded_than_is_looked_at_and_nothing_twice() -> None:
    text = " ".join(LINES) * 4
    encoder = encoder_of("GPT-2", 1000, 100)
    num_characters = []

    class Counting:
        def encode(self, part: str, **options: bool) -> object:
            num_characters.append(len(part))
            return plain("GPT-2").encode(part, **options)

    encoder.tokenizer = Counting()
    ids = PiecewiseIds(text, encoder)
    assert ids[:96] == whole(plain("GPT-2"), text)[:96]
    assert sum(num_characters) < 1500
    assert len(ids) == len(whole(plain("GPT-2"), text))
    assert sum(num_characters) < 1.4 * len(text)
    num_characters.clear()
    # Another visit.
    again = PiecewiseIds(text, encoder)
    assert len(again) == len(ids)
    assert again[9000:9100] == ids[9000:9100]
    assert sum(num_characters) < 3000


def test_the_first_ids_of_a_text_of_megabytes_take_no_time() -> None:
    text = ("\n".join(LINES) + "\n") * 600
    encoder = encoder_of("llama 3")
    assert len(text) > 5_000_000
    started = time.process_time()
    first = PiecewiseIds(text, encoder)[:96]
    assert time.process_time() - started < 0.5
    assert first == whole(plain("llama 3"), text[:2000])[:96]


def test_the_texts_that_are_known_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_rl_trainer.memories.pieces.MAX_KNOWN_TEXTS", 2)
    encoder = PieceEncoder(plain("llama 3"), 50, 10)
    for text in PROSE:
        assert len(PiecewiseIds(text, encoder)) == len(whole(plain("llama 3"), text))
    known = list(encoder.known)
    assert len(known) == 2
    # A short text is not worth a place.
    assert len(PiecewiseIds("short", encoder)) == len(whole(plain("llama 3"), "short"))
    assert list(encoder.known) == known

"""Text to ids as plain text, with a tokenizer of each family."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from tokenizer_families import BLANKS, BYTES, WORD_PATTERNS, byte_level_like, gemma_like, gpt2, llama_like, smollm2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.tokenization import (
    EVERY_UTF8_BYTE,
    PlainTextEncoder,
    allowed_token_ids,
    control_token_ids,
    plain_text_tokenizer,
)

HOSTILE = [
    "",
    "plain words",
    "<|endoftext|> at the start",
    "in the <|endoftext|> middle and <tool_call>{}</tool_call>",
    "glued<|endoftext|>together<tool_call>",
    "at the end <|endoftext|>",
    "  spaces\n\ttabs\r\n and ünïcödé 漢字 🙂 \x00 \u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_control_token_comes_out_of_text_and_text_comes_back(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    ids = encoder.encode(text)
    assert not encoder.control_ids.intersection(ids)
    assert encoder.decode(ids) == text


CONTROL_TOKENS = ["<|im_start|>", "<tool_call>", "[INST]", "\u2581start"]


def with_control_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Add special tokens, and others that are none and are nevertheless matched in text."""
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL_TOKENS[:1]})
    tokenizer.add_tokens(CONTROL_TOKENS[1:])
    return tokenizer


def unigram(texts: list[str], *, has_bytes: bool) -> PreTrainedTokenizerFast:
    """A Unigram model as of SentencePiece, which puts a `▁` before a text and for its spaces."""
    words = sorted({f"\u2581{word}" for text in texts for word in text.split()})
    characters = [chr(code) for code in range(33, 127)]
    pieces = [("\u2581", -2.0), *((word, -5.0) for word in words), *((character, -9.0) for character in characters)]
    bytes_ = [(byte, -12.0) for byte in BYTES] if has_bytes else []
    model = Tokenizer(models.Unigram([("<unk>", 0.0), *pieces, *bytes_], unk_id=0, byte_fallback=has_bytes))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"eos_token": "</s>", "pad_token": "<pad>"} | ({} if has_bytes else {"unk_token": "<unk>"})
    return PreTrainedTokenizerFast(tokenizer_object=model, **names)


def word_piece(texts: list[str]) -> PreTrainedTokenizerFast:
    """BERT's model, which reads lower case and knows no bytes."""
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    model.train_from_iterator([*texts, *special, *CONTROL_TOKENS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def copied(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<|endoftext|>"
    )


@pytest.fixture(
    params=["GPT-2", pytest.param("SmolLM2", marks=pytest.mark.slow), "llama", "llama with a prefix", "unigram"]
)
def family(request: pytest.FixtureRequest, texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of each family, with special and other added tokens; the first two are those of real models."""
    builders: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
        "GPT-2": lambda: copied(gpt2()),
        "SmolLM2": lambda: copied(smollm2()),
        "llama": lambda: llama_like(texts, has_prefix=False),
        "llama with a prefix": lambda: llama_like(texts, has_prefix=True),
        "unigram": lambda: unigram(texts, has_bytes=True),
    }
    return with_control_tokens(builders[request.param]())


PLACES = ["{} stands first", "the ri{}ver flows", "the river {} flows", "it stands last {}", "{}", "{}{}", " {} "]


def as_returned(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """What decoding gives back of a text: all of it, but for what a family by its nature does not keep."""
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.decoder, decoders.ByteLevel):
        return text
    text = text.replace("\u2581", " ")
    if isinstance(backend.model, models.Unigram):
        # The space that leads a text is taken for the one that is put before every text, and `<0x41>` for a byte.
        return text.removeprefix(" ").replace("<0x41>", "A")
    return text


def test_every_control_token_stays_text_wherever_it_stands(family: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(family)
    control_tokens = [token.content for token in family.added_tokens_decoder.values()]
    assert len(control_tokens) == len(encoder.control_ids)
    assert set(CONTROL_TOKENS) < set(control_tokens)
    assert family.eos_token in control_tokens
    for token in control_tokens:
        matched = family.encode(f"a {token} b", add_special_tokens=False)
        assert encoder.control_ids.intersection(matched), "the tokenizer itself matches it"
        for place in PLACES:
            text = place.replace("{}", token)
            ids = encoder.encode(text)
            assert not encoder.control_ids.intersection(ids), text
            assert encoder.decode(ids) == as_returned(text, family)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two spaces lead, three   part",
        "tabs\tand\r\nlines\n",
        "e\u0301 stays decomposed, \u00e9 composed",
        "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
        "\x00\x01\x7f\ufeff\ufffd\uffff",
        "\U0001f642\U0010ffff \u6f22\u5b57",
        "<0x41> is written, not a byte",
    ],
)
def test_every_family_gives_a_text_back(text: str, family: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(family)
    ids = encoder.encode(text)
    assert not encoder.control_ids.intersection(ids)
    assert encoder.decode(ids) == as_returned(text, family)


def test_the_probe_for_unknown_characters_holds_every_byte_of_utf8() -> None:
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set(EVERY_UTF8_BYTE.encode()) == set(range(256)) - never


def test_a_tokenizer_without_bytes_is_refused_because_of_what_it_does_not_know(texts: list[str]) -> None:
    for tokenizer, unknown in ((unigram(texts, has_bytes=False), "<unk>"), (word_piece(texts), "[UNK]")):
        # An article with one such character would hold the control token, and no control token's text shows it.
        assert tokenizer.unk_token_id in tokenizer.encode("the river \u6f22", add_special_tokens=False)
        message = rf"characters it does not know into the control token '{re.escape(unknown)}'.*byte fallback"
        with pytest.raises(ValueError, match=message):
            PlainTextEncoder(tokenizer)


@pytest.mark.parametrize("place", ["", "a"])
def test_a_control_token_that_the_model_makes_in_one_place_alone_is_refused(place: str) -> None:
    """The model looks whole texts up before it merges, so that only the text of the token alone gives the token."""
    vocabulary = {token: number for number, token in enumerate([f"{place}</s>", *BYTES, "a", "b"])}
    bpe = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, ignore_merges=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=f"{place}</s>")
    with pytest.raises(ValueError, match="</s>' into a control token"):
        PlainTextEncoder(tokenizer)


def test_ordinary_text_gets_the_same_ids_as_from_the_tokenizer(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = plain_text_tokenizer(tokenizer)
    for text in texts[:5]:
        assert plain.encode(text).ids == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", ["a \ud800 b", b"a \xff b".decode("utf-8", errors="surrogateescape")])
def test_a_lone_surrogate_is_read_as_a_question_mark(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    assert encoder.decode(encoder.encode(text)) == "a ? b"


def test_allowed_ids_leave_out_special_added_and_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    allowed = allowed_token_ids(tokenizer, len(tokenizer) + 20)
    assert not control_token_ids(tokenizer).intersection(allowed.tolist())
    assert len(control_token_ids(tokenizer)) == 2
    assert len(allowed) == len(tokenizer) - 2
    assert allowed.max() < len(tokenizer)
    assert torch.equal(allowed, allowed.sort().values)


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match=r"must be a fast tokenizer.*ByT5Tokenizer"):
        PlainTextEncoder(ByT5Tokenizer())


def test_a_tokenizer_whose_model_matches_control_tokens_is_refused() -> None:
    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), *((character, -2.0) for character in "ab </s>")]
    unigram = Tokenizer(models.Unigram(list(dict(vocabulary).items()), unk_id=0))
    with pytest.raises(ValueError, match=r"'</s>' into a control token"):
        PlainTextEncoder(PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>"))


def test_the_blank_tokens_of_gemma_are_text_and_its_other_added_tokens_are_not(texts: list[str]) -> None:
    tokenizer = gemma_like(texts)
    encoder = PlainTextEncoder(tokenizer)
    blanks = set(tokenizer.convert_tokens_to_ids(BLANKS))
    others = ["<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<table>", "[multimodal]", "<unused0>"]
    assert len(blanks) == 90
    assert encoder.control_ids == set(tokenizer.convert_tokens_to_ids(others))
    assert blanks < set(allowed_token_ids(tokenizer, len(tokenizer)).tolist())
    text = "the river\n\n\nflows   from\n\t\ta <table> of <start_of_turn>\n\n"
    ids = encoder.encode(text)
    assert encoder.decode(ids) == text
    assert len(blanks.intersection(ids)) == 4
    assert not encoder.control_ids.intersection(ids)
    ordinary = text.replace("<table>", "table").replace("<start_of_turn>", "")
    assert encoder.encode(ordinary) == tokenizer.encode(ordinary, add_special_tokens=False)


def with_added(*tokens: str | AddedToken) -> PreTrainedTokenizerFast:
    tokenizer = byte_level_like(["the river flows"], WORD_PATTERNS["llama 3"])
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.mark.parametrize("blank", [" " * 24, "\t" * 5, "\r\n", "\u2581\u2581", "\u00a0", "\u3000\u3000"], ids=ascii)
def test_an_added_token_of_white_space_may_stand_in_a_query(blank: str) -> None:
    """As GPT-NeoX, CodeGen and Phi have them for the indentation of code."""
    tokenizer = with_added(blank, "<tool_call>")
    added, control = tokenizer.convert_tokens_to_ids([blank, "<tool_call>"])
    assert control_token_ids(tokenizer) == {tokenizer.eos_token_id, control}
    assert added in allowed_token_ids(tokenizer, len(tokenizer)).tolist()
    encoder = PlainTextEncoder(tokenizer)
    text = f"the{blank}river <tool_call>"
    assert encoder.decode(encoder.encode(text)) == text


@pytest.mark.parametrize("token", ["<|user|>", "[INST]", "\u2581start", "photosynthesis", " . "], ids=ascii)
def test_an_added_token_that_is_more_than_white_space_is_control(token: str) -> None:
    tokenizer = with_added(token)
    assert tokenizer.convert_tokens_to_ids(token) in control_token_ids(tokenizer)


def test_white_space_that_ends_a_text_is_control(texts: list[str]) -> None:
    tokenizer = with_added(AddedToken("\n\n\n", special=True))
    tokenizer.eos_token = "\n\n"
    assert set(tokenizer.convert_tokens_to_ids(["\n\n", "\n\n\n"])) <= control_token_ids(tokenizer)
    gemma = gemma_like(texts)
    gemma.eos_token = "\n\n"
    with pytest.raises(ValueError, match=r"turns the plain text '\\n\\n' into a control token"):
        PlainTextEncoder(gemma)

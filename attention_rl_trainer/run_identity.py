"""What makes a run the same run: model, adapter, tokens, articles and their order.

A checkpoint keeps these facts, and a run that differs in one of them does not go on from it (design §10). Large things
are told apart by a hash of samples of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attention_rl_trainer.articles import Article
from attention_rl_trainer.config import AttentionGuidedRLConfig
from attention_rl_trainer.durability import Fact

_SAMPLED_VALUES = 64
_SAMPLED_ROWS = 16


def model_facts(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Fact]:
    """Describe the base model, the tokenizer and the adapter's shape.

    Args:
        model: the adapted model.
        tokenizer: its tokenizer.
    """
    base = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = model.peft_config[model.active_adapter]
    options = config.to_dict()
    modules = options.get("target_modules") or ()
    return {
        "model.architecture": type(model.get_base_model()).__name__,
        "model.parameters": sum(p.numel() for p in base.values()),
        "model.precision": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in base.values()})),
        "model.weights": _digest(_samples(base)),
        "tokenizer.vocabulary": _digest(sorted(tokenizer.get_vocab().items())),
        "adapter.type": str(options["peft_type"]),
        "adapter.rank": options.get("r"),
        "adapter.alpha": options.get("lora_alpha"),
        "adapter.modules": modules if isinstance(modules, str) else ", ".join(sorted(modules)),
        "adapter.tensors": _digest((name, *p.shape) for name, p in adapter.items()),
    }


def option_facts(args: AttentionGuidedRLConfig) -> dict[str, Fact]:
    """Describe how articles are cut, how long queries are, and in which order articles come.

    Args:
        args: the run's options.
    """
    names = (
        *("tokens_per_query", "tokens_per_key", "tokens_per_value", "num_kv_pairs", "subset_fraction", "window"),
        *("include_key_in_context", "seed", "shuffle", "shuffle_buffer_size", "overfit_articles"),
    )
    facts: dict[str, Fact] = {name: getattr(args, name) for name in names}
    # The states of one optimizer mean nothing to another.
    return facts | {"num_steps": args.steps_per_trajectory, "optim": str(getattr(args.optim, "value", args.optim))}


def article_facts(articles: Any, text_column: str) -> dict[str, Fact]:
    """Describe a data set by its size and a sample of its rows; of a stream, by its first row.

    Args:
        articles: a (streamed) data set, or a list of rows or of articles.
        text_column: where the text is.
    """
    if isinstance(articles, IterableDataset):
        # Reading on would cost a network's time.
        first = next(iter(articles), None)
        return {"articles.count": None, "articles.sample": _digest([_text_of(first, text_column)])}
    count = len(articles)
    places = sorted({number * count // _SAMPLED_ROWS for number in range(_SAMPLED_ROWS)}) if count else []
    return {
        "articles.count": count,
        "articles.sample": _digest(_text_of(articles[place], text_column) for place in places),
    }


def _text_of(row: Mapping[str, object] | Article | None, text_column: str) -> str:
    if isinstance(row, Article):
        return row.text
    return "" if row is None else repr(row.get(text_column))


def _samples(parameters: Mapping[str, Tensor]) -> Iterable[tuple[str, list[int], str, str]]:
    for name, parameter in parameters.items():
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLED_VALUES)
        values = flat[::stride].cpu().contiguous().view(torch.uint8)
        yield name, list(parameter.shape), str(parameter.dtype), values.numpy().tobytes().hex()


def _digest(parts: Iterable[object]) -> str:
    """Sixteen hexadecimal digits: enough to tell two runs apart, short enough to be read."""
    text = json.dumps(list(parts), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]

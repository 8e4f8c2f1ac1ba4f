"""What makes a run the same run: model, adapter, tokens, articles and their order.

A checkpoint keeps these facts, and a run that differs in one of them does not resume from it (design §10). Large things
are distinguished by a hash of samples of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, cast

from datasets import IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_rl_trainer.durability.discovery import Fact
from attention_rl_trainer.memories.loading import ReadingOptions
from attention_rl_trainer.memories.stream import READING_ERRORS, Article, Entries
from attention_rl_trainer.models.adapters import sampled_weights, weights_digest
from attention_rl_trainer.rollout.layout import LayoutOptions

_LISTED = {"r", "lora_alpha", "target_modules", "peft_type"}
# Where the base model is, which version of PEFT made the adapter, and what a loaded one is for.
_UNIMPORTANT = {"base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "task_type"}
# All rows of a small data set.
_SAMPLED_ROWS = 1024
_FIRST_ROWS = 64


def identity_facts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    articles: Any,
    layout: LayoutOptions,
    reading: ReadingOptions,
    num_workers: int,
) -> dict[str, Fact]:
    """Collect what makes a run the same run: model, adapter, tokenizer, articles, and how they are cut and ordered.

    Args:
        model: the adapted model.
        tokenizer: its tokenizer.
        articles: a (streamed) data set, or a list of rows or of articles.
        layout: how articles are cut, and how long queries are.
        reading: in which order articles come.
        num_workers: processes that read ahead.
    """
    cut = option_facts(layout, reading)
    return model_facts(model, tokenizer) | cut | article_facts(articles, reading.dataset_text_column, num_workers)


def calibration_origin(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, articles: Any, reading: ReadingOptions
) -> dict[str, Fact]:
    """Collect what a calibration of the selector belongs to: the base model, and the articles where there are any."""
    facts = model_facts(model, tokenizer)
    origin = {name: facts[name] for name in ("model.architecture", "model.weights", "tokenizer")}
    # Nearly the same is fitted in float32 and in bfloat16.
    origin["model.weights"] = weights_digest(cast(PreTrainedModel, model.get_base_model())) or facts["model.weights"]
    if articles is not None:
        origin["articles.sample"] = article_facts(articles, reading.dataset_text_column, 0)["articles.sample"]
    return origin


def kind_of(part: object) -> str:
    """Name a part that a user can exchange."""
    return str(getattr(part, "__qualname__", type(part).__qualname__))


def model_facts(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Fact]:
    """Describe the base model, the tokenizer and the adapter's shape."""
    base = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    adapter = {name: p for name, p in model.named_parameters() if p.requires_grad}
    config = model.peft_config[model.active_adapter]
    options = config.to_dict()
    modules = options.get("target_modules") or ()
    return {
        "model.architecture": type(model.get_base_model()).__name__,
        "model.parameters": sum(p.numel() for p in base.values()),
        "model.precision": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in base.values()})),
        "model.weights": _digest(sampled_weights(base.items()).items()),
        "tokenizer": _digest([_tokenizer_specification(tokenizer)]),
        "adapter.type": str(options["peft_type"]),
        "adapter.rank": options.get("r"),
        "adapter.alpha": options.get("lora_alpha"),
        "adapter.modules": modules if isinstance(modules, str) else ", ".join(sorted(modules)),
        "adapter.options": _other_options(config),
        "adapter.tensors": _digest((name, *p.shape) for name, p in adapter.items()),
    }


def _tokenizer_specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How text becomes tokens; cutting and filling up to a length are set anew by whoever uses the tokenizer."""
    specification: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return specification | {"truncation": None, "padding": None}


def _other_options(config: PeftConfig) -> str:
    """Spell what an adapter has beside rank, alpha and modules, where it differs from the kind's defaults."""
    defaults = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(config)
    }
    chosen = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in _LISTED | _UNIMPORTANT and value != defaults.get(name)
    }
    return ", ".join(f"{name}={value}" for name, value in sorted(chosen.items()))


def option_facts(layout: LayoutOptions, reading: ReadingOptions) -> dict[str, Fact]:
    """Describe how articles are cut, how long queries are, and in which order articles come."""
    cut = ("tokens_per_query", "tokens_per_key", "tokens_per_value", "num_kv_pairs", "subset_fraction", "window")
    facts: dict[str, Fact] = {name: getattr(layout, name) for name in (*cut, "include_key_in_context")}
    facts |= {"show_keys": layout.show_keys} if layout.show_keys != "none" else {}
    order = ("shuffle", "shuffle_buffer_size", "overfit_articles")
    facts |= {name: getattr(reading, name) for name in order}
    return facts | {"num_steps": layout.steps_per_trajectory}


def article_facts(articles: Any, text_column: str, num_workers: int) -> dict[str, Fact]:
    """Describe a data set by its size and by its rows, of a large one by a sample; a stream, by its first rows.

    Args:
        articles: a (streamed) data set, or a list of rows or of articles.
        text_column: column that holds the text.
        num_workers: processes that read ahead.
    """
    if isinstance(articles, IterableDataset):
        return {
            "articles.count": None,
            "articles.sample": _digest(_first_texts(articles, text_column)),
            # `datasets` shuffles a stream differently in a worker process.
            "dataloader_num_workers": num_workers,
        }
    count = len(articles)
    places = sorted({number * count // _SAMPLED_ROWS for number in range(_SAMPLED_ROWS)}) if count else []
    texts = (_text_at(articles, place, text_column) for place in places)
    return {"articles.count": count, "articles.sample": _digest(texts)}


def _first_texts(articles: IterableDataset, text_column: str) -> Iterator[str]:
    # Reading all would cost a network's time.
    try:
        for row in itertools.islice(articles, _FIRST_ROWS):
            yield _text_of(row, text_column)
    except READING_ERRORS:
        # The stream of articles names the place, should the run come to it.
        return


def _text_at(articles: Any, place: int, text_column: str) -> str:
    try:
        return _text_of(articles[place], text_column)
    except UnicodeDecodeError as error:
        # The stream of articles counts such a row as skipped.
        return repr(error.object)


def _text_of(row: Mapping[str, object] | Article, text_column: str) -> str:
    if isinstance(row, Entries):
        return repr((row.keys, row.values))
    return repr(row.text if isinstance(row, Article) else row.get(text_column))


def _digest(parts: Iterable[object]) -> str:
    """Sixteen hexadecimal digits: enough to distinguish two runs, short enough to be read."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, ensure_ascii=True).encode("ascii"))
    return digest.hexdigest()[:16]

"""A run's options as the file with which ``attention-rl train`` does it again: those that differ from the defaults."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

import yaml
from transformers import TrainingArguments

from attention_rl_trainer.models.base import OFFLINE, ModelName, commit_of
from attention_rl_trainer.options import Options, declaring_class
from attention_rl_trainer.publishing.data import DataFacts
from attention_rl_trainer.publishing.published import PublishingOptions

# Of the Trainer's options those on which it depends what is learned.
_OF_TRAINER = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "seed",
    "full_determinism",
    "use_cpu",
)
# How the model is loaded has options of its own, and what is pushed changes nothing.
_LEFT_OUT = {"model_init_kwargs", *(item.name for item in fields(PublishingOptions))}
_ALWAYS = ("num_episodes", "seed")
_OF_ADAPTER = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def changed_options(options: TrainingArguments) -> dict[str, Any]:
    """Return the options of this method, and those of the Trainer that training depends on, that were changed."""
    kind = type(options)
    changed = {}
    for item in fields(options):
        if item.name in _LEFT_OUT:
            continue
        if item.name in _OF_TRAINER or issubclass(declaring_class(kind, item.name), Options):
            value = _plain(getattr(options, item.name))
            if value != _plain(_default(item)) or item.name in _ALWAYS:
                changed[item.name] = value
    return changed


def options_file(
    changed: Mapping[str, Any],
    base: ModelName,
    dtype: str,
    adapter: Mapping[str, Any],
    data: DataFacts,
    bits: int | None = None,
) -> str:
    """Write a run down as a file of options (YAML) for ``attention-rl train``.

    Model and data that are on no other machine are left out.

    Args:
        changed: from `changed_options`.
        base: the base model.
        dtype: of its weights, by name.
        adapter: the adapter's configuration.
        data: what it was trained on.
        bits: of the weights, 4 or 8 where they were quantized while loading.
    """
    where: dict[str, Any] = {"output_dir": "out"}
    if base.is_portable:
        where["model_name_or_path"] = base.name
        if base.name != OFFLINE and (commit := commit_of(base.revision)) is not None:
            where["model_revision"] = commit
    where["dtype"] = dtype
    if bits is not None:
        where[f"load_in_{bits}bit"] = True
    if data.option is not None:
        where["dataset_name"] = data.option
    modules = adapter.get("target_modules")
    lora = {ours: adapter[name] for name, ours in _OF_ADAPTER.items() if name in adapter}
    if isinstance(modules, str):
        lora["lora_target_modules"] = modules
    elif modules:
        lora["lora_target_modules"] = sorted(modules)
    text: str = yaml.safe_dump({**where, **lora, **changed}, sort_keys=False, default_flow_style=False)
    return text.strip()


@functools.cache
def versions() -> str:
    """Name the versions of Python and of what computes."""
    installed = {item.name for item in importlib.metadata.distributions()}
    found = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES if name in installed]
    return ", ".join([f"python {platform.python_version()}", *found])


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _plain(value: Any) -> Any:
    """Spell a value as YAML and the command line have it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value.is_integer() and math.isfinite(value):
        # 1 and 1.0 are the same option.
        return int(value)
    return list(value) if isinstance(value, tuple) else value

"""A trained adapter on its base model, wherever that is now."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.models.adapters import WEIGHTS, base_of, take_off, weights_digest
from attention_rl_trainer.models.base import OFFLINE, ModelName, commit_of, load_tokenizer
from attention_rl_trainer.models.choice import load_named_model, tokenizer_of
from attention_rl_trainer.models.embedded import expect_embedded_revision
from attention_rl_trainer.models.given import expect_language_model, expect_no_adapter

logger = logging.getLogger(__name__)


def load_adapted(
    folder: Path,
    device: torch.device,
    dtype: str = "auto",
    *,
    model: str | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a trained adapter on its base model, frozen, and the tokenizer.

    Args:
        folder: the adapter's.
        device: where it will run.
        dtype: of the base model's weights, by name; ``"auto"`` for the device's native one.
        model: the base model, or its name on this machine; by default the one that the adapter names.
        tokenizer: by default that of the base model, or, of one that was not loaded by name, the one in the folder.

    Raises:
        ValueError: the folder holds no adapter, it does not say on which model it was trained, or the model that was
            given is another one; names both.
        BaseModelError: the base model is not to be found here, or cannot be loaded.
    """
    trained_on = _base_in(folder)
    own_tokenizer: PreTrainedTokenizerBase | None
    if model is None and not trained_on.name:
        raise ValueError(f"{folder / CONFIG_NAME} names no base model; give the model that the adapter was trained on")
    if model is None or isinstance(model, str):
        base, own_tokenizer = _load_base(folder, trained_on, model, device, dtype, tokenizer)
    else:
        expect_no_adapter(model)
        expect_language_model(model)
        base, own_tokenizer = model, tokenizer
    _expect_base(folder, trained_on, base)
    if own_tokenizer is None:
        has_tokenizer = (folder / "tokenizer.json").is_file()
        own_tokenizer = load_tokenizer(str(folder)) if has_tokenizer else tokenizer_of(base)
    try:
        return _put_on(base, folder), own_tokenizer
    except (RuntimeError, ValueError, SafetensorError) as error:
        take_off(base)
        raise ValueError(
            f"The adapter in {folder}, trained on {_called(trained_on)}, cannot be put on "
            f"{_called(base_of(base))}: {error}"
        ) from error


def _put_on(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Load an adapter whole, where PEFT passes over what has no place in the model and warns of what is missing."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        there = set(file.keys())
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        adapted = PeftModel.from_pretrained(base, str(folder))
    differing = sorted(there ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys())
    if differing:
        raise ValueError(f"{len(differing)} of its tensors differ from those that belong on it, such as {differing[0]}")
    return adapted.eval()


def _base_in(folder: Path) -> ModelName:
    """Read which base model an adapter was trained on."""
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} holds no adapter: {' and '.join(missing)} missing; give the output_dir of a run, or one of its "
            "checkpoints"
        )
    config = PeftConfig.from_pretrained(str(folder))
    return ModelName(config.base_model_name_or_path or "", config.revision)


def _load_base(
    folder: Path,
    trained_on: ModelName,
    name: str | None,
    device: torch.device,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of a name, or the one that the adapter was trained on."""
    options: dict[str, Any] = {"dtype": dtype}
    if name is None and trained_on.name == OFFLINE:
        expect_embedded_revision(trained_on.revision)
    elif name is None and (commit := commit_of(trained_on.revision)) is not None:
        options["revision"] = commit
    try:
        base, own_tokenizer = load_named_model(name or trained_on.name, device, options, tokenizer)
    except BaseModelError as error:
        if name is not None:
            raise
        raise BaseModelError(
            f"{error} The adapter in {folder} was trained on it; where it is elsewhere now, give its name or folder."
        ) from error
    cast(nn.Module, base).to(device)
    return base, own_tokenizer


def _expect_base(folder: Path, trained_on: ModelName, base: PreTrainedModel) -> None:
    """Refuse a base model that is known to be another one than an adapter was trained on."""
    given = base_of(base)
    if trained_on.revision is not None and trained_on.revision.startswith(WEIGHTS):
        digest = weights_digest(base)
        is_other = digest is not None and digest != trained_on.revision
    else:
        is_other = trained_on.is_portable and given.is_portable and trained_on.name != given.name
    if is_other:
        raise ValueError(
            f"The adapter in {folder} was trained on {_called(trained_on)}, but the base model is {_called(given)}; "
            "give the model that it was trained on"
        )
    if trained_on.name == given.name == OFFLINE:
        expect_embedded_revision(trained_on.revision)
    elif None not in (commit_of(trained_on.revision), commit_of(given.revision)) and trained_on != given:
        logger.warning("%s was trained on %s; it is used on %s", folder, _called(trained_on), _called(given))


def _called(base: ModelName) -> str:
    revision = "" if base.revision is None else f" ({base.revision})"
    return f"{base.name or 'a model without a name'}{revision}"

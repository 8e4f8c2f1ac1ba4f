"""From what a user asks for to a base model that can run here, loaded with its tokenizer (design §3).

`auto` picks by what there is: the memory of the GPU, the Hub, the local cache.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub import auth_check
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attention_rl_trainer.errors import BaseModelError
from attention_rl_trainer.hub import cached_in_hub_cache, hub_obstacle
from attention_rl_trainer.models.base import (
    AUTO,
    GPT2,
    LLAMA,
    OFFLINE,
    BaseModelChoice,
    default_device,
    how_to_get_access,
    load_base_model,
    load_tokenizer,
    native_dtype,
)
from attention_rl_trainer.models.embedded import embedded_model_path
from attention_rl_trainer.models.given import expect_language_model, expect_no_adapter

logger = logging.getLogger(__name__)

# A card sold with 16 GB reports 14.6 (T4) to 15.99 GiB, since ECC and the driver keep a part of it.
LLAMA_MIN_GPU_MEMORY_GIB = 14.5
FILES_THAT_LOAD = {
    LLAMA: (
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ),
    GPT2: ("config.json", "tokenizer.json", "model.safetensors"),
}
"""What must be in the local cache for the models of `auto` to load without the Hub."""
_MODEL_OPTIONS = {"attn_implementation", "dtype", "quantization_config", "revision"}


@dataclass(frozen=True)
class AutoFacts:
    """What `auto` looks at."""

    gpu_memory_gib: float | None
    """Memory of the CUDA GPU in GiB, or None where training does not run on one."""
    native_dtype: torch.dtype
    """What `native_dtype` says of the device."""
    hub_obstacle: str | None
    """What stands between this machine and the Hub, or None where it answers."""
    llama_refusal: str | None
    """Why the Hub refuses access to Llama-3.2-3B, or None where it grants it or was not asked."""
    llama_is_cached: bool
    gpt2_is_cached: bool


def choose_base_model(name_or_path: str, device: torch.device | None = None) -> BaseModelChoice:
    """Turn what a user asked for into a model that can be loaded here.

    `offline`, and `auto` where it falls back on the embedded model, convert the embedded model on first use.

    Args:
        name_or_path: `auto`, `offline`, or a Hub repository, local folder or `.gguf` file, which loading checks.
        device: Where the base model will run; by default `default_device`.

    Raises:
        BaseModelError: The embedded model is needed and is not installed, or cannot be converted.
    """
    device = device or default_device()
    if name_or_path == AUTO:
        choice = decide_auto(_auto_facts(device))
    else:
        choice = BaseModelChoice(name_or_path, native_dtype(device), f"{name_or_path}, because it was asked for")
    if choice.name_or_path == OFFLINE:
        choice = _with_embedded_path(choice)
    logger.debug("Base model: %s.", choice.reason)
    return choice


def decide_auto(facts: AutoFacts) -> BaseModelChoice:
    """Pick the base model of `auto` from facts alone; the embedded model is called `offline`.

    Llama-3.2-3B in bfloat16 on a GPU of 16 GB or more, GPT-2 on a smaller one or on the CPU, the embedded model where
    that one is neither cached nor to be had from the Hub.
    """
    memory = facts.gpu_memory_gib
    if memory is not None and memory >= LLAMA_MIN_GPU_MEMORY_GIB:
        name, is_cached, refusal, dtype = LLAMA, facts.llama_is_cached, facts.llama_refusal, torch.bfloat16
        why = f"the GPU has {memory:.1f} GiB, which is enough for it"
        if facts.native_dtype != torch.bfloat16:
            why += " (it emulates bfloat16, which is slow)"
    else:
        name, is_cached, refusal, dtype = GPT2, facts.gpt2_is_cached, None, facts.native_dtype
        has = "there is no CUDA GPU" if memory is None else f"the GPU has only {memory:.1f} GiB"
        why = f"{has} and {LLAMA} needs one of 16 GB"
    obstacle = facts.hub_obstacle and f"the Hub cannot be reached: {facts.hub_obstacle}"
    blocked = obstacle or (refusal and f"access is refused: {refusal}")
    if blocked and not is_cached:
        reason = f"the embedded SmolLM2-135M ({OFFLINE}), because {name} is not in the local cache and {blocked}"
        return BaseModelChoice(OFFLINE, facts.native_dtype, reason)
    return BaseModelChoice(name, dtype, f"{name} in {str(dtype).removeprefix('torch.')}, because {why}")


def _auto_facts(device: torch.device) -> AutoFacts:
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
    obstacle = hub_obstacle()
    llama_is_cached = _is_cached(LLAMA)
    asks_for_llama = memory is not None and memory >= LLAMA_MIN_GPU_MEMORY_GIB and not llama_is_cached
    return AutoFacts(
        gpu_memory_gib=memory,
        native_dtype=native_dtype(device),
        hub_obstacle=obstacle,
        llama_refusal=_access_refusal(LLAMA) if asks_for_llama and obstacle is None else None,
        llama_is_cached=llama_is_cached,
        gpt2_is_cached=_is_cached(GPT2),
    )


def _is_cached(repo_id: str) -> bool:
    return all(cached_in_hub_cache(repo_id, filename) for filename in FILES_THAT_LOAD[repo_id])


def _access_refusal(repo_id: str) -> str | None:
    try:
        auth_check(repo_id)
    except GatedRepoError:
        return how_to_get_access(repo_id)
    except HfHubHTTPError as error:
        return f"the Hub answers with HTTP status {error.response.status_code} for {repo_id}"
    return None


def _with_embedded_path(choice: BaseModelChoice) -> BaseModelChoice:
    try:
        return replace(choice, name_or_path=str(embedded_model_path()))
    except BaseModelError as error:
        raise BaseModelError(f"The choice is {choice.reason}. {error}") from error


def load_named_model(
    name: str, device: torch.device, options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model by its name, and its tokenizer unless another is given.

    Args:
        name: as in `choose_base_model`.
        options: keyword arguments of `load_base_model`, named ``model_init_kwargs`` in the errors; ``dtype`` also by
            its name or ``"auto"``.

    Raises:
        ValueError: the options hold an unknown name or dtype.
        BaseModelError: the model cannot be loaded.
        HubUnreachableError: it would have to come from the Hub, which cannot be reached.
    """
    options = dict(options)
    unknown = sorted(set(options) - _MODEL_OPTIONS)
    if unknown:
        raise ValueError(f"model_init_kwargs takes {', '.join(sorted(_MODEL_OPTIONS))}; got {', '.join(unknown)}")
    choice = choose_base_model(name, device)
    if isinstance(options.get("dtype"), str):
        options["dtype"] = _parse_dtype(options["dtype"], choice.dtype)
    revision = options.get("revision")
    model = load_base_model(choice, **options)
    expect_no_adapter(model)
    expect_language_model(model)
    logger.info("Base model %s: %s", choice.name_or_path, choice.reason)
    return model, load_tokenizer(choice.name_or_path, revision=revision) if tokenizer is None else tokenizer


def _parse_dtype(name: str, default: torch.dtype) -> torch.dtype:
    if name == "auto":
        return default
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"model_init_kwargs['dtype'] (--dtype) must name a torch dtype such as 'bfloat16', got {name!r}"
        )
    return dtype


def tokenizer_of(model: PreTrainedModel | PeftModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model, with or without an adapter.

    Raises:
        ValueError: the model does not say where it was loaded from.
    """
    name = model.config.name_or_path
    if not name:
        raise ValueError("the model does not say where it was loaded from; give its tokenizer as processing_class")
    try:
        return load_tokenizer(name)
    except BaseModelError as error:
        raise BaseModelError(f"{error} Or give the model's tokenizer as processing_class.") from error


def with_tokenizer(
    model: str | PreTrainedModel | PeftModel,
    device: torch.device,
    loading: object,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a model that is given by its name, and its tokenizer unless another is given.

    Args:
        model: a name as `load_named_model` takes it, or a model.
        device: where it will run.
        loading: options of the loading, a mapping; ``None`` for none.
        tokenizer: one to use instead of the model's own.

    Raises:
        ValueError: there are options of the loading for a model that is loaded already; or as `load_named_model`.
    """
    options = loading if isinstance(loading, Mapping) else {}
    if isinstance(model, str):
        return load_named_model(model, device, options, tokenizer)
    if options:
        raise ValueError(
            f"model_init_kwargs ({', '.join(map(str, options))}) are for a model that is given by its name, but model "
            f"is a {type(model).__name__}, which is loaded already; leave them out, or give the name"
        )
    return model, tokenizer_of(model) if tokenizer is None else tokenizer

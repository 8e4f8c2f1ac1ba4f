"""What the default suite builds on the CPU, on another device; and how often a device has to be waited for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from tiny import VOCABULARY_SIZE, adapted, tiny_llama
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.tokenization import PlainTextEncoder, allowed_token_ids
from attention_rl_trainer.models.policy import PolicyModel, PolicyOptions
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment, SelectionOptions
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler

T = TypeVar("T")


def moved(value: T, device: torch.device) -> T:
    """Copy a record, a list or a tuple with all tensors in it on a device."""
    content: Any = value
    if isinstance(content, Tensor):
        return content.to(device)
    if is_dataclass(content) and not isinstance(content, type):
        changed: Any = replace(content, **{f.name: moved(getattr(content, f.name), device) for f in fields(content)})
        return changed
    if type(content) in (list, tuple):
        return type(content)(moved(item, device) for item in content)
    return value


def tiny_policy(
    device: torch.device, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> PolicyModel:
    """An adapted tiny Llama, the same on every device: the weights are drawn on the CPU."""
    model = adapted(tiny_llama(attention_dropout=0.0).to(dtype))
    return PolicyModel(model.to(device), allowed_token_ids(tokenizer, VOCABULARY_SIZE), PolicyOptions(**options))


def tiny_sampler(
    policy: PolicyModel, tokenizer: PreTrainedTokenizerFast, environment: KVMemoryEnvironment | None = None
) -> TrajectorySampler:
    """A sampler of 3 steps with queries of 4 tokens."""
    options = RolloutOptions(num_steps=3, tokens_per_query=4, subset_fraction=1.0)
    environment = environment or KVMemoryEnvironment(SelectionOptions(0.2))
    return TrajectorySampler(policy, environment, Separators.encode(PlainTextEncoder(tokenizer)), options, seed=7)


@contextmanager
def synchronizations() -> Iterator[list[str]]:
    """Collect where the host waits for the CUDA device while the context lasts, as ``file:line``."""
    places: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
            places += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]

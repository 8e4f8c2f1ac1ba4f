"""What the benchmarks run on: the embedded model with an adapter that matters, and real articles cut into pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tiny import adapted
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attention_rl_trainer.memories.articles.sources import load_articles
from attention_rl_trainer.memories.loading import MemoryLoader, ReadingOptions
from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.memories.tokenization import PlainTextEncoder, allowed_token_ids
from attention_rl_trainer.models.base import load_base_model, load_tokenizer
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.environment import KVMemoryEnvironment
from attention_rl_trainer.rollout.layout import Separators
from attention_rl_trainer.rollout.sampler import RolloutOptions, TrajectorySampler

SEED = 0


@contextmanager
def contiguous_head(policy: PolicyModel) -> Iterator[None]:
    """Make what reaches the head contiguous, without which its weight is copied for every row."""
    head = policy.causal_lm.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, arguments: (arguments[0].contiguous(), *arguments[1:]))
    try:
        yield
    finally:
        handle.remove()


def offline_policy(dtype: torch.dtype = torch.bfloat16) -> tuple[PolicyModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M with the default adapter, at the seed document's settings of the selector."""
    tokenizer = load_tokenizer("offline")
    model = adapted(load_base_model("offline", dtype=dtype), scale=0.02)
    return PolicyModel(model, allowed_token_ids(tokenizer, model.config.vocab_size)), tokenizer


def _sizes(steps: int, tokens: int) -> dict[str, Any]:
    """A memory of as many pairs as there are steps."""
    return {
        "num_kv_pairs": steps + 1,
        "subset_fraction": 1.0,
        "tokens_per_key": tokens,
        "tokens_per_value": tokens,
    }


def offline_batch(tokenizer: PreTrainedTokenizerFast, rows: int, steps: int, tokens: int = 20) -> MemoryBatch:
    """The first articles of the embedded dump, each with a memory of as many pairs as there are steps."""
    loader = MemoryLoader(ReadingOptions(**_sizes(steps, tokens)), PlainTextEncoder(tokenizer), SEED)
    stream = loader.evaluation_stream(load_articles("offline"), num_epochs=1)
    batch: MemoryBatch = next(iter(loader.batches(stream, rows)))["memories"]
    return batch


def new_sampler(
    policy: PolicyModel, tokenizer: PreTrainedTokenizerFast, steps: int, tokens: int = 20
) -> TrajectorySampler:
    """A sampler that reads ``steps`` pairs."""
    separators = Separators.encode(PlainTextEncoder(tokenizer))
    options = RolloutOptions(**_sizes(steps, tokens), tokens_per_query=tokens)
    return TrajectorySampler(policy, KVMemoryEnvironment(), separators, options, SEED)


def lay_out_prompt(batch: MemoryBatch, separators: Separators) -> Tensor:
    """The in-context example and the first query separator, ``[B, S]``."""
    query, response = (torch.tensor(ids).expand(len(batch), -1) for ids in (separators.query, separators.response))
    return torch.cat([query, batch.example_keys, response, batch.example_values, query], dim=1)

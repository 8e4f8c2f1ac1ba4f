"""Memories into the query vectors of half keys, or of no query at all, and the vectors of the keys (design §5).

The first half of each key of a memory is read where a query would be written, after the memory's prompt; keys are read
alone, as in a rollout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attention_rl_trainer.memories.pairs import MemoryBatch
from attention_rl_trainer.models.attention import AttentionLayer, VectorCapture, stopping_after
from attention_rl_trainer.models.key_vectors import of_one_length
from attention_rl_trainer.models.policy import PolicyModel
from attention_rl_trainer.rollout.layout import Layout
from attention_rl_trainer.types import is_token

# Half keys that are read at once: the queries of every layer are held for each of their tokens.
_ROWS_AT_ONCE = 32
_REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, eq=False)
class LayerVectors:
    """What one layer makes of n memories."""

    queries: Tensor
    """Of the first half of each key, after the prompt, ``[n, M, H, D]`` float32; or of the prompt's end,
    ``[n, 1, H, D]``."""
    keys: Tensor
    """Of each key alone, ``[n, M, G, D]`` float32."""

    def rows(self, rows: slice) -> LayerVectors:
        """Take some of the memories."""
        return LayerVectors(self.queries[rows], self.keys[rows])


def half_length(tokens_per_key: int) -> int:
    """Tokens of a key's first half; of one token, all of it."""
    return (tokens_per_key + 1) // 2


def iter_vectors(
    policy: PolicyModel, layout: Layout, memories: MemoryBatch, layers: Mapping[int, AttentionLayer]
) -> Iterator[dict[int, LayerVectors]]:
    """Read memories one by one with adapters off, and take the vectors of some layers.

    Args:
        layers: by number.

    Yields:
        What each layer makes of the next memory, ``[1, ...]``.
    """
    for row in range(len(memories)):
        memory = memories.select_rows([row])
        with policy.inference(), policy.reference():
            queries = _query_vectors(policy, layout.for_batch(memory), memory, layers)
            keys = _key_vectors(policy, memory.key_tokens[0].to(policy.device), layers)
        yield {number: LayerVectors(queries[number][None], keys[number][None]) for number in layers}


def unasked_vectors(
    policy: PolicyModel, layout: Layout, memory: MemoryBatch, layers: Mapping[int, AttentionLayer]
) -> dict[int, LayerVectors]:
    """Read one memory with adapters off where nothing is asked yet: its queries are those of the prompt's last token.

    Returns:
        By layer, queries ``[1, 1, H, D]`` and keys ``[1, M, G, D]``.
    """
    with policy.inference(), policy.reference():
        prompt = layout.for_batch(memory).prompt(memory, policy.device)
        with ExitStack() as stack:
            captures = {number: stack.enter_context(layer.capture_queries()) for number, layer in layers.items()}
            policy.forward(prompt[is_token(prompt)][None])
        keys = _key_vectors(policy, memory.key_tokens[0].to(policy.device), layers)
    return {
        number: LayerVectors(capture.heads()[:, None, -1], keys[number][None]) for number, capture in captures.items()
    }


def join_vectors(parts: Sequence[Mapping[int, LayerVectors]]) -> dict[int, LayerVectors]:
    """Join memories, which all have as many pairs."""
    return {
        number: LayerVectors(
            torch.cat([part[number].queries for part in parts]), torch.cat([part[number].keys for part in parts])
        )
        for number in parts[0]
    }


def _query_vectors(
    policy: PolicyModel, layout: Layout, memory: MemoryBatch, layers: Mapping[int, AttentionLayer]
) -> dict[int, Tensor]:
    """Vectors of half keys after the prompt, ``[M, H, D]`` by layer."""
    prompt = layout.prompt(memory, policy.device)
    # Of a single memory: what is padding can be left out.
    prompt = prompt[is_token(prompt)][None]
    captures = {number: layer.capture_queries for number, layer in layers.items()}
    after_prompt = _after_prompt(policy, prompt)

    def read(chunk: Tensor) -> dict[int, Tensor]:
        cache = after_prompt(len(chunk))
        with _capturing_means(captures) as means:
            policy.forward(chunk, cache)
        return means

    return _by_length(memory.key_tokens[0].to(policy.device), lambda keys: keys[:, : half_length(keys.shape[1])], read)


def _after_prompt(policy: PolicyModel, prompt: Tensor) -> Callable[[int], Cache]:
    """Prepare caches of so many rows that have all read the prompt ``[1, S]``: once, where a row can be repeated."""
    once = DynamicCache(config=policy.causal_lm.config)
    can_be_repeated = all(type(layer) in _REPEATABLE for layer in once.layers)
    if can_be_repeated:
        policy.forward(prompt, once)

    def make_cache(num_rows: int) -> Cache:
        if can_be_repeated:
            cache = copy.deepcopy(once)
            cache.batch_select_indices(torch.zeros(num_rows, dtype=torch.int64, device=policy.device))
            return cache
        # A recurrent state cannot.
        cache = DynamicCache(config=policy.causal_lm.config)
        policy.forward(prompt.expand(num_rows, -1), cache)
        return cache

    return make_cache


def _key_vectors(policy: PolicyModel, keys: Tensor, layers: Mapping[int, AttentionLayer]) -> dict[int, Tensor]:
    """Vectors of keys ``[M, K]``, each alone, ``[M, G, D]`` by layer."""
    captures = {number: layer.capture_keys for number, layer in layers.items()}

    def read(chunk: Tensor) -> dict[int, Tensor]:
        with _capturing_means(captures) as means, stopping_after(layers[max(layers)]):
            policy.forward(chunk)
        return means

    return _by_length(keys, lambda whole: whole, read)


def _by_length(
    keys: Tensor, take: Callable[[Tensor], Tensor], read: Callable[[Tensor], dict[int, Tensor]]
) -> dict[int, Tensor]:
    """Read some tokens of each key, a few keys of one length at a time; ``[M, ...]`` by layer, in the keys' order."""
    rows, parts = [], []
    for numbers, whole in of_one_length(keys):
        rows.append(numbers)
        parts += [read(chunk) for chunk in torch.split(take(whole), _ROWS_AT_ONCE)]
    order = torch.cat(rows).argsort()
    return {number: vectors[order] for number, vectors in _joined(parts).items()}


@contextmanager
def _capturing_means(
    captures: Mapping[int, Callable[[], AbstractContextManager[VectorCapture]]],
) -> Iterator[dict[int, Tensor]]:
    """Fill the mapping, when the context ends, with the means over the tokens of what each layer captured."""
    means: dict[int, Tensor] = {}
    with ExitStack() as stack:
        captured = {number: stack.enter_context(capture()) for number, capture in captures.items()}
        yield means
    means.update({number: capture.mean() for number, capture in captured.items()})


def _joined(parts: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    return {number: torch.cat([part[number] for part in parts]) for number in parts[0]}

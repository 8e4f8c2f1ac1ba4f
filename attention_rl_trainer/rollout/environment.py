"""The environment of the episode: a memory of key-value pairs that is read without replacement (design §5).

Query vectors come in, pairs go out. A user's own environment has the methods of `MemoryEnvironment`, and `log_prob` if
its choices are to be trained (`DifferentiableEnvironment`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attention_rl_trainer.options import Options, Positive, option
from attention_rl_trainer.rollout.selector import (
    HeadAggregation,
    compute_similarity,
    sample_key_value,
    selection_log_probabilities,
)
from attention_rl_trainer.types import KeyValuePair, KeyValuePairs


@dataclass(frozen=True, eq=False)
class Selection:
    """What one step of an environment draws."""

    pairs: KeyValuePair
    index: Tensor
    """The pairs' columns in the memory, ``[B]`` int64."""
    probabilities: Tensor
    """The distribution that they were drawn from, ``[B, M]``; 0 for pairs already read."""


@runtime_checkable
class MemoryEnvironment(Protocol):
    """What the rollout asks of an environment."""

    def reset(self, pairs: KeyValuePairs) -> None:
        """Start new episodes, one for each row of ``pairs``, with every pair available."""

    def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
        """Draw one pair for each row and take it out of the memory.

        Args:
            query_vectors: ``[B, H, D]``.
            noise: uniform numbers in [0, 1), ``[B]``.
        """


@runtime_checkable
class DifferentiableEnvironment(MemoryEnvironment, Protocol):
    """An environment whose choices have a differentiable log-probability, which ``selector_coef`` > 0 needs."""

    def log_prob(self, memory: KeyValuePairs, query_vectors: Tensor, index: Tensor) -> Tensor:
        """Log-probability of whole orders of reading; a pure function, which reads and changes no present episode.

        Args:
            memory: the memories as they were at `reset`.
            query_vectors: ``[B, T, H, D]``.
            index: the column drawn at each step, ``[B, T]`` int64.

        Returns:
            log p(index[b, t] | query_vectors[b, t], index[b, :t]) in nats, ``[B, T]``.
        """


@dataclass
class SelectionOptions(Options):
    """How a query's vector draws a pair."""

    selection_temperature: Positive = option(1.0, "Divides the attention scores of the selector; below 1 sharpens.")
    head_aggregation: HeadAggregation = option(
        "probabilities", "Average the heads' probabilities, or their scores before one softmax."
    )


class KVMemoryEnvironment:
    """A memory that is read through grouped-query attention (`selector`), each pair at most once."""

    def __init__(self, options: SelectionOptions | None = None) -> None:
        self._options = options or SelectionOptions()
        self._pairs: KeyValuePairs | None = None
        self._available_mask: Tensor | None = None

    @property
    def pairs(self) -> KeyValuePairs:
        """The memory of the present episodes."""
        if self._pairs is None:
            raise RuntimeError("call reset(pairs) before using the environment")
        return self._pairs

    @property
    def available_mask(self) -> Tensor:
        """True where a pair was not drawn yet, ``[B, M]`` bool."""
        if self._available_mask is None:
            raise RuntimeError("call reset(pairs) before using the environment")
        return self._available_mask

    def reset(self, pairs: KeyValuePairs) -> None:
        """See `MemoryEnvironment`."""
        self._pairs = pairs
        self._available_mask = torch.ones_like(pairs.pair_numbers, dtype=torch.bool)

    def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
        """See `MemoryEnvironment`.

        Raises:
            ValueError: a row's memory is used up.
        """
        available = self.available_mask
        probabilities = self._log_probabilities(query_vectors, self.pairs.key_vectors, available).exp()
        index = sample_key_value(probabilities, noise)
        self._available_mask = available.scatter(1, index[:, None], False)
        return Selection(self.pairs.gather(index), index, probabilities)

    def log_prob(self, memory: KeyValuePairs, query_vectors: Tensor, index: Tensor) -> Tensor:
        """See `DifferentiableEnvironment`."""
        batch_size, num_steps = index.shape
        available = torch.ones_like(memory.pair_numbers, dtype=torch.bool)
        masks = []
        for step in range(num_steps):
            masks.append(available)
            available = available.scatter(1, index[:, step : step + 1], False)
        log_probabilities = self._log_probabilities(
            query_vectors.flatten(0, 1),
            memory.key_vectors.repeat_interleave(num_steps, dim=0),
            torch.stack(masks, dim=1).flatten(0, 1),
        )
        return log_probabilities.gather(1, index.reshape(-1, 1)).view(batch_size, num_steps)

    def _log_probabilities(self, query_vectors: Tensor, key_vectors: Tensor, available_mask: Tensor) -> Tensor:
        similarity = compute_similarity(query_vectors, key_vectors)
        options = self._options
        return selection_log_probabilities(
            similarity, available_mask, options.selection_temperature, options.head_aggregation
        )

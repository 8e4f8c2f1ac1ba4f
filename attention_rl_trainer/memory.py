"""The environment of the episode: a memory of key-value pairs that is read without replacement (design §5).

`KVMemoryEnvironment` joins the selector with the availability of the pairs. There is no model inside: query vectors
come in, pairs go out. A user's own environment needs the methods of `MemoryEnvironment`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attention_rl_trainer.selector import (
    HeadAggregation,
    compute_similarity,
    sample_key_value,
    selection_log_probabilities,
)
from attention_rl_trainer.types import KeyValuePair, KeyValuePairs


@dataclass(frozen=True, eq=False)
class Selection:
    """What one step of an environment draws.

    Attributes:
        pairs: the drawn pair of each row.
        index: its column in the memory, ``[B]`` int64.
        probabilities: the distribution it was drawn from, ``[B, M]``; 0 for pairs already read.
    """

    pairs: KeyValuePair
    index: Tensor
    probabilities: Tensor


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

    def log_prob(self, query_vectors: Tensor, index: Tensor) -> Tensor:
        """Log-probability of whole orders, from memories as they were at `reset`.

        Args:
            query_vectors: the query vector of each step, ``[B, T, H, D]``.
            index: the column drawn at each step, ``[B, T]`` int64.

        Returns:
            log p(index[b, t] | query_vectors[b, t], index[b, :t]) in nats, ``[B, T]``.
        """


class KVMemoryEnvironment:
    """A memory that is read through grouped-query attention, each pair at most once.

    Args:
        temperature: selection temperature; divides the attention scores.
        head_aggregation: how the query heads are joined, see `selector`.
    """

    def __init__(self, temperature: float = 1.0, head_aggregation: HeadAggregation = "probabilities") -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature
        self.head_aggregation: HeadAggregation = head_aggregation
        self._pairs: KeyValuePairs | None = None
        self._available_mask: Tensor | None = None

    @property
    def pairs(self) -> KeyValuePairs:
        """The memory of the current episodes.

        Raises:
            RuntimeError: `reset` was not called.
        """
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
        """Start new episodes with every pair available.

        Args:
            pairs: the memories of B episodes.
        """
        self._pairs = pairs
        self._available_mask = torch.ones_like(pairs.pair_numbers, dtype=torch.bool)

    def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
        """Draw one pair for each row and take it out of the memory.

        Args:
            query_vectors: ``[B, H, D]``.
            noise: uniform numbers in [0, 1), ``[B]``.

        Raises:
            ValueError: a row's memory is used up.
        """
        available = self.available_mask
        probabilities = self._log_probabilities(query_vectors, self.pairs.key_vectors, available).exp()
        index = sample_key_value(probabilities, noise)
        self._available_mask = available.scatter(1, index[:, None], False)
        return Selection(self.pairs.gather(index), index, probabilities)

    def log_prob(self, query_vectors: Tensor, index: Tensor) -> Tensor:
        """Log-probability of whole orders, from memories as they were at `reset`; differentiable.

        Args:
            query_vectors: the query vector of each step, ``[B, T, H, D]``.
            index: the column drawn at each step, ``[B, T]`` int64.

        Returns:
            log p(index[b, t] | query_vectors[b, t], index[b, :t]) in nats, ``[B, T]``.
        """
        batch_size, num_steps = index.shape
        available = torch.ones_like(self.pairs.pair_numbers, dtype=torch.bool)
        masks = []
        for step in range(num_steps):
            masks.append(available)
            available = available.scatter(1, index[:, step : step + 1], False)
        log_probabilities = self._log_probabilities(
            query_vectors.flatten(0, 1),
            self.pairs.key_vectors.repeat_interleave(num_steps, dim=0),
            torch.stack(masks, dim=1).flatten(0, 1),
        )
        return log_probabilities.gather(1, index.reshape(-1, 1)).view(batch_size, num_steps)

    def _log_probabilities(self, query_vectors: Tensor, key_vectors: Tensor, available_mask: Tensor) -> Tensor:
        similarity = compute_similarity(query_vectors, key_vectors)
        return selection_log_probabilities(similarity, available_mask, self.temperature, self.head_aggregation)

"""The environment of the episode: a memory of key-value pairs that is read without replacement (design §5).

Query vectors come in, pairs go out. A user's own environment has the methods of `MemoryEnvironment`, and `log_prob` if
its choices are to be trained (`DifferentiableEnvironment`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attention_rl_trainer.options import Count, Options, Positive, check_value, option
from attention_rl_trainer.rollout.calibration import Calibration
from attention_rl_trainer.rollout.selector import (
    HeadAggregation,
    HeadSimilarity,
    Selector,
    sample_key_value,
    selection_information,
    unread_masks,
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
    information: Tensor | None = None
    """How much of each row's choice depends on the query, nats, ``[B]``; ``None`` where it was not measured."""


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
            ``log p(index[b, t] | query_vectors[b, t], index[b, :t])`` in nats, ``[B, T]``.
        """


@runtime_checkable
class ExactEnvironment(DifferentiableEnvironment, Protocol):
    """An environment that knows its whole choice, which ``selector_gradient`` other than ``"sampled"`` needs."""

    def log_probabilities(self, memory: KeyValuePairs, query_vectors: Tensor, index: Tensor) -> Tensor:
        """Log-probabilities of every pair at every step of `log_prob`, ``[B, T, M]`` nats; -inf where it was read."""


@runtime_checkable
class CalibratedEnvironment(MemoryEnvironment, Protocol):
    """An environment whose selector can be fitted; ``center_vectors`` and ``selection_temperature: auto`` need it."""

    def calibrate(self, calibration: Calibration) -> None:
        """Select with these means and this temperature from now on."""


# Queries, of its own batch, after which a memory's choice is computed to see what depends on them.
_MAX_QUERIES_ASKED = 32


@dataclass
class SelectionOptions(Options):
    """How a query's vector draws a pair."""

    selection_temperature: float | str | None = option(
        1.0,
        "Divides the attention scores of the selector; below 1 sharpens. 'auto' fits it before training, so that the "
        "right pairs are as likely as can be.",
    )
    head_aggregation: HeadAggregation = option(
        "probabilities", "Average the heads' probabilities, or their scores before one softmax."
    )
    head_similarity: HeadSimilarity = option("dot", "Compare a head's query and key by dot product / √D or by cosine.")
    center_vectors: bool = option(
        False, "Subtract from query and key vectors their means over training memories, fitted before training."
    )
    calibration_memories: Count = option(
        64, "Training memories that heads, means and temperature are fitted to, where they are fitted."
    )

    @property
    def fixed_temperature(self) -> float | None:
        """The temperature, ``None`` where it is fitted."""
        return None if self.selection_temperature == "auto" else float(self.selection_temperature or 0)

    @property
    def is_fitted(self) -> bool:
        """Whether means or the temperature are fitted before training."""
        return self.center_vectors or self.fixed_temperature is None

    def check_options(self) -> None:
        """Check the ranges; a temperature that came as text is a number or ``"auto"``."""
        super().check_options()
        given = self.selection_temperature
        if isinstance(given, str) and given != "auto":
            try:
                self.selection_temperature = given = float(given)
            except ValueError:
                raise ValueError(f"selection_temperature must be a number above 0 or 'auto', got {given!r}") from None
        if given != "auto":
            check_value("selection_temperature", given, Positive)


class KVMemoryEnvironment:
    """A memory that is read through grouped-query attention (`selector`), each pair at most once.

    Args:
        calibration: what was fitted; may be given later, to `calibrate`, before the first step.
    """

    def __init__(self, options: SelectionOptions | None = None, calibration: Calibration | None = None) -> None:
        self._options = options or SelectionOptions()
        self._calibration: Calibration | None = None
        if calibration is not None:
            self.calibrate(calibration)
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

    def calibrate(self, calibration: Calibration) -> None:
        """See `CalibratedEnvironment`.

        Raises:
            ValueError: means are to be subtracted, and the calibration has none.
        """
        if self._options.center_vectors and calibration.query_means is None:
            raise ValueError("center_vectors is true, but the calibration has no means; calibrate with center_vectors")
        self._calibration = calibration

    @property
    def selector(self) -> Selector:
        """How vectors are compared.

        Raises:
            RuntimeError: means or the temperature are to be fitted, and were not.
        """
        options, fitted = self._options, self._calibration
        if options.is_fitted and fitted is None:
            raise RuntimeError(
                "center_vectors and selection_temperature 'auto' need what is fitted before training; call "
                "calibrate(calibration) before using the environment"
            )
        temperature = options.fixed_temperature
        if temperature is None:
            assert fitted is not None
            temperature = fitted.temperature
        selector = Selector(temperature, options.head_aggregation, options.head_similarity)
        if options.center_vectors:
            assert fitted is not None
            selector = replace(selector, query_means=fitted.query_means, key_means=fitted.key_means)
        return selector

    def reset(self, pairs: KeyValuePairs) -> None:
        """See `MemoryEnvironment`."""
        self._pairs = pairs
        self._available_mask = torch.ones_like(pairs.pair_numbers, dtype=torch.bool)

    def step(self, query_vectors: Tensor, noise: Tensor) -> Selection:
        """See `MemoryEnvironment`.

        Raises:
            ValueError: a row's memory is used up.
        """
        available, selector = self.available_mask, self.selector
        probabilities = selector.log_probabilities(query_vectors, self.pairs.key_vectors, available).exp()
        index = sample_key_value(probabilities, noise)
        information = self._information(selector, query_vectors, probabilities)
        self._available_mask = available.scatter(1, index[:, None], False)
        return Selection(self.pairs.gather(index), index, probabilities, information)

    def _information(self, selector: Selector, query_vectors: Tensor, probabilities: Tensor) -> Tensor | None:
        """Ask each memory with the queries of other rows too: `selection_information`, ``[B]``; of one row, nothing."""
        num_asked = min(len(query_vectors), _MAX_QUERIES_ASKED)
        if num_asked == 1:
            return None
        choices = [probabilities]
        for shift in range(1, num_asked):
            asked = query_vectors.roll(shift, dims=0)
            choices.append(selector.log_probabilities(asked, self.pairs.key_vectors, self.available_mask).exp())
        return selection_information(torch.stack(choices, dim=1))

    def log_prob(self, memory: KeyValuePairs, query_vectors: Tensor, index: Tensor) -> Tensor:
        """See `DifferentiableEnvironment`."""
        chosen = self.log_probabilities(memory, query_vectors, index)
        return chosen.gather(2, index[:, :, None]).squeeze(2)

    def log_probabilities(self, memory: KeyValuePairs, query_vectors: Tensor, index: Tensor) -> Tensor:
        """See `ExactEnvironment`."""
        num_steps, num_pairs = index.shape[1], memory.pair_numbers.shape[1]
        chosen = self.selector.log_probabilities(
            query_vectors.flatten(0, 1),
            memory.key_vectors.repeat_interleave(num_steps, dim=0),
            unread_masks(index, num_pairs)[:, :-1].flatten(0, 1),
        )
        return chosen.view(*index.shape, num_pairs)

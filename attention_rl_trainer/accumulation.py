"""The gradient of kept trajectories, in micro-batches that fit into memory, checked before it is used (design §9).

What the loss of a micro-batch is, and what belongs into the error where memory runs out, is passed in. Knows nothing
about rollouts, optimizers or the Trainer.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from attention_rl_trainer.finiteness import NonFiniteError, located
from attention_rl_trainer.micro_batches import AccumulationStart, MicroBatchSize, halve_until_it_fits
from attention_rl_trainer.update import KeptTrajectories, LossTerms

Differentiate: TypeAlias = Callable[[KeptTrajectories], tuple[Tensor, LossTerms]]
"""Adds a micro-batch's gradient to what is there; returns its loss, detached, and the parts of that."""

Attempt: TypeAlias = Callable[[int, int], AbstractContextManager[None]]
"""Surrounds an attempt: trajectories of the largest batch, and of a micro-batch."""


@dataclass(frozen=True, eq=False)
class Accumulated:
    """What an accumulation gave beside the gradient.

    Attributes:
        loss: the loss of all trajectories, a scalar, detached.
        metrics: of each batch, its policy loss and its mean KL per query token.
        halved_from: trajectories of a micro-batch before memory ran out, or ``None`` if it did not.
    """

    loss: Tensor
    metrics: list[dict[str, float]]
    halved_from: int | None


class GradientAccumulator:
    """Sums the gradients of micro-batches.

    Args:
        parameters: what is trained, by name.
        size: trajectories in a micro-batch; halved where memory runs out.
        device: where the model lies.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], size: MicroBatchSize, device: torch.device) -> None:
        self._parameters = dict(parameters)
        self.size = size
        self._device = device

    def accumulate(
        self, differentiate: Differentiate, batches: Sequence[KeptTrajectories], iteration: int, attempt: Attempt
    ) -> Accumulated:
        """Add the gradient of kept trajectories to what is there, and check it.

        Args:
            differentiate: adds that of a micro-batch.
            batches: the kept trajectories of rollout batches.
            iteration: which of an update's, from 1; for errors.
            attempt: surrounds each attempt.

        Raises:
            NonFiniteError: the gradient is not finite; names the micro-batch.
        """
        largest = max((len(batch) for batch in batches), default=0)
        size_before = self.size.size
        start = AccumulationStart(self._parameters.values(), self._device)

        def try_size(size: int) -> tuple[Tensor, list[dict[str, float]]]:
            with attempt(largest, size):
                return self._accumulate_in(size, differentiate, batches, iteration)

        loss, metrics = halve_until_it_fits(try_size, self.size, largest, start.restore)
        return Accumulated(loss, metrics, size_before if self.size.size < size_before else None)

    def _accumulate_in(
        self, size: int, differentiate: Differentiate, batches: Sequence[KeptTrajectories], iteration: int
    ) -> tuple[Tensor, list[dict[str, float]]]:
        total = torch.zeros((), device=self._device)
        metrics = []
        numbers = itertools.count(1)
        for batch in batches:
            sums: dict[str, float] = defaultdict(float)
            for micro_batch in batch.split(size):
                with located(f"micro-batch {next(numbers)} of iteration {iteration}", micro_batch.articles):
                    loss, terms = differentiate(micro_batch)
                    self.expect_finite()
                total += loss
                sums["policy_loss"] += terms.policy.item()
                sums["kl"] += terms.kl.item() / _weight_of_tokens(batch)
            metrics.append(sums)
        return total, metrics

    def expect_finite(self) -> bool:
        """Refuse a gradient that is not finite, or whose norm is not; returns whether there is any gradient.

        Clipping would turn a finite gradient whose norm overflows into zeros.

        Raises:
            NonFiniteError: names the parameter, or the norm.
        """
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        if not gradients:
            return False
        if not bool(torch.nn.utils.get_total_norm(list(gradients.values())).isfinite()):
            bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
            raise NonFiniteError(f"the gradient of {bad[0]}" if bad else "the norm of the gradient")
        return True


def _weight_of_tokens(batch: KeptTrajectories) -> float:
    """Weight of all query tokens of a batch together; a weighted sum over them becomes a mean by it."""
    return batch.weights.sum().item() * len(batch.query_starts) * batch.query_length

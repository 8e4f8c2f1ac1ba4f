"""Rewards into a verdict on each trajectory: history, warm-up, threshold (design §8).

A batch is judged by the history *before* it. Knows nothing about how a reward came about or what becomes of a kept
trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_rl_trainer.finiteness import NonFiniteError


@dataclass
class RewardStatistics:
    """Count, mean and variance of every trajectory reward ever, in float64.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which is Welford's for one value.

    Attributes:
        count: rewards so far.
        mean: their mean, nats per token.
        sum_of_squares: sum of squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    sum_of_squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation with ddof 0, nats per token; 0 before the first reward."""
        return math.sqrt(self.sum_of_squares / self.count) if self.count else 0.0

    def update(self, rewards: Tensor) -> None:
        """Add a batch of rewards.

        Args:
            rewards: any shape; may be empty.

        Raises:
            ValueError: a reward is not finite; nothing is added then.
            NonFiniteError: mean or SD would not be finite; nothing is added then.
        """
        values = rewards.detach().to("cpu", torch.float64).flatten()
        if not bool(values.isfinite().all()):
            raise ValueError(f"rewards must be finite, got {values[~values.isfinite()][0].item()}")
        if len(values):
            mean = values.mean()
            self.merge(RewardStatistics(len(values), mean.item(), (values - mean).square().sum().item()))

    def merge(self, other: RewardStatistics) -> None:
        """Add the rewards that another object counted.

        Args:
            other: unchanged.

        Raises:
            NonFiniteError: mean or SD would not be finite; nothing is added then.
        """
        count = self.count + other.count
        if count == 0:
            return
        difference = other.mean - self.mean
        mean = self.mean + difference * other.count / count
        # A product: a power that overflows is an error that says nothing about where.
        between = difference * difference * self.count * other.count / count
        sum_of_squares = self.sum_of_squares + (other.sum_of_squares + between)
        for quantity, value in {"mean": mean, "SD": sum_of_squares}.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"the {quantity} of the reward history", f"after {count} rewards")
        self.count, self.mean, self.sum_of_squares = count, mean, sum_of_squares

    def threshold(self, num_stds: float) -> float:
        """Reward that a trajectory must exceed, mean + ``num_stds`` · SD.

        Args:
            num_stds: ``filter_threshold``; -inf is below every reward, even where all were equal.

        Raises:
            NonFiniteError: it is not finite although ``num_stds`` is.
        """
        if math.isinf(num_stds):
            return num_stds
        threshold = self.mean + num_stds * self.std
        if not math.isfinite(threshold):
            raise NonFiniteError("the threshold of the reward history", f"after {self.count} rewards")
        return threshold

    def state_dict(self) -> dict[str, float | int]:
        """Return the state as JSON-able numbers, exact to the last bit."""
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self.sum_of_squares}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, float | int]) -> RewardStatistics:
        """Restore what `state_dict` returned.

        Args:
            state: the numbers.
        """
        return cls(int(state["count"]), float(state["mean"]), float(state["sum_of_squares"]))


def keep_mask(
    rewards: Tensor, history: RewardStatistics, *, filter_threshold: float | None, warmup_episodes: int
) -> Tensor:
    """Decide which trajectories are trained on.

    Args:
        rewards: trajectory rewards, ``[B]``.
        history: every reward before this batch.
        filter_threshold: standard deviations above the historical mean that a reward must exceed; ``None`` keeps all.
        warmup_episodes: nothing is kept until this many rewards are in the history.

    Returns:
        ``[B]`` bool.

    Raises:
        NonFiniteError: the threshold is not finite.
    """
    if history.count < warmup_episodes:
        return torch.zeros_like(rewards, dtype=torch.bool)
    if filter_threshold is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    return rewards.double() > history.threshold(filter_threshold)

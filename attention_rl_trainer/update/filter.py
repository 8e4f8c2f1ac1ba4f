"""Rewards into a verdict on each trajectory: history, warm-up, threshold (design §8).

A batch is judged by the history *before* it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from attention_rl_trainer.durability.states import Stateful
from attention_rl_trainer.errors import NonFiniteError
from attention_rl_trainer.options import Count, Options, option


@dataclass
class RewardStatistics:
    """Count, mean and sum of squared deviations of every trajectory reward so far, nats per token, in float64.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which is Welford's for one value.
    """

    count: int = 0
    mean: float = 0.0
    sum_of_squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation with ddof 0; 0 before the first reward."""
        return math.sqrt(self.sum_of_squares / self.count) if self.count else 0.0

    def update(self, rewards: Tensor) -> None:
        """Add rewards, of any shape or none.

        Raises:
            ValueError: a reward is not finite; nothing is added, as in the next case.
            NonFiniteError: mean or SD would not be finite.
        """
        values = rewards.detach().to("cpu", torch.float64).flatten()
        if not bool(values.isfinite().all()):
            raise ValueError(f"rewards must be finite, got {values[~values.isfinite()][0].item()}")
        if len(values):
            mean = values.mean()
            self.merge(RewardStatistics(len(values), mean.item(), (values - mean).square().sum().item()))

    def merge(self, other: RewardStatistics) -> None:
        """Add the rewards that another object counted; see `update`."""
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
        """Mean + ``num_stds`` · SD, which a reward must exceed; -inf stays -inf, also where SD is 0.

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
        """Restore what `state_dict` returned."""
        return cls(int(state["count"]), float(state["mean"]), float(state["sum_of_squares"]))


@dataclass
class FilterOptions(Options):
    """Which trajectories are trained on."""

    warmup_episodes: Count = option(15, "Nothing is trained until this many rewards are in the history.")
    filter_threshold: float | None = option(
        1.0, "Keep trajectories above the historical mean + this many SD; none keeps every trajectory."
    )


@dataclass(frozen=True, eq=False)
class Verdict:
    """How a batch was judged; ``keep`` is checked."""

    keep: Tensor
    """Which trajectories are trained on, ``[B]`` bool."""
    history: RewardStatistics
    """Before the batch; ``history_after`` includes it."""
    history_after: RewardStatistics
    threshold: float | None = None
    """What a reward had to exceed, nats per token; ``None`` where nothing was judged by one."""
    is_warmup: bool = False

    def __post_init__(self) -> None:
        if self.keep.dtype != torch.bool or self.keep.dim() != 1:
            got = f"{self.keep.dtype} of shape {list(self.keep.shape)}"
            raise ValueError(f"a filter's verdict must say for each trajectory whether to keep it, [B] bool; got {got}")


@runtime_checkable
class TrajectoryFilter(Stateful, Protocol):
    """What the trainer asks of a filter; its state, JSON-able, is kept in checkpoints."""

    def judge(self, rewards: Tensor) -> Verdict:
        """Judge trajectories by the history before them, and add their rewards, ``[B]`` nats per token, to it."""


class RewardFilter:
    """Keeps what exceeds the historical mean by ``filter_threshold`` standard deviations, after a warm-up.

    A subclass that keeps others overrides `keep`.
    """

    def __init__(self, options: FilterOptions | None = None) -> None:
        self.options = options or FilterOptions()
        self.statistics = RewardStatistics()

    def judge(self, rewards: Tensor) -> Verdict:
        """See `TrajectoryFilter`.

        Raises:
            NonFiniteError: the threshold, or the history with the batch, is not finite.
        """
        history, num_stds = self.statistics, self.options.filter_threshold
        is_warmup = history.count < self.options.warmup_episodes
        threshold = None if is_warmup or num_stds is None else history.threshold(num_stds)
        keep = torch.zeros_like(rewards, dtype=torch.bool) if is_warmup else self.keep(rewards, threshold)
        after = replace(history)
        after.update(rewards)
        is_stated = threshold is not None and math.isfinite(threshold)
        verdict = Verdict(keep, history, after, threshold if is_stated else None, is_warmup)
        self.statistics = after
        return verdict

    def keep(self, rewards: Tensor, threshold: float | None) -> Tensor:
        """Decide which trajectories are trained on after the warm-up, ``[B]`` bool; without a threshold all are."""
        if threshold is None:
            return torch.ones_like(rewards, dtype=torch.bool)
        return rewards.double() > threshold

    def state_dict(self) -> dict[str, float | int]:
        """Return the history."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Go back to what `state_dict` returned."""
        self.statistics = RewardStatistics.from_state_dict(state)

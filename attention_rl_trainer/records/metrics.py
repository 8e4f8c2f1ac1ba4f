"""A rolled-out batch into metrics, and the metrics of the steps between two logs into one number each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attention_rl_trainer.models.sampling import entropy
from attention_rl_trainer.types import Trajectory, is_token
from attention_rl_trainer.update.filter import RewardStatistics


def repetition(token_ids: Tensor) -> Tensor:
    """Measure how much of each sequence repeats what comes earlier in it.

    Args:
        token_ids: ``[..., L]`` int64.

    Returns:
        Share of the tokens that occurred before, ``[...]``; 0 where all differ, 1 - 1/L where all are the same.
    """
    return _occurred_before(token_ids[..., :, None] == token_ids[..., None, :]).float().mean(dim=-1)


def distinct_queries(token_ids: Tensor) -> Tensor:
    """Count the different queries of each trajectory, of ``[B, T, L]`` int64: ``[B]`` int64, 1 to T."""
    is_same = (token_ids[:, :, None] == token_ids[:, None, :]).all(dim=-1)
    return (~_occurred_before(is_same)).sum(dim=-1)


def query_diversity(token_ids: Tensor) -> Tensor:
    """Entropy of which query is asked at each step over a batch's trajectories, of ``[B, T, L]`` int64: ``[T]``, nats.

    0 where all ask alike, log B where no two do. No draw can depend on the queries by more.
    """
    counts = [torch.unique(queries, dim=0, return_counts=True)[1] for queries in token_ids.unbind(dim=1)]
    return torch.stack([entropy(count / len(token_ids)) for count in counts])


def _occurred_before(is_same: Tensor) -> Tensor:
    """Of items compared with each other, ``[..., n, n]``, tell which are the same as an earlier one, ``[..., n]``."""
    earlier = torch.ones(is_same.shape[-2:], dtype=torch.bool, device=is_same.device).tril(-1)
    return (is_same & earlier).any(dim=-1)


def heard(trajectory: Trajectory) -> dict[str, Tensor]:
    """Say how much of the choices depends on the queries, and what such queries can be worth; means over the steps.

    Returns:
        ``selection_information``, nats, and ``query_bound``, that over V: nats per value token by which a query that
        tells no more than which pair it drew can beat silence, for a calibrated reader (design §5). Each ``[B]``; none
        where the environment did not measure it.
    """
    if any(step.selection_information is None for step in trajectory.steps):
        return {}
    information = trajectory.stack("selection_information").mean(dim=1)
    values = torch.stack([step.selected_pair.value_tokens for step in trajectory.steps], dim=1)
    bound = (trajectory.stack("selection_information") / is_token(values).sum(dim=2)).mean(dim=1)
    return {"selection_information": information, "query_bound": bound}


def trajectory_metrics(trajectory: Trajectory) -> dict[str, float]:
    """Summarize a rollout batch: means over trajectories and steps, by the names under which they are logged."""
    probabilities, queries = trajectory.stack("selection_probabilities"), trajectory.stack("query_tokens")
    metrics = {
        "reward": trajectory.avg_reward.mean(),
        "reward_std": trajectory.avg_reward.std(correction=0),
        "reward_max": trajectory.avg_reward.max(),
        "query_gain": trajectory.stack("query_gain").mean(),
        "model_gain": trajectory.stack("model_gain").mean(),
        "query_entropy": trajectory.stack("query_entropy").mean(),
        "query_repetition": repetition(queries).mean(),
        "query_diversity": query_diversity(queries).mean(),
        "distinct_queries": distinct_queries(queries).float().mean(),
        "selector_entropy": entropy(probabilities).mean(),
        "selector_max": probabilities.max(dim=-1).values.mean(),
    }
    for name in ("order_gain", "information_gain"):
        if getattr(trajectory.steps[0], name) is not None:
            metrics[name] = trajectory.stack(name).mean()
    metrics |= {name: values.mean() for name, values in heard(trajectory).items()}
    return {name: value.item() for name, value in metrics.items()}


def _latest(_: float, value: float) -> float:
    return value


# How a metric that is collected several times between two logs becomes one number; the others are means by weight.
_JOINS: dict[str, Callable[[float, float], float]] = {
    **dict.fromkeys(("reward_max", "peak_memory_gib"), max),
    **dict.fromkeys(("kept_trajectories", "rollout_seconds", "update_seconds", "policy_loss"), operator.add),
    **dict.fromkeys(("episodes", "updates", "skipped_articles", "history_mean", "history_std", "threshold"), _latest),
}
# As the Trainer does with the loss: a step that kept nothing counts as 0.
_PER_STEP = ("policy_loss",)


class MetricsBuffer:
    """Joins the metrics of the steps between two logs, without keeping those of each step."""

    def __init__(self) -> None:
        self._joined: dict[str, float] = {}
        self._means: dict[str, tuple[float, float]] = {}
        """Weighted sums, and the sums of the weights."""
        self._rewards = RewardStatistics()
        self._num_steps = 0

    def add(self, values: Mapping[str, float | None], weight: float = 1.0) -> None:
        """Collect numbers by name; ``None`` stands for one that does not exist this time.

        Args:
            weight: of those that are averaged: how much each is a mean of, such as trajectories or seconds.
        """
        for name, value in values.items():
            if value is None:
                continue
            if name in _JOINS:
                held = self._joined.get(name)
                self._joined[name] = float(value) if held is None else float(_JOINS[name](held, value))
            else:
                total, weights = self._means.get(name, (0.0, 0.0))
                self._means[name] = total + value * weight, weights + weight

    def add_rewards(self, rewards: Tensor) -> None:
        """Collect trajectories' rewards, ``[B]``: their mean and SD are of all trajectories, not means over batches."""
        self._rewards.update(rewards)

    def count_step(self) -> None:
        """Count a step of the Trainer."""
        self._num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what was collected and not yet logged, JSON-able."""
        means = {name: list(mean) for name, mean in self._means.items()}
        rewards = self._rewards.state_dict()
        return {"joined": dict(self._joined), "means": means, "rewards": rewards, "steps": self._num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self._joined = dict(state["joined"])
        self._means = {name: (total, weights) for name, (total, weights) in state["means"].items()}
        self._rewards = RewardStatistics.from_state_dict(state["rewards"])
        self._num_steps = int(state["steps"])

    def numbers(self) -> dict[str, float]:
        """Return one number per name."""
        numbers = self._joined | {name: total / weights for name, (total, weights) in self._means.items()}
        numbers |= {name: numbers[name] / self._num_steps for name in _PER_STEP if name in numbers}
        if self._rewards.count:
            numbers |= {"reward": self._rewards.mean, "reward_std": self._rewards.std}
        return numbers

    def drain(self) -> dict[str, float]:
        """Return one number per name, and forget them."""
        numbers = self.numbers()
        self.load_state_dict(MetricsBuffer().state_dict())
        return numbers
